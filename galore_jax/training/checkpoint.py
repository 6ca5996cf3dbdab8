"""Checkpoints: asynchronous and atomic, with the position in the data and the configuration.

This is the only file that saves and restores with Orbax. A checkpoint is `checkpoints/<number of
updates>/` with four items: `params`, `optimizer`, `data` (the iterator's state) and `meta` (the
configuration, and checksums of all four); of a model that was not trained here it has `params` and
`meta` alone. Orbax writes to a temporary folder, which it renames at the end. Each process writes
the parts of the arrays that lie on its devices, and process 0 everything else, so that another
number of processes, on another mesh, can read it.
"""

import asyncio
import glob
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Mesh

from galore_jax.errors import InputError
from galore_jax.models.adapters import merge
from galore_jax.training.checkpoint_errors import (
    raise_on_corruption,
    raise_on_full_disk,
    silence_duplicate_errors,
)
from galore_jax.training.checksum import host_checksum, json_checksum, tree_checksum
from galore_jax.training.config import Config
from galore_jax.training.config_file import from_dict, to_dict
from galore_jax.training.processes import ending_together, is_first
from galore_jax.training.run_folder import RunFolder, check_same_run
from galore_jax.training.state import TrainState, abstract_state, is_finite
from galore_jax.types import ReadPart


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Args:
      folder: the run's checkpoints/.
      keep: how many of the latest to keep; an older one is deleted after the newer is complete.

    Raises:
      InputError: the folder cannot be written to, or Orbax cannot use its name.
      FileExistsError: it is a file.
    """

    def __init__(self, folder: Path, keep: int):
        silence_duplicate_errors()
        self.folder = folder.absolute()
        _check_is_no_pattern(self.folder)
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
            stack.enter_context(raise_on_full_disk(self.folder))
            stack.callback(self._manager.close)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.close()

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, batches: grain.DatasetIterator, config: Config) -> bool:
        """Starts to save; returns as soon as the state is copied and may be donated.

        A state that is not finite is not saved: it would replace one that is.

        Returns:
          Whether it is saved.

        Raises:
          OSError: the disk is full, now or during the previous save (ENOSPC).
        """
        if not is_finite(state):
            return False
        recorded, position = to_dict(config), batches.get_state()
        checksums = {
            "params": tree_checksum(state.params),
            "optimizer": tree_checksum(state.opt_state),
            "data": json_checksum(position),
            "config": json_checksum(recorded),
        }
        with raise_on_full_disk(self.folder):
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    data=ocp.args.JsonSave(position),
                    meta=ocp.args.JsonSave({"config": recorded, "checksums": checksums}),
                ),
            )
        return True

    def wait(self) -> None:
        """Waits until the save is complete.

        Raises:
          OSError: the disk is full (ENOSPC).
        """
        with raise_on_full_disk(self.folder):
            self._manager.wait_until_finished()

    def restore(
        self, config: Config, batches: grain.DatasetIterator, mesh: Mesh | None = None
    ) -> TrainState:
        """The latest state, on a mesh or a single device, whatever device or mesh it was saved on.

        `batches` is set to continue where the run was.

        Raises:
          InputError: the checkpoint is of another configuration, is damaged, or holds parameters
            only.
        """
        step = self.latest()
        assert step is not None, "there is no checkpoint to restore"
        if step == 0 and not (self.folder / str(step) / "optimizer").exists():
            raise InputError(
                f"{self.folder / str(step)} holds parameters but no optimizer to resume: start a "
                "training in another training.folder, with model.checkpoint=FOLDER for the folder "
                "that they were converted from."
            )
        recorded, checksums = _restore_meta(self._manager, step)
        check_same_run(recorded, config, self.folder)
        target = _on_devices(abstract_state(config, mesh))
        with raise_on_corruption(self._manager, step):
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
      The run's configuration, the parameters, with adapters merged into the kernels, and the number
      of updates made.

    Raises:
      InputError: the folder holds no checkpoint, or its latest one is damaged.
    """
    with _latest(folder) as (manager, step):
        config, checksums = _restore_meta(manager, step)
        target = _on_devices(abstract_state(config).params)
        with raise_on_corruption(manager, step):
            arguments = ocp.args.Composite(params=ocp.args.StandardRestore(target))
            params = manager.restore(step, args=arguments)["params"]
            _check_checksum("a parameter", checksums.get("params"), tree_checksum(params))
        return config, merge(params, config.optimizer.adapter), step


