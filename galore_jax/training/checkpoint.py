"""Checkpoints: atomic, with the position in the data and the configuration.

This is the only file that saves and restores with Orbax. A checkpoint is `checkpoints/<number of
updates>/` with four items: `params`, `optimizer`, `data` (the iterator's state) and `meta` (the
configuration, the step, and checksums of all four). Orbax writes to a temporary folder, in the
background except on CPUs, and renames it at the end. Each process writes the parts of the arrays on
its devices, and process 0 everything else. Another number of processes, on another mesh, can read
it.
"""

import dataclasses
import glob
import json
import logging
import sys
import textwrap
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax import lax
from jax.sharding import Mesh

from galore_jax.errors import InputError, names_full_disk
from galore_jax.models.adapters import merged
from galore_jax.ops.int8 import Int8, is_int8
from galore_jax.subspace.matrix_view import named_leaves, path_names
from galore_jax.training.config import Config
from galore_jax.training.config_file import AnyConfig
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.processes import ending_together
from galore_jax.training.run_folder import RunFolder, check_same_run
from galore_jax.training.state import TrainState, abstract_state, is_finite
from galore_jax.training.task import Task
from galore_jax.types import ReadPart

# How many of the latest checkpoints are kept: the one before the last is there if that is damaged.
KEPT = 2


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Args:
      folder: the run's checkpoints/.

    Raises:
      InputError: Orbax cannot use the name of the folder.
      OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path):
        _silence_duplicate_errors()
        self.folder = folder.absolute()
        if glob.escape(str(self.folder)) != str(self.folder):  # Orbax finds its files by glob.
            raise InputError(
                f"{self.folder} has a *, ? or [ in its path, where checkpoints cannot be saved: "
                "name another training.folder."
            )
        with ending_together():
            self.folder.mkdir(parents=True, exist_ok=True)
        # On CPUs Orbax reads the arrays where they lie, and a step that began before it is done
        # would have to work on a copy of the state.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=jax.default_backend() != "cpu",
        )
        # Without compression, which saves little of such numbers, nothing is copied to be written.
        arrays = lambda: ocp.PyTreeCheckpointHandler(use_compression=False)
        handlers = {
            "params": arrays(),
            "optimizer": arrays(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, batches: Any, config: Any) -> bool:
        """Starts to save; returns as soon as the state is copied and may be donated.

        A state that is not finite is not saved, as it would replace a finite one.

        Returns:
          Whether it is saved.

        Raises:
          Exception: the disk is full, now or during the previous save (`names_full_disk`).
        """
        if not is_finite(state):
            return False
        step, position = int(state.step), batches.get_state()
        meta = {"config": dataclasses.asdict(config), "step": step}
        checksums = {
            "params": checksum(jax.tree.leaves(state.params)),
            "optimizer": checksum(jax.tree.leaves(state.opt_state)),
            "data": json_checksum(position),
            "meta": json_checksum(meta),
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(state.params),
                optimizer=ocp.args.PyTreeSave(state.opt_state),
                data=ocp.args.JsonSave(position),
                meta=ocp.args.JsonSave(meta | {"checksums": checksums}),
            ),
        )
        return True

    def wait(self) -> None:
        """Waits until the save is complete; raises what `save` does."""
        self._manager.wait_until_finished()

    def restore(self, task: Task, batches: Any, mesh: Mesh | None = None) -> TrainState:
        """The latest state, on a mesh or a device, from whatever mesh or device it was saved.

        `batches` continues from the run's position.

        Raises:
          InputError: the checkpoint is of another configuration, or is damaged.
        """
        step = self.latest()
        assert step is not None, "there is no checkpoint to restore"
        recorded, checksums = _restore_meta(self._manager, step, type(task.config))
        check_same_run(recorded, task.config, self.folder)
        target = _on_devices(abstract_state(task, mesh))
        folder = self._manager.directory / str(step)
        data = ocp.args.Composite(data=ocp.args.JsonRestore())
        with _naming_damage(self._manager, step):
            params = _restore_arrays(folder / "params", target.params)
            opt_state = _restore_arrays(folder / "optimizer", target.opt_state)
            position = self._manager.restore(step, args=data)["data"]
            _check_checksum("params", checksums, checksum(jax.tree.leaves(params)))
            _check_checksum("optimizer", checksums, checksum(jax.tree.leaves(opt_state)))
            _check_checksum("data", checksums, json_checksum(position))
        batches.set_state(position)
        count = jax.device_put(np.int32(step), target.step.sharding)
        seed = jax.device_put(np.uint32(task.config.training.seed), target.seed.sharding)
        return TrainState(params, opt_state, count, seed)


