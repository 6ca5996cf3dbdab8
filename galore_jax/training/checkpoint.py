"""Checkpoints: asynchronous, complete or absent, with the place in the data and the configuration.

The one file that knows Orbax. A checkpoint is `checkpoints/<step>/` with four items: `params`,
`optimizer`, `data` (the iterator's state) and `meta` (the configuration, and checksums of all
four), named by the number of updates made. Orbax writes into a temporary sibling and renames it at
the end.
"""

import errno
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
import jax.numpy as jnp
import orbax.checkpoint as ocp

from galore_jax.errors import InputError
from galore_jax.training.checksum import json_checksum, tree_checksum
from galore_jax.training.config import Config
from galore_jax.training.config_file import from_dict, to_dict
from galore_jax.training.run_folder import RunFolder, refuse_other_run
from galore_jax.training.state import TrainState, init_state


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Args:
      folder: the run's checkpoints/.
      keep: how many of the latest stay; an older one goes after the newer is complete.

    Raises:
      InputError: the folder cannot be written to.
      FileExistsError: it is a file.
    """

    def __init__(self, folder: Path, keep: int):
        _quieten_failures()
        self.folder = folder.absolute()
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
            stack.enter_context(_full_disk_told(self.folder))
            stack.callback(self._manager.close)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.close()

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, batches: grain.DatasetIterator, config: Config) -> None:
        """Starts saving; returns once the state is copied, so that it may be donated.

        Raises:
          OSError: the disk is full, now or at the save before (ENOSPC).
        """
        recorded = to_dict(config)
        checksums = {
            "params": tree_checksum(state.params),
            "optimizer": tree_checksum(state.opt_state),
            "data": json_checksum(batches.get_state()),
            "config": json_checksum(recorded),
        }
        with _full_disk_told(self.folder):
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    data=grain.checkpoint.CheckpointSave(batches),
                    meta=ocp.args.JsonSave({"config": recorded, "checksums": checksums}),
                ),
            )

    def wait(self) -> None:
        """Returns once the save is complete.

        Raises:
          OSError: the disk is full (ENOSPC).
        """
        with _full_disk_told(self.folder):
            self._manager.wait_until_finished()

    def restore(self, config: Config, batches: grain.DatasetIterator) -> TrainState:
        """The latest state; `batches` goes on where the run was.

        Raises:
          InputError: the checkpoint is of another model or another optimizer, or is damaged.
        """
        step = self.latest()
        assert step is not None, "there is no checkpoint to restore"
        recorded, checksums = _restore_meta(self._manager, step)
        refuse_other_run(recorded, config, self.folder)
        target = _on_this_device(jax.eval_shape(lambda: init_state(config)))
        with _damage_told(self._manager, step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(target.params),
                    optimizer=ocp.args.StandardRestore(target.opt_state),
                    data=grain.checkpoint.CheckpointRestore(batches),
                ),
            )
            _compare("a parameter", checksums.get("params"), tree_checksum(restored["params"]))
            _compare(
                "the optimizer's state",
                checksums.get("optimizer"),
                tree_checksum(restored["optimizer"]),
            )
            _compare(
                "the place in the data", checksums.get("data"), json_checksum(batches.get_state())
            )
        return TrainState(restored["params"], restored["optimizer"], jnp.asarray(step, jnp.int32))


def load_for_inference(folder: str | Path) -> tuple[Config, Any, int]:
    """Reads the model out of a run's latest checkpoint, and leaves the optimizer's state on disk.

    Args:
      folder: of the run.

    Returns:
      The run's configuration, the parameters, and the number of updates they have had.

    Raises:
      InputError: the folder holds no checkpoint, or a damaged one.
    """
    checkpoints = RunFolder(folder).checkpoints.absolute()
    if not checkpoints.is_dir():
        raise InputError(f"{folder} holds no checkpoints/: give the folder of a training run.")
    _quieten_failures()
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(checkpoints, options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{checkpoints} holds no complete checkpoint: let the run reach one.")
        config, checksums = _restore_meta(manager, step)
        target = _on_this_device(jax.eval_shape(lambda: init_state(config)).params)
        with _damage_told(manager, step):
            arguments = ocp.args.Composite(params=ocp.args.StandardRestore(target))
            params = manager.restore(step, args=arguments)["params"]
            _compare("a parameter", checksums.get("params"), tree_checksum(params))
        return config, params, step


def _on_this_device(abstract: Any) -> Any:
    """Without a sharding Orbax would look for the very device that saved the checkpoint."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract
    )


def _restore_meta(manager: ocp.CheckpointManager, step: int) -> tuple[Config, dict[str, int]]:
    """The configuration, and the checksums; none in checkpoints from before there were any."""
    with _damage_told(manager, step):
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = manager.restore(step, args=arguments)["meta"]
        checksums = meta.get("checksums", {})
        _compare("the configuration", checksums.get("config"), json_checksum(meta["config"]))
        return from_dict(meta["config"]), checksums


def _compare(what: str, saved: int | None, restored: int) -> None:
    if saved is not None and saved != restored:
        raise ValueError(f"{what} differs from what was saved")


def _remove_unfinished(folder: Path) -> None:
    for unfinished in folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """BasisUpdates TensorStore's ValueError about a full disk into the OSError that it is."""
    try:
        yield
    except ValueError as error:
        if not _names_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error


@contextmanager
def _damage_told(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Whatever Orbax, TensorStore or JSON raise on reading becomes a sentence with the remedy."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        checkpoint = Path(manager.directory, str(step))
        for path in (checkpoint, *checkpoint.rglob("*")):
            if not os.access(path, os.R_OK):
                raise InputError(f"{path} may not be read: change its permissions.") from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # TensorStore's kind of error comes before a long account of where it was.
        reason = str(cause).partition("\n")[0].partition(": Error")[0]
        reason = textwrap.shorten(reason, 120, placeholder=" …")
        older = [other for other in manager.all_steps() if other < step]
        remedy = f"go on from {max(older)}" if older else "start from the beginning"
        raise InputError(
            f"the checkpoint {checkpoint} is damaged ({reason}): move it out of "
            f"{checkpoint.parent} to {remedy}."
        ) from error


def _names_full_disk(error: BaseException | None) -> bool:
    return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


class _FullDiskFilter(logging.Filter):
    """Drops the tracebacks that every thread and task of a failed save logs, some much later."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and _names_full_disk(record.exc_info[1]))


_FULL_DISK_FILTER = _FullDiskFilter()


def _quieten_failures() -> None:
    """Leaves of a failed save or restore the one exception that it raises.

    TensorStore reports every read and write that ends after Orbax has closed its event loop, and
    Python every coroutine that waited for one, some only when the process ends. Hence this stays.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_FULL_DISK_FILTER)
    hook = sys.unraisablehook
    if getattr(hook, "hides_leftovers", False):
        return

    def report(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        is_leftover = code is not None and "orbax" in code.co_filename
        if not is_leftover and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    report.hides_leftovers = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = report
