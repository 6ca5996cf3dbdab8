"""`kernels`: 8-bit Adam and the lift in plain JAX and as kernels, first whether they are equal."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from analysis.compile_targets import place, target

from benchmarks import CONFIGS, SIZES, Row
from benchmarks.baselines import rank_of
from benchmarks.estimates import figures
from benchmarks.timing import interleaved
from galore_jax.errors import require_choice
from galore_jax.ops.adam_step import adam_8bit
from galore_jax.ops.implementation import IMPLEMENTATIONS, use_implementation
from galore_jax.ops.lift import lift_and_add
from galore_jax.ops.quantization import as_float32, quantize
from galore_jax.training.config_file import load_config
from galore_jax.types import PyTree

# Relative to the largest number of a result: one unit in the last place of bfloat16.
TOLERANCE = 2**-7


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: an unknown size.
    """

    size: str = "350m"
    repeats: int = 21
    device: str = ""

    def __post_init__(self):
        require_choice("size", self.size, SIZES)


class Case(NamedTuple):
    """An operation, a function that makes its arguments, and which it overwrites in a training."""

    operation: Callable[..., Any]
    use: Callable[..., PyTree]
    start: Callable[[], tuple[PyTree, ...]]
    donated: tuple[int, ...]


def measure(settings: Settings) -> list[Row]:
    """The rows for the gate projection of a model; of its kernels too where there are any."""
    config = load_config(CONFIGS / f"llama_{settings.size}.toml")
    model, rank = config.model, rank_of(config)
    chosen = cases(model.hidden_size, model.intermediate_size, rank)
    if settings.device:
        return estimated(chosen, settings.device)
    names = IMPLEMENTATIONS if jax.default_backend() != "cpu" else ("xla",)
    return [row for name, case in chosen.items() for row in timed(name, case, names, settings)]


def cases(rows: int, columns: int, rank: int) -> dict[str, Case]:
    """8-bit Adam of coordinates (rank, columns), and lifts added to weights (rows, columns)."""
    key = jax.random.key

    def moments() -> tuple[PyTree, ...]:
        gradient, mu, nu = jax.random.normal(key(0), (3, rank, columns))
        moments = quantize(mu, "signed", axis=-2), quantize(nu**2, "unsigned", axis=-2)
        return gradient, *moments, jnp.int32(10)

    def factors() -> tuple[PyTree, ...]:
        weights = jax.random.normal(key(0), (rows, columns), jnp.bfloat16)
        left = jax.random.normal(key(1), (rows, rank), jnp.bfloat16)
        right = jax.random.normal(key(2), (rank, columns))
        return weights, left, right, jnp.float32(1e-3), jnp.float32(1e-4)

    def seeded() -> tuple[PyTree, ...]:
        return *factors(), jnp.array([3, 5], jnp.uint32)

    adam = lambda f, *arguments: f(*arguments, b1=0.9, b2=0.999, eps=1e-8)
    lift = lambda f, *arguments: f(*arguments)
    return {
        f"adam_8bit {rank}×{columns}": Case(adam_8bit, adam, moments, (1, 2)),
        f"lift {rows}×{columns}, rank {rank}, nearest": Case(lift_and_add, lift, factors, (0,)),
        f"lift {rows}×{columns}, rank {rank}, stochastic": Case(lift_and_add, lift, seeded, (0,)),
    }


def program(case: Case, implementation: Any) -> jax.stages.Wrapped:
    """The operation as a jitted function."""
    run = functools.partial(use_implementation, implementation, case.operation, case.use)
    return jax.jit(run, donate_argnums=case.donated)


def estimated(chosen: dict[str, Case], device: str) -> list[Row]:
    """The rows for an absent device."""
    rows: list[Row] = []
    # The mesh stays set: what kernel there is depends on its device.
    with target(device) as sharding:
        for name, case in chosen.items():
            arguments = place(jax.eval_shape(case.start), sharding)
            for implementation in IMPLEMENTATIONS:
                compiled = program(case, implementation).lower(*arguments).compile()
                row: Row = {"name": name, "implementation": implementation}
                rows.append(row | figures(compiled, device))
    return rows


def timed(name: str, case: Case, implementations: Any, settings: Settings) -> list[Row]:
    """The rows of one operation; a result that differs from that of plain JAX is not timed."""
    runs = {one: repeatedly(case, one) for one in implementations}
    results = {one: jax.tree.map(jnp.copy, run()) for one, run in runs.items()}
    differences = {one: largest_difference(results[one], results["xla"]) for one in runs}
    right = {one: run for one, run in runs.items() if differences[one] <= TOLERANCE}
    times = interleaved(right, settings.repeats, name)
    return [
        {
            "name": name,
            "implementation": one,
            "difference": differences[one],
            "seconds": times.get(one),
            "of_xla": times[one] / times["xla"] if one in times else None,
        }
        for one in implementations
    ]


def repeatedly(case: Case, implementation: str) -> Callable[[], PyTree]:
    """A function that runs the operation, each time on the arrays that it wrote the last time."""
    arguments = list(case.start())
    compiled = program(case, implementation).lower(*arguments).compile()

    def run() -> PyTree:
        result = compiled(*arguments)
        parts = result if isinstance(result, tuple) else (result,)
        written = parts[-len(case.donated) :]
        for index, part in zip(case.donated, written, strict=True):
            arguments[index] = part
        return result

    return run


def largest_difference(found: PyTree, expected: PyTree) -> float:
    """The largest difference between two results, relative to the largest number of each array."""
    pairs = zip(*(_numbers(tree) for tree in (found, expected)), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


def _numbers(tree: PyTree) -> list[jax.Array]:
    leaves = tree if isinstance(tree, tuple) else (tree,)
    return [as_float32(leaf) for leaf in leaves]
