"""Checkpoints: asynchronous, complete or absent, with the place in the data and the configuration.

The one file that knows Orbax. A checkpoint is `checkpoints/<step>/` with four items: `params`,
`optimizer`, `data` (the iterator's state) and `meta` (the configuration), named by the number of
updates made. Orbax writes into a temporary sibling and renames it at the end.
"""

import errno
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from galore_jax.errors import InputError
from galore_jax.training.config import Config, from_dict, to_dict
from galore_jax.training.folder import RunFolder, refuse_other_run
from galore_jax.training.step import TrainState, init_state


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Args:
      folder: the run's checkpoints/.
      keep: how many of the latest stay; an older one goes after the newer is complete.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        _remove_unfinished(self.folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(_quiet_failures())
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
        with _full_disk_told(self.folder):
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    data=grain.checkpoint.CheckpointSave(batches),
                    meta=ocp.args.JsonSave({"config": to_dict(config)}),
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
        step = self._manager.latest_step()
        refuse_other_run(_recorded_config(self._manager, step), config, self.folder)
        target = _on_this_device(jax.eval_shape(lambda: init_state(config)))
        with _damage_told(self.folder / str(step)):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(target.params),
                    optimizer=ocp.args.StandardRestore(target.opt_state),
                    data=grain.checkpoint.CheckpointRestore(batches),
                ),
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
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(checkpoints, options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{checkpoints} holds no complete checkpoint: let the run reach one.")
        config = _recorded_config(manager, step)
        target = _on_this_device(jax.eval_shape(lambda: init_state(config)).params)
        with _damage_told(checkpoints / str(step)):
            arguments = ocp.args.Composite(params=ocp.args.StandardRestore(target))
            return config, manager.restore(step, args=arguments)["params"], step


def _on_this_device(abstract: Any) -> Any:
    """Without a sharding Orbax would look for the very device that saved the checkpoint."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract
    )


def _recorded_config(manager: ocp.CheckpointManager, step: int | None) -> Config:
    with _damage_told(Path(manager.directory, str(step))):
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return from_dict(manager.restore(step, args=arguments)["meta"]["config"])


def _remove_unfinished(folder: Path) -> None:
    for unfinished in folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """Turns TensorStore's ValueError about a full disk into the OSError that it is."""
    try:
        yield
    except ValueError as error:
        if not _names_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error


@contextmanager
def _damage_told(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the checkpoint {checkpoint} cannot be read ({reason}): move it away to go on from "
            "the one before."
        ) from error


def _names_full_disk(error: BaseException | None) -> bool:
    return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


class _FullDiskFilter(logging.Filter):
    """Drops the tracebacks that every thread and task of a failed save logs, some much later."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and _names_full_disk(record.exc_info[1]))


_FULL_DISK_FILTER = _FullDiskFilter()


@contextmanager
def _quiet_failures() -> Iterator[None]:
    """Leaves of a failed save the one exception that `wait` raises.

    TensorStore reports every write that ends after Orbax has closed its event loop.
    """

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_FULL_DISK_FILTER)
    hook, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield
    finally:
        sys.unraisablehook = hook
