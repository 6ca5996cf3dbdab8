"""Compiles the Pallas kernels at the shapes of LLaMA-7B, for devices that need not be there.

python scripts/compile_kernels.py v5e v6e
python scripts/compile_kernels.py a100 rtx4090 h100
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from galore_jax.errors import run_cli

RANK = 1024
WEIGHTS = ((4096, 4096), (4096, 11008), (11008, 4096))


def main() -> None:
    """Compiles each kernel for each target and prints a line about it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="such as v6e or h100")
    targets = parser.parse_args().targets
    import jax
    from analysis import compile_targets

    print(f"{'kernel':14}{'target':10}{'shape':16}{'variant':32}{'temporary':>10}{'seconds':>9}")
    for target in targets:
        with compile_targets.target(target) as sharding:
            for name, shape, variant, kernel, arguments, donated in kernels():
                start = time.perf_counter()
                function = jax.jit(kernel, donate_argnums=donated)
                compiled = function.lower(*compile_targets.place(arguments, sharding)).compile()
                seconds = time.perf_counter() - start
                analysis = compiled.memory_analysis()
                assert analysis is not None
                size = analysis.temp_size_in_bytes
                shape = "×".join(map(str, shape))
                print(f"{name:14}{target:10}{shape:16}{variant:32}{size:10}{seconds:9.2f}")


def kernels() -> Iterator[tuple[str, tuple[int, int], str, Callable, tuple, tuple[int, ...]]]:
    """Name, shape, variant, kernel, shapes of its arguments and indices of the donated ones."""
    import functools

    import jax
    import jax.numpy as jnp

    from galore_jax.ops import adam_step, lift
    from galore_jax.ops.implementation import use_implementation
    from galore_jax.ops.quantization import quantize

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def adam(step: Callable, *arrays: Any) -> Any:
        return step(*arrays, b1=0.9, b2=0.999, eps=1e-8)

    kernel = functools.partial(use_implementation, "pallas", adam_step.adam_8bit, adam)
    for shape in ((RANK, 4096), (RANK, 11008)):
        for dtype, axis in itertools.product((jnp.float32, jnp.bfloat16), (-1, -2)):
            mu, nu = (
                jax.eval_shape(functools.partial(quantize, code=code, axis=axis), array(*shape))
                for code in ("signed", "unsigned")
            )
            gradient = array(*shape, dtype=dtype)
            arguments = (gradient, mu, nu, array(dtype=jnp.int32))
            variant = f"{jnp.dtype(dtype).name}, {'rows' if axis == -1 else 'columns'}"
            yield "adam_8bit", shape, variant, kernel, arguments, (1, 2)

    # As `apply_gradients` calls it, for a stack of one matrix; int8 bases are passed as float32.
    def stacked(right_is_transposed: bool, add: Callable, *arrays: Any) -> jax.Array:
        one = functools.partial(add, right_is_transposed=right_is_transposed)
        axes = (0, 0, 0, None, 0, None if arrays[-1] is None else 0)
        return jax.vmap(one, axes)(*arrays)

    for rows, columns in WEIGHTS:
        for right_is_transposed, basis, seed in itertools.product(
            (False, True), (jnp.bfloat16, jnp.float32), (None, array(1, 2, dtype=jnp.uint32))
        ):
            weights = array(1, rows, columns, dtype=jnp.bfloat16)
            if right_is_transposed:
                factors = array(1, rows, RANK), array(1, columns, RANK, dtype=basis)
            else:
                factors = array(1, rows, RANK, dtype=basis), array(1, RANK, columns)
            use = functools.partial(stacked, right_is_transposed)
            kernel = functools.partial(use_implementation, "pallas", lift.lift_and_add, use)
            arguments = (weights, *factors, array(), array(1), seed)
            side = "right" if right_is_transposed else "left"
            rounding = "nearest" if seed is None else "stochastic"
            variant = f"{side}, {jnp.dtype(basis).name}, {rounding}"
            yield "lift_and_add", (rows, columns), variant, kernel, arguments, (0,)


if __name__ == "__main__":
    run_cli(main)
