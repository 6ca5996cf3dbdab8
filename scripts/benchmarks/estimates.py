"""Programs compiled for a device that is absent, with an estimate of their time and work."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from analysis.compile_targets import TARGETS, place, target
from analysis.estimate import Estimate, estimate
from analysis.memory import compile_fitting
from tqdm import tqdm

from benchmarks import Row
from benchmarks.baselines import Baseline, Loss
from galore_jax.types import PyTree

# Rows and columns of the matrices of the calibration.
SIDE = 8192


def estimate_steps(
    chosen: Sequence[Baseline], loss: Loss, start: Callable[[], tuple[PyTree, PyTree]], device: str
) -> list[Row]:
    """A row for each baseline, relative to the first one, and two with the calibration.

    Args:
      chosen: the baselines.
      loss: of parameters and a batch.
      start: makes parameters and a batch; only their shapes are used.
      device: a key of `compile_targets.TARGETS`.

    Raises:
      DoesNotFit: the compiler refuses a program that is larger than the memory of the device.
    """
    rows: list[Row] = []
    with target(device) as sharding, jax.set_mesh(None):
        params, batch = jax.eval_shape(start)
        for one in tqdm(chosen, f"compiling for {TARGETS[device].name}"):
            arguments = params, jax.eval_shape(one.init, params), batch
            step = jax.jit(functools.partial(one.step, loss), donate_argnums=(0, 1))
            compiled = compile_fitting(step.lower(*place(arguments, sharding)))
            rows.append({"name": one.name, **figures(compiled, device)})
        rows = [with_ratios(row, rows[0]) for row in rows]
        return rows + calibration(device, sharding)


def figures(compiled: Any, device: str) -> Row:
    """Estimated milliseconds, and work and memory as the program is compiled."""
    found = estimate(compiled.as_text(), TARGETS[device])
    row: Row = {
        "ms": 1e3 * found.seconds,
        "gflop": found.flops / 1e9,
        "gb": found.bytes / 1e9,
        "copied_gb": found.copied / 1e9,
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    if found.without_time:
        row["without_time"] = ", ".join(f"{n} {name}" for name, n in found.without_time.items())
    return row


def with_ratios(row: Row, base: Row) -> Row:
    """The row with each figure followed by its ratio to that of `base`."""
    found: Row = {}
    for key, value in row.items():
        found[key] = value
        if isinstance(value, float):
            found[f"{key}_ratio"] = value / base[key] if base[key] else None
    return found


def calibration(device: str, sharding: jax.sharding.NamedSharding) -> list[Row]:
    """Rows with the part of the published peak at which two simple programs are estimated."""
    product = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16)
    array = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
    rows = []
    for name, f, argument in (
        (f"bfloat16 product, {SIDE}³", jnp.matmul, product),
        (f"float32 sum, {SIDE}²", jnp.add, array),
    ):
        compiled: Any = jax.jit(f).lower(*place((argument, argument), sharding)).compile()
        found = estimate(compiled.as_text(), TARGETS[device])
        rows.append({"name": name, "ms": 1e3 * found.seconds, "of_peak": of_peak(found, device)})
    return rows


def of_peak(found: Estimate, device: str) -> float:
    """The part of the peak of products, or of the bandwidth, that an estimate amounts to."""
    least = max(found.flops / TARGETS[device].peak, found.bytes / TARGETS[device].bandwidth)
    return least / found.seconds
