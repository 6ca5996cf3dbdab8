"""Checkpoints: asynchronous and atomic, with the position in the data and the configuration.

This is the only file that uses Orbax. A checkpoint is `checkpoints/<number of updates>/` with four
items: `params`, `optimizer`, `data` (the iterator's state) and `meta` (the configuration, and
checksums of all four). Orbax writes to a temporary folder, which it renames at the end. Each
process writes the parts of the arrays that lie on its devices, and process 0 everything else, so
that another number of processes, on another mesh, can read it.
"""

import errno
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from galore_jax.errors import InputError
from galore_jax.training.checksum import json_checksum, tree_checksum
from galore_jax.training.config import Config
from galore_jax.training.config_file import from_dict, to_dict
from galore_jax.training.processes import ending_together, is_first
from galore_jax.training.run_folder import RunFolder, check_same_run
from galore_jax.training.state import TrainState, abstract_state


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Args:
      folder: the run's checkpoints/.
      keep: how many of the latest to keep; an older one is deleted after the newer is complete.

    Raises:
      InputError: the folder cannot be written to.
      FileExistsError: it is a file.
    """

    def __init__(self, folder: Path, keep: int):
        _silence_duplicate_errors()
        self.folder = folder.absolute()
        with ending_together():
            self.folder.mkdir(parents=True, exist_ok=True)
            # Orbax would wait ten minutes for a folder that it cannot make.
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise InputError(
                    f"{self.folder} cannot be written to: change its permissions, or name another "
                    "training.folder."
                )
            _remove_unfinished(self.folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(_remove_unfinished, self.folder)
            stack.enter_context(_raise_on_full_disk(self.folder))
            stack.callback(self._manager.close)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.close()

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, batches: grain.DatasetIterator, config: Config) -> None:
        """Starts to save; returns as soon as the state is copied and may be donated.

        Raises:
          OSError: the disk is full, now or during the previous save (ENOSPC).
        """
        recorded, position = to_dict(config), batches.get_state()
        checksums = {
            "params": tree_checksum(state.params),
            "optimizer": tree_checksum(state.opt_state),
            "data": json_checksum(position),
            "config": json_checksum(recorded),
        }
        with _raise_on_full_disk(self.folder):
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    data=ocp.args.JsonSave(position),
                    meta=ocp.args.JsonSave({"config": recorded, "checksums": checksums}),
                ),
            )

    def wait(self) -> None:
        """Waits until the save is complete.

        Raises:
          OSError: the disk is full (ENOSPC).
        """
        with _raise_on_full_disk(self.folder):
            self._manager.wait_until_finished()

    def restore(
        self, config: Config, batches: grain.DatasetIterator, mesh: Mesh | None = None
    ) -> TrainState:
        """The latest state, on a mesh or a single device, whatever device or mesh it was saved on.

        `batches` is set to continue where the run was.

        Raises:
          InputError: the checkpoint is of another configuration, or is damaged.
        """
        step = self.latest()
        assert step is not None, "there is no checkpoint to restore"
        recorded, checksums = _restore_meta(self._manager, step)
        check_same_run(recorded, config, self.folder)
        target = _on_devices(abstract_state(config, mesh))
        with _raise_on_corruption(self._manager, step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(target.params),
                    optimizer=ocp.args.StandardRestore(target.opt_state),
                ),
            )
            batches.set_state(_restore_position(self._manager, step))
            for what, name, restored_checksum in (
                ("a parameter", "params", tree_checksum(restored["params"])),
                ("the optimizer's state", "optimizer", tree_checksum(restored["optimizer"])),
                ("the position in the data", "data", json_checksum(batches.get_state())),
            ):
                _check_checksum(what, checksums.get(name), restored_checksum)
        count = jax.device_put(np.int32(step), target.step.sharding)
        return TrainState(restored["params"], restored["optimizer"], count)


def load_for_inference(folder: str | Path) -> tuple[Config, Any, int]:
    """Loads the parameters of a run's latest checkpoint, without the optimizer's state.

    Args:
      folder: the folder of the run.

    Returns:
      The run's configuration, the parameters, and the number of updates made.

    Raises:
      InputError: the folder holds no checkpoint, or its latest one is damaged.
    """
    checkpoints = RunFolder(folder).checkpoints.absolute()
    if not checkpoints.is_dir():
        raise InputError(f"{folder} holds no checkpoints/: give the folder of a training run.")
    _silence_duplicate_errors()
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(checkpoints, options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{checkpoints} holds no complete checkpoint: let the run reach one.")
        config, checksums = _restore_meta(manager, step)
        target = _on_devices(abstract_state(config).params)
        with _raise_on_corruption(manager, step):
            arguments = ocp.args.Composite(params=ocp.args.StandardRestore(target))
            params = manager.restore(step, args=arguments)["params"]
            _check_checksum("a parameter", checksums.get("params"), tree_checksum(params))
        return config, params, step


def _on_devices(abstract: Any) -> Any:
    """Adds a sharding where there is none: Orbax would look for the device that saved the array."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding is not None else leaf.update(sharding=here), abstract
    )