@contextmanager
def open_parameters(folder: str | Path) -> Iterator[tuple[Config, ReadPart]]:
    """Opens the parameters of a run's latest checkpoint, to read them part by part.

    Checkpoints of `save_parameters` are stored layer by layer, so that a part of one layer needs no
    more memory than that; of others a whole stack of layers is held.

    Args:
      folder: the folder of the run.

    Yields:
      The run's configuration, and the function that reads. Adapters are apart from the kernels.

    Raises:
      InputError: the folder holds no checkpoint, or its latest one is damaged.
    """
    with _latest(folder) as (manager, step):
        config, checksums = _restore_meta(manager, step)
        files = {"driver": "file", "path": f"{manager.directory}/{step}/params/"}

        # A merged kernel is made of three parameters, of which two are small.
        @lru_cache(maxsize=1 if config.optimizer.adapter is None else 3)
        def opened(path: str) -> Any:
            name = path.replace("/", ".")  # as Orbax names it
            kvstore = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
            array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
            chunk: Any = array.chunk_layout.read_chunk.shape
            # A stack that is stored in one piece is decoded once, not for each of its layers.
            return array if chunk[0] == 1 else array.read().result()

        def read(path: str, index: tuple[slice, ...]) -> np.ndarray:
            with raise_on_corruption(manager, step):
                return np.asarray(opened(path)[index])

        # A damaged checkpoint must not become a model, so everything is read once before that.
        if (saved := checksums.get("params")) is not None:
            leaves = jax.tree_util.tree_leaves_with_path(abstract_state(config).params)
            paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
            with raise_on_corruption(manager, step):
                found = host_checksum(np.asarray(opened(path)) for path in paths)
                _check_checksum("a parameter", saved, found)
        yield config, read


def save_parameters(folder: Path, config: Config, read: ReadPart) -> None:
    """Saves a model as the checkpoint of step 0, holding no more than one part of it in memory.

    A part is a layer of a stack, or a parameter outside of the layers.

    Args:
      folder: a run's checkpoints/.
      config: the configuration of the run.
      read: reads the parts.

    Raises:
      InputError: Orbax cannot use the name of the folder.
      OSError: the disk is full (ENOSPC).
    """
    _check_is_no_pattern(folder.absolute())

    def streamed(path: Any, leaf: Any) -> _Streamed:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _Streamed(leaf.shape, leaf.dtype, name.startswith("layers/"), partial(read, name))

    params = jax.tree_util.tree_map_with_path(streamed, abstract_state(config).params)
    chunks = jax.tree.map(
        lambda leaf: ocp.SaveArgs(shard_axes=(0,) if leaf.is_stack else ()), params
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Streamed, _StreamedHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    recorded = to_dict(config)
    meta = {"config": recorded, "checksums": {"config": json_checksum(recorded)}}
    folder = folder.absolute()
    silence_duplicate_errors()
    # Orbax gives up after 20 minutes, and here they include the time to read the parts.
    patient = ocp.options.AsyncOptions(timeout_secs=7 * 24 * 3600)
    options = ocp.CheckpointManagerOptions(async_options=patient)
    try:
        with (
            raise_on_full_disk(folder),
            ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager,
        ):
            arguments = ocp.args.Composite(
                params=ocp.args.PyTreeSave(params, save_args=chunks), meta=ocp.args.JsonSave(meta)
            )
            manager.save(0, args=arguments)
            manager.wait_until_finished()
    finally:
        _remove_unfinished(folder)


@dataclass(frozen=True)
class _Streamed:
    """A parameter whose parts are read when they are written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_stack: bool
    read: Callable[[tuple[slice, ...]], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def indices(self) -> Iterator[tuple[slice, ...]]:
        """The parts: slices of all axes."""
        everything = tuple(slice(0, size) for size in self.shape)
        if not self.is_stack:
            yield everything
            return
        for layer in range(self.shape[0]):
            yield (slice(layer, layer + 1), *everything[1:])


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `_Streamed` parameter as the array that it stands for, one part after another."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._one_part = asyncio.Lock()

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        spec = tensorstore.Spec(tspec)
        array = await tensorstore.open(spec, create=True, open=True, context=ts_context)
        for index in value.indices():
            async with self._one_part:
                await array[index].write(value.read(index))


@contextmanager
def _latest(folder: str | Path) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """A manager of a run's checkpoints, and the step of the latest one."""
    checkpoints = RunFolder(folder).checkpoints.absolute()
    if not checkpoints.is_dir():
        raise InputError(f"{folder} holds no checkpoints/: give the folder of a training run.")
    silence_duplicate_errors()
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(checkpoints, options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(
                f"{checkpoints} holds no complete checkpoint: let the run reach one. A run that "
                "diverged before its first one has none."
            )
        yield manager, step


def _on_devices(abstract: Any) -> Any:
    """Adds a sharding where there is none: Orbax would look for the device that saved the array."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding is not None else leaf.update(sharding=here), abstract
    )


def _restore_meta(manager: ocp.CheckpointManager, step: int) -> tuple[Config, dict[str, int]]:
    """The configuration and the checksums."""
    with raise_on_corruption(manager, step):
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = manager.restore(step, args=arguments)["meta"]
        checksums = meta["checksums"]
        _check_checksum("the configuration", checksums.get("config"), json_checksum(meta["config"]))
        return from_dict(meta["config"]), checksums


def _restore_position(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The state of the iterator of batches."""
    return manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]


def _check_checksum(what: str, saved: int | None, restored: int) -> None:
    if saved is not None and saved != restored:
        raise ValueError(f"{what} differs from what was saved")


def _check_is_no_pattern(folder: Path) -> None:
    """Raises an `InputError` for a path that Orbax, which merges its files by glob, would miss."""
    if glob.escape(str(folder)) != str(folder):
        raise InputError(
            f"{folder} has one of the characters *, ? and [ in its path, with which checkpoints "
            "cannot be saved: name another training.folder."
        )


def _remove_unfinished(folder: Path) -> None:
    if not is_first():
        return
    for unfinished in folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
