"""Orthogonalisation by matrix products alone: the Newton–Schulz iterations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.ops.quantization import block_fractions

# Keller Jordan, https://kellerjordan.github.io/posts/muon: singular values of 1e-3 and more, as a
# fraction of the Frobenius norm, end between 0.68 and 1.14 after five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Steps before and after the Gram matrix is computed from the matrix again.
STEPS = (3, 2)
# Rows up to which a TPU does best to round factors within the products. Those of larger matrices do
# not fit its vector memory and would be read and rounded again for every tile of a product.
IN_VECTOR_MEMORY = 2048


def newton_schulz(matrices: jax.Array) -> jax.Array:
    """Moves the singular values of each matrix close to 1.

    With `X` scaled to a Frobenius norm of 1, a step of the iteration is `X ← (a + b A + c A²) X`,
    where `A = X Xᵀ`. All factors are polynomials in the first `A` and commute, so that the steps
    need only products of the smaller side: `A ← S² A` and `Q ← S Q` with `S = a + b A + c A²`, and
    the result is `Q X`. Rounding errors of A grow from step to step; so after three `X ← Q X`, and
    the other two begin with a new A. For `(r, n)` all takes `8 r² n + 28 r³` multiplications and
    additions in place of `20 r² n + 10 r³`.

    On TPUs and GPUs factors are rounded to bfloat16, as by Muon's author, but never the multiples
    of the identity in S and Q, which are added in float32. So the result is within 6% of the exact
    one for any singular values.

    Args:
      matrices: float32 `(..., rows, columns)`.

    Returns:
      An array of the same shape; zero for a matrix of zeros.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return newton_schulz(matrices.mT).mT

    # Divide by the largest entry first: the square of 1e-30 is zero in float32.
    largest = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True)
    x = block_fractions(matrices, largest)
    norm = jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1)
    of = lambda dtype: partial(iterate, dtype=dtype)
    return lax.platform_dependent(x, cpu=of(jnp.float32), default=of(jnp.bfloat16))


def iterate(x: jax.Array, dtype: Any) -> jax.Array:
    """The iterations, for matrices that are not higher than wide, with factors of this dtype."""
    a, b, c = COEFFICIENTS

    def rounded(factor: jax.Array) -> jax.Array:
        factor = factor.astype(dtype)
        return lax.optimization_barrier(factor) if x.shape[-2] > IN_VECTOR_MEMORY else factor

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        highest = lax.Precision.HIGHEST if dtype == jnp.float32 else None
        factors = rounded(left), rounded(right)
        return jnp.matmul(*factors, precision=highest, preferred_element_type=jnp.float32)

    for steps in STEPS:
        gram = multiply(x, x.mT)
        # S = a + rest, and Q = multiple + total.
        rest = b * gram + c * multiply(gram, gram)
        multiple, total = a, rest
        for _ in range(steps - 1):
            for _ in range(2):
                gram = a * gram + multiply(rest, gram)
            rest = b * gram + c * multiply(gram, gram)
            total = a * total + multiple * rest + multiply(rest, total)
            multiple *= a
        x = multiple * x + multiply(total, x)
    return x