def _restore_meta(manager: ocp.CheckpointManager, step: int) -> tuple[Config, dict[str, int]]:
    """The configuration, and the checksums, which old checkpoints do not have."""
    with _raise_on_corruption(manager, step):
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = manager.restore(step, args=arguments)["meta"]
        checksums = meta.get("checksums", {})
        _check_checksum("the configuration", checksums.get("config"), json_checksum(meta["config"]))
        return from_dict(meta["config"]), checksums


def _restore_position(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The state of the iterator of batches."""
    # Where checkpoints had it before several processes could train.
    old = Path(manager.directory, str(step), "data", "process_0-of-1.json")
    if old.exists():
        return json.loads(old.read_text())
    return manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]


def _check_checksum(what: str, saved: int | None, restored: int) -> None:
    if saved is not None and saved != restored:
        raise ValueError(f"{what} differs from what was saved")


def _remove_unfinished(folder: Path) -> None:
    if not is_first():
        return
    for unfinished in folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _raise_on_full_disk(folder: Path) -> Iterator[None]:
    """Converts TensorStore's ValueError about a full disk to an OSError."""
    try:
        yield
    except ValueError as error:
        if not _names_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error


@contextmanager
def _raise_on_corruption(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Converts what Orbax, TensorStore or JSON raise on reading to an `InputError`."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        checkpoint = Path(manager.directory, str(step))
        for path in (checkpoint, *checkpoint.rglob("*")):
            if not os.access(path, os.R_OK):
                raise InputError(f"{path} is not readable: change its permissions.") from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # TensorStore's message starts with the kind of error, and a long location follows.
        reason = str(cause).partition("\n")[0].partition(": Error")[0]
        reason = textwrap.shorten(reason, 120, placeholder=" …")
        older = [other for other in manager.all_steps() if other < step]
        remedy = f"resume from {max(older)}" if older else "start from the beginning"
        raise InputError(
            f"the checkpoint {checkpoint} is damaged ({reason}): move it out of "
            f"{checkpoint.parent} to {remedy}."
        ) from error


def _names_full_disk(error: BaseException | None) -> bool:
    return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


class _FullDiskFilter(logging.Filter):
    """Drops the tracebacks that each thread and task of a failed save logs, some much later."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and _names_full_disk(record.exc_info[1]))


_FULL_DISK_FILTER = _FullDiskFilter()


def _silence_duplicate_errors() -> None:
    """Silences the reports that accompany the exception of a failed save or restore.

    TensorStore reports each read or write that ends after Orbax has closed its event loop, and
    Python each coroutine that waited for one, some only at the end of the process. So the filters
    are never removed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_FULL_DISK_FILTER)
    hook = sys.unraisablehook
    if getattr(hook, "hides_orbax", False):
        return

    def report(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        is_of_orbax = code is not None and "orbax" in code.co_filename
        if not is_of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    report.hides_orbax = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = report