@contextmanager
def open_parameters(folder: str | Path) -> Iterator[tuple[Config, ReadPart]]:
    """Opens the parameters of a run's latest checkpoint, to read them part by part.

    One parameter, a whole stack of layers, is in memory at a time; with a kernel its adapters.

    Args:
      folder: the folder of the run.

    Yields:
      The run's configuration, with plain weights, and the function that reads the parameters, with
      adapters merged into the kernels.

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
            raise InputError(
                f"{checkpoints} holds no complete checkpoint: let the run reach one. A run that "
                "diverged before its first one has none."
            )
        config, checksums = _restore_meta(manager, step, Config)
        adapter = config.optimizer.adapter
        shapes = abstract_state(Pretraining(config)).params
        in_int8 = {"/".join(names): leaf for names, leaf in named_leaves(shapes) if is_int8(leaf)}
        config = dataclasses.replace(config, model=config.model.plain)
        files = {"driver": "file", "path": f"{checkpoints}/{step}/params/"}

        # A merged kernel is made of three arrays, of which two are small, as are scales.
        @lru_cache(maxsize=2 if adapter is None else 3)
        def stored(path: str) -> np.ndarray:
            name = path.replace("/", ".")  # as Orbax names it
            kvstore = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
            array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
            return array.read().result()

        def read(path: str, index: tuple[slice, ...]) -> np.ndarray:
            with _naming_damage(manager, step):
                if path not in in_int8:
                    return stored(path)[index]
                codes, scales = (stored(f"{path}/{name}") for name in ("codes", "scales"))
                part = Int8(codes[index], scales[(*index[:-1], slice(None))], in_int8[path].dtype)
                return np.asarray(part.unbox())

        # A damaged checkpoint must not become a model, so everything is read once before that.
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        paths = ["/".join(path_names(path)) for path, _ in leaves]
        with _naming_damage(manager, step):
            _check_checksum("params", checksums, checksum(map(stored, paths)))
        yield config, read if adapter is None else merged(read, adapter)


def _restore_arrays(folder: Any, target: Any) -> Any:
    """The arrays of an item, from its folder as Orbax names it."""
    # How many are read at a time, and so lie in memory twice: at least the largest has to.
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return handler.restore(folder, args=ocp.args.PyTreeRestore(target, restore_args=restore_args))


def _on_devices(abstract: Any) -> Any:
    """Adds missing shardings, without which Orbax looks for the device that saved the array."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding is not None else leaf.update(sharding=here), abstract
    )


def _restore_meta(
    manager: ocp.CheckpointManager, step: int, kind: type[AnyConfig]
) -> tuple[AnyConfig, dict[str, int]]:
    """The configuration and the checksums."""
    with _naming_damage(manager, step):
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = manager.restore(step, args=arguments)["meta"]
        checksums = meta.pop("checksums")
        _check_checksum("meta", checksums, json_checksum(meta))
        if meta["step"] != step:
            raise InputError(
                f"{Path(manager.directory, str(step))} is the checkpoint of step {meta['step']}: "
                f"rename it to {meta['step']}, or delete it."
            )
        return kind(**meta["config"]), checksums


def _check_checksum(item: str, saved: dict[str, int], found: int) -> None:
    if saved[item] != found:
        raise ValueError(f"its {item} differs from what was saved")


@contextmanager
def _naming_damage(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Converts what Orbax, TensorStore or JSON raise on reading to an `InputError`."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # TensorStore's message starts with the kind of error, and a long location follows.
        reason = str(cause).partition("\n")[0].partition(": Error")[0]
        reason = textwrap.shorten(reason, 120, placeholder=" …")
        older = [other for other in manager.all_steps() if other < step]
        remedy = f"resume from {max(older)}" if older else "start from the beginning"
        raise InputError(
            f"the checkpoint {Path(manager.directory, str(step))} is damaged or not readable "
            f"({reason}): move it out of {manager.directory} to {remedy}."
        ) from error


def checksum(leaves: Iterable[Any]) -> int:
    """A 32-bit checksum of all bits of arrays, computed on their device and one after another.

    Orbax verifies its indices, but not the arrays themselves.

    Args:
      leaves: arrays, of JAX or NumPy, with elements of 1, 2 or 4 bytes.
    """
    sums = [int(_weighted_sum(leaf, _is_summed_by_parts(leaf))) for leaf in leaves]
    return zlib.crc32(np.array(sums, np.uint32).tobytes())


def _is_summed_by_parts(leaf: Any) -> bool:
    """Whether to sum along the first axis, one index after another.

    On a CPU, XLA would otherwise store the weighted bits of all elements, four bytes each.
    """
    is_whole = not isinstance(leaf, jax.Array) or len(leaf.devices()) == 1
    return is_whole and leaf.ndim > 1 and jax.default_backend() == "cpu"


def json_checksum(value: Any) -> int:
    """A 32-bit checksum of a JSON value."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@partial(jax.jit, static_argnames="by_parts")
def _weighted_sum(leaf: jax.Array, by_parts: bool) -> jax.Array:
    """The sum, modulo 2³², of the elements' bits times odd weights: uint32 ().

    With odd weights the sum detects every change of a single element. With a different weight at
    each position it also detects most exchanges of two unequal elements.
    """

    def sum_from(first: Any, part: jax.Array) -> jax.Array:
        """Of a part whose first element has this position."""
        if part.dtype == bool:
            part = part.astype(np.uint8)
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[part.dtype.itemsize]
        bits = lax.bitcast_convert_type(part, unsigned).astype(jnp.uint32)
        position = jnp.zeros(part.shape, jnp.uint32)
        for axis, size in enumerate(part.shape):
            along = lax.broadcasted_iota(jnp.uint32, part.shape, axis)
            position = position * np.uint32(size) + along
        return jnp.sum(bits * (2 * (first + position) + 1), dtype=jnp.uint32)

    if not by_parts:
        return sum_from(np.uint32(0), leaf)
    size = np.uint32(leaf[0].size)
    add = lambda i, total: total + sum_from(i.astype(jnp.uint32) * size, leaf[i])
    return lax.fori_loop(0, len(leaf), add, jnp.uint32(0))


def _silence_duplicate_errors() -> None:
    """Silences the reports that accompany the exception of a failed save or restore.

    Each thread and task of a save logs that the disk is full; TensorStore reports each read or
    write that ends after Orbax has closed its event loop, and Python each coroutine that waited for
    one or has not begun. Some do so only at the end of the process, so the filters are never
    removed.
    """
    hook = sys.unraisablehook
    if getattr(hook, "hides_orbax", False):
        return

    def is_of_no_full_disk(record: logging.LogRecord) -> bool:
        return not (record.exc_info and names_full_disk(record.exc_info[1]))

    def report(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        is_of_orbax = code is not None and "orbax" in code.co_filename
        if not is_of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_of_no_full_disk)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    report.hides_orbax = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = report
