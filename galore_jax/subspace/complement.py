"""Random directions outside a subspace, drawn anew for every update and never stored.

GaLore leaves out the component of the gradient outside its subspace, `(I − P Pᵀ) G`. With k random
orthonormal directions Q in this complement, whose dimension is d, `E[Q Qᵀ] = (k / d) (I − P Pᵀ)`,
so that `P PᵀG + (d / k) Q QᵀG` is an unbiased estimate of the gradient (as in arXiv 2510.17802 and
2602.23111, which choose other complements).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from galore_jax.ops.explicit import with_auto_axes
from galore_jax.ops.loops import flatten_batch
from galore_jax.ops.newton_schulz import orthonormal_columns
from galore_jax.ops.partition import constrained, map_batch
from galore_jax.ops.quantization import as_float32
from galore_jax.ops.threefry import normal, threefry
from galore_jax.subspace.basis import Basis, path_hash
from galore_jax.subspace.methods import orthonormalise
from galore_jax.subspace.placement import basis_partition, matrices_partition
from galore_jax.subspace.projection import Projection, Side


def draw_directions(basis: Basis, *, seed: Any, count: Any) -> dict[Side, jax.Array]:
    """Draws k random orthonormal directions in the complement of each matrix's subspace.

    Args:
      basis: of one side, with `projection.complement` = k.
      seed: seed of the random numbers.
      count: number of updates before this one; each has directions of its own.

    Returns:
      For the side, float32 `(*batch, in or out, k)`.
    """
    projection, batch = basis.projection, basis.age.ndim
    ((side, stored),) = basis.vectors.items()
    *_, size, _ = projection.basis_shapes[side]
    k = projection.complement
    seed = (jnp.asarray(seed).astype(jnp.uint32), jnp.uint32(path_hash(projection)))

    def draw(stored: Any, numbers: jax.Array) -> jax.Array:
        vectors = as_float32(stored)
        words = threefry(seed, jnp.asarray(count).astype(jnp.uint32), numbers.astype(jnp.uint32))
        columns = _outside(vectors, normal(words, (size, k)) / size**0.5)
        if 2 * k <= complement_size(projection):
            return orthonormal_columns(columns)
        # Columns may be nearly parallel, and to orthonormalise them magnifies rounding errors. One
        # matrix at a time: batched Cholesky calls deadlock on CPU in jax 0.10.
        matrices = flatten_batch(columns, batch)
        columns = lax.map(lambda each: orthonormalise(each, each), matrices).reshape(columns.shape)
        return _outside(vectors, columns)

    directions = map_batch(matrices_partition(projection), draw, stored, basis.number)
    of_directions = replace(projection, rank=projection.complement, complement=0)
    return {side: constrained(directions, basis_partition(of_directions, side))}


def _outside(vectors: jax.Array, columns: jax.Array) -> jax.Array:
    """`(I − P Pᵀ) X`."""
    multiply = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return columns - multiply(vectors, multiply(vectors.mT, columns))


def with_directions(
    vectors: dict[Side, Any], directions: dict[Side, jax.Array]
) -> dict[Side, jax.Array]:
    """`[P | Q]` in float32, from the stored vectors P and the directions Q."""
    return {
        side: jnp.concatenate([as_float32(stored), directions[side]], axis=-1)
        for side, stored in vectors.items()
    }


def extended(basis: Basis, *, seed: Any, count: Any, dtype: Any) -> Basis:
    """The basis `[P | Q]` of a larger subspace, with vectors of the given dtype."""
    projection = basis.projection.extended

    def extend(basis: Basis, seed: Any, count: Any) -> dict[Side, jax.Array]:
        vectors = with_directions(basis.vectors, draw_directions(basis, seed=seed, count=count))
        return {
            side: constrained(stored.astype(dtype), basis_partition(projection, side))
            for side, stored in vectors.items()
        }

    specs = lambda: {side: _spec(projection, side) for side in projection.sides}
    vectors = with_auto_axes(extend, basis, seed, count, out=specs)
    return replace(basis, vectors=vectors, projection=projection)


def _spec(projection: Projection, side: Side) -> PartitionSpec:
    partition = basis_partition(projection, side)
    return PartitionSpec() if partition is None else partition.spec


def joined(projection: Projection, value: jax.Array, complement: jax.Array | None) -> jax.Array:
    """Coordinates in `[P | Q]`, from those in P and those in Q (None: there are no directions)."""
    if complement is None:
        return value
    return jnp.concatenate([value, complement], axis=_rank_axis(projection))


def split(projection: Projection, array: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Inverts `joined`."""
    if not projection.complement:
        return array, None
    value, complement = jnp.split(array, [projection.rank], axis=_rank_axis(projection))
    return value, complement


def complement_size(projection: Projection) -> int:
    """The dimension d of the complement."""
    ((*_, size, rank),) = projection.basis_shapes.values()
    return size - rank


def _rank_axis(projection: Projection) -> int:
    return -2 if "left" in projection.sides else -1
