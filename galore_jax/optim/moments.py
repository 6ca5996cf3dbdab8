"""What the chain does to the optimizer's moments after galore has changed or skipped a matrix.

A moment is any `Coordinates` node in an optimizer's state; it records the path of its parameter.

* A matrix with a new basis: `galore(moments="rotate")` expresses its moments in that basis
  (`rotate`); with "keep" they stay as they are (the reference).
* A matrix whose gradient was not finite: galore has replaced its coordinates by zeros, and its
  moments are put back (`restore_moments`). `skip_updates` makes its update zero, weight decay
  included, so that weights, moments and basis stay as they were, bit for bit.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.loops import flatten_batch, for_each
from galore_jax.ops.partition import map_batch
from galore_jax.ops.quantization import as_float32, stored_like
from galore_jax.optim.galore_state import bases_of, galore_states
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.matrix_view import named_leaves
from galore_jax.subspace.placement import matrices_partition
from galore_jax.subspace.projection import Coordinates, Side, is_coordinates
from galore_jax.types import PyTree

# The names under which optax and this package keep moments. The rows of a factored second moment
# have the in axis of the coordinates, its columns the out axis.
FIRST_MOMENTS = frozenset({"mu", "trace", "ema"})
SECOND_MOMENTS = frozenset({"nu", "nu_max", "sum_of_squares"})
FACTORS: dict[str, Side] = {"rows": "left", "columns": "right"}

# For each projected parameter, by path, its basis before and after an update or a refresh.
BasisChanges = dict[tuple[str, ...], tuple[Basis, Basis]]


def basis_changes(old: PyTree, new: PyTree, *, whole: PyTree) -> BasisChanges:
    """What an update has done to the bases.

    Args:
      old: state of the transformation with galore before its update.
      new: its state afterwards.
      whole: state of the transformation that contains it. If `optax.MultiSteps` in it accumulates
        micro-batches, one that is not finite counts as zeros, and nothing is skipped.

    Returns:
      The bases before and after, by the path of the parameter.
    """
    is_accumulator = lambda node: isinstance(node, optax.MultiStepsState)
    accumulates = any(map(is_accumulator, jax.tree.leaves(whole, is_leaf=is_accumulator)))
    changes = {}
    pairs = zip(bases_of(galore_states(old)), bases_of(galore_states(new)), strict=True)
    for before, after in pairs:
        if accumulates:
            after = replace(after, finite=jnp.ones_like(after.finite))
        changes[before.projection.path] = before, after
    return changes


def is_moment(node: Any) -> bool:
    """Whether a node of a state is a moment; a masked one holds `optax.MaskedNode()`."""
    return is_coordinates(node) and hasattr(node.value, "shape")


def restore_moments(old: PyTree, new: PyTree, changes: BasisChanges) -> PyTree:
    """The state `new` with the moments of the state `old` for the skipped matrices."""

    def at_moment(old: PyTree, new: PyTree) -> PyTree:
        if not is_moment(new) or new.projection.path not in changes:
            return new
        finite = changes[new.projection.path][1].finite
        if new.value.shape[: finite.ndim] != finite.shape:
            return new  # A statistic over several matrices, to which this one contributed zeros.
        finite = finite.reshape(finite.shape + (1,) * (len(new.value.shape) - finite.ndim))
        kept = jax.tree.map(lambda old, new: jnp.where(finite, new, old), old.value, new.value)
        return Coordinates(kept, new.projection)

    return jax.tree.map(at_moment, old, new, is_leaf=is_coordinates)


def skip_updates(updates: PyTree, changes: BasisChanges) -> PyTree:
    """The final updates of a chain, zero for the skipped matrices, which do not decay either."""

    def at_leaf(update: PyTree) -> PyTree:
        if not is_coordinates(update) or update.projection.path not in changes:
            return update  # A chain without galore may be inside of one that has it.
        finite = changes[update.projection.path][1].finite
        decay = None if update.decay is None else jnp.where(finite, update.decay, 0)
        value = jnp.where(finite[..., None, None], update.value, 0)
        return replace(update, value=value, decay=decay)

    return jax.tree.map(at_leaf, updates, is_leaf=is_coordinates)


def rotate(state: PyTree, changes: BasisChanges) -> PyTree:
    """Rotates the moments of parameters whose basis has `moments="rotate"` into the new bases."""

    def at_moment(names: tuple[str, ...], node: Any) -> Any:
        pair = changes.get(node.projection.path) if _has_directions(node) else None
        if pair is None or pair[1].moments != "rotate":
            return node
        kind = _kind(_field(names, node.projection.path), node)
        value = _rotated_where_refreshed(node.value, *pair, kind)
        return Coordinates(value, node.projection)

    new = [at_moment(*leaf) for leaf in named_leaves(state, is_coordinates)]
    return jax.tree.unflatten(jax.tree.structure(state, is_coordinates), new)


def _rotated_where_refreshed(value: Any, old: Basis, new: Basis, kind: Any) -> Any:
    def rotate_one(i: jax.Array, values: Any, vectors: Any) -> Any:
        stored, (old, new) = jax.tree.map(lambda stack: stack[i], (values, vectors))
        c = {side: as_float32(new[side]).T @ as_float32(old[side]) for side in new}
        result = stored_like(rotated(as_float32(stored), c, kind), stored)
        return jax.tree.map(lambda stack, new: stack.at[i].set(new), values, result)

    def rotate_all(flags: jax.Array, *arrays: Any) -> Any:
        value, *vectors = flatten_batch(arrays, flags.ndim)
        result = for_each(flags.reshape(-1), rotate_one, value, tuple(vectors))
        return jax.tree.map(lambda new, old: new.reshape(old.shape), result, arrays[0])

    arguments = new.refreshed, value, old.vectors, new.vectors
    return map_batch(matrices_partition(new.projection), rotate_all, *arguments)


def rotated(value: jax.Array, rotation: dict[Side, jax.Array], kind: str) -> jax.Array:
    """The moment of one matrix in its new basis.

    With `C = P_newᵀ P_old`, a first moment becomes `C M` (left), `M Cᵀ` (right) or both: its
    component in the new subspace. A second moment becomes `(C∘C) V`, the diagonal of the rotated
    covariance if coordinates are uncorrelated. That is LDAdam's estimate (arXiv 2410.16103, section
    3.2) without its term in the mean, which needs the bias corrections of both moments. For a new
    direction that the old basis covers only in part, `Σⱼ Cᵢⱼ² < 1`, the rest is filled with the
    mean over the old directions. LDAdam, which rotates a little at every step, leaves that out.
    Here a second moment that was not rotated for hundreds of steps would nearly vanish without it,
    and the next step would be far too large.

    Args:
      value: `(rows, columns)` of the coordinates' shape; for a factored second moment its means
        over one of these axes.
      rotation: C by side, `(r, r)`.
      kind: "first", "second", or a name in `FACTORS`.

    Returns:
      An array shaped as `value`.
    """
    for side, c in rotation.items():
        if kind in FACTORS:
            value = _spread(c, value[:, None])[:, 0] if FACTORS[kind] == side else value
            continue
        multiply = _spread if kind == "second" else jnp.matmul
        value = multiply(c, value) if side == "left" else multiply(c, value.T).T
    return value


def _spread(c: jax.Array, value: jax.Array) -> jax.Array:
    covered = c**2
    missing = jnp.maximum(1 - covered.sum(axis=1, keepdims=True), 0)
    return covered @ value + missing * value.mean(axis=0, keepdims=True)


def _has_directions(node: Any) -> bool:
    """Whether a node is a moment other than a number for each matrix, which no rotation changes."""
    return is_moment(node) and node.value.shape != node.projection.view.batch


def _kind(name: str, node: Coordinates) -> str | None:
    """The kind, as for `rotated`, of a moment; None if its name or shape is unknown."""
    shape = node.projection.coordinates_shape
    if name in FACTORS:
        kept = shape[:-1] if FACTORS[name] == "left" else (*shape[:-2], shape[-1])
        return name if node.value.shape == kept else None
    if node.value.shape != shape:
        return None
    return "first" if name in FIRST_MOMENTS else "second" if name in SECOND_MOMENTS else None


def _field(names: tuple[str, ...], parameter: tuple[str, ...]) -> str:
    """The name of the state's field with a tree like the parameters, from the path of a leaf."""
    return names[len(names) - len(parameter) - 1]


def check_rotation(state: PyTree, bases: list[Basis]) -> None:
    """Checks that every moment that is to be rotated can be.

    Args:
      state: of a transformation after galore.
      bases: the bases of galore.

    Raises:
      ValueError: a moment is neither a first nor a second one; names its leaf.
    """
    rotates = {basis.projection.path for basis in bases if basis.moments == "rotate"}
    for names, node in named_leaves(state, is_coordinates):
        if not _has_directions(node) or node.projection.path not in rotates:
            continue
        name = _field(names, node.projection.path)
        if _kind(name, node) is None:
            raise ValueError(
                f'galore: moments="rotate" cannot rotate {name!r}, shape {node.value.shape}, which '
                f"the optimizer keeps for {node.projection.name}: it rotates moments of the "
                f"coordinates' shape, {node.projection.coordinates_shape}, with one of the names "
                f'{", ".join(sorted(FIRST_MOMENTS | SECOND_MOMENTS))}. Use moments="keep".'
            )
