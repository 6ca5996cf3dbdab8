"""What an update of the bases does to the moments of the optimizer that works in them.

Moments are found wherever an optimizer keeps them: as `Coordinates` in its state, which know their
parameter. At a refresh they are kept or rotated (or reset: see `per_matrix`); those of a matrix
whose gradient was not finite are put back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.ops.quantization import as_float32, stored_like
from galore_jax.optim.state import GaLoreState, bases_of
from galore_jax.subspace.matrix_view import named_leaves
from galore_jax.subspace.methods import for_each
from galore_jax.subspace.projection import Basis, Coordinates, Side, is_coordinates
from galore_jax.types import PyTree

# The names under which optax and this package keep moments. Of a factored second moment, `rows`
# has the in axis of the coordinates and `columns` the out axis.
FIRST_MOMENTS = frozenset({"mu", "trace", "ema"})
SECOND_MOMENTS = frozenset({"nu", "nu_max", "sum_of_squares"})
FACTORS: dict[str, Side] = {"rows": "left", "columns": "right"}


class BasisUpdate(NamedTuple):
    """What an update, or a refresh, did to the basis of one parameter.

    Attributes:
      old: before it.
      new: after it.
      refreshed: `(*batch,)`, it made a new basis.
    """

    old: Basis
    new: Basis
    refreshed: jax.Array

    @property
    def skipped(self) -> jax.Array:
        """`(*batch,)`: the gradient was not finite."""
        return self.new.skipped > self.old.skipped

    @property
    def is_first_update(self) -> jax.Array:
        """`(*batch,)`: the update is the first in its basis, made by itself or by `refresh`."""
        return self.refreshed | (self.old.age == 0)


BasisUpdates = dict[tuple[str, ...], BasisUpdate]


def compare_bases(old: list[GaLoreState], new: list[GaLoreState]) -> BasisUpdates:
    """By the parameter's path, what an update between two states of the same galores did."""

    def compared(old: Basis, new: Basis) -> BasisUpdate:
        counted = new.skipped == old.skipped
        return BasisUpdate(old, new, new.age - counted < old.age)

    pairs = zip(bases_of(old), bases_of(new), strict=True)
    return {old.projection.path: compared(old, new) for old, new in pairs}


def is_moment(node: Any) -> bool:
    """Whether a node of a state is a moment; a masked one holds `optax.MaskedNode()`."""
    return is_coordinates(node) and hasattr(node.value, "shape")


def skip(updates: PyTree, basis_updates: BasisUpdates) -> PyTree:
    """The last updates of a chain with zero for the skipped matrices, which do not decay either."""

    def at_leaf(update: Any) -> Any:
        if not is_coordinates(update):
            return update
        skipped = basis_updates[update.projection.path].skipped
        value = jnp.where(skipped[..., None, None], 0, update.value)
        decay = None if update.decay is None else jnp.where(skipped, 0, update.decay)
        return Coordinates(value, update.projection, decay)

    return jax.tree.map(at_leaf, updates, is_leaf=is_coordinates)


def keep_skipped(old: PyTree, new: PyTree, basis_updates: BasisUpdates) -> PyTree:
    """The state `new` with the moments of `old` for the skipped matrices."""

    def at_moment(old: Any, new: Any) -> Any:
        if not is_moment(new) or new.projection.path not in basis_updates:
            return new
        skipped = basis_updates[new.projection.path].skipped
        if new.value.shape[: skipped.ndim] != skipped.shape:
            return new  # A statistic over several matrices, to which this one gave zeros.
        skipped = skipped.reshape(skipped.shape + (1,) * (new.value.ndim - skipped.ndim))
        kept = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), old.value, new.value)
        return Coordinates(kept, new.projection)

    return jax.tree.map(at_moment, old, new, is_leaf=is_coordinates)


def check_rotation(state: PyTree, bases: list[Basis]) -> None:
    """Refuses a state whose moments cannot be rotated where they are to be.

    Args:
      state: of a transformation after galore.
      bases: of galore.

    Raises:
      ValueError: names the leaf.
    """
    rotates = {basis.projection.path for basis in bases if basis.moments == "rotate"}
    for names, node in named_leaves(state, is_coordinates):
        if not is_moment(node) or node.projection.path not in rotates:
            continue
        name = _field(names, node.projection.path)
        if _kind(name, node) is None:
            raise ValueError(
                f'galore: moments="rotate" cannot rotate {name!r}, shape {node.value.shape}, which '
                f"the optimizer keeps for {node.projection.name}: it rotates first and second "
                f"moments of the coordinates' shape, {node.projection.coordinates_shape}. Use "
                'moments="keep" or "reset".'
            )


def rotate(state: PyTree, basis_updates: BasisUpdates) -> PyTree:
    """The state with its moments in the new bases, where they are new and rotated at a refresh."""

    def at_moment(names: tuple[str, ...], node: Any) -> Any:
        basis_update = basis_updates.get(node.projection.path) if is_moment(node) else None
        if basis_update is None or basis_update.new.moments != "rotate":
            return node
        kind = _kind(_field(names, node.projection.path), node)
        return Coordinates(
            _rotated_where_refreshed(node.value, basis_update, kind), node.projection
        )

    new = [at_moment(*leaf) for leaf in named_leaves(state, is_coordinates)]
    return jax.tree.unflatten(jax.tree.structure(state, is_coordinates), new)


def rotated(value: jax.Array, rotation: dict[Side, jax.Array], kind: str) -> jax.Array:
    """The moment of one matrix in its new basis.

    With `C = P_newᵀ P_old`, a first moment becomes `C M` (left), `M Cᵀ` (right) or both: its part
    in the new subspace. A second moment becomes `(C∘C) V`, the diagonal of the rotated covariance
    if coordinates are uncorrelated; that is LDAdam's estimate (arXiv 2410.16103, section 3.2)
    without its term in the mean, which needs the bias corrections of both moments. A new direction
    that the old basis held only in part, `Σⱼ Cᵢⱼ² < 1`, takes the missing part from the mean over
    the old directions: LDAdam, which rotates a little at every step, leaves it out, but after one
    by hundreds of steps the moment would vanish and the next step be many times too large.

    Args:
      value: `(..., rows, columns)` of the coordinates' shape; of a factored second moment the
        means over one of these.
      rotation: C by side, `(r, r)`.
      kind: "first", "second", or a name of `FACTORS`.

    Returns:
      An array shaped as `value`.
    """
    for side, c in rotation.items():
        if kind in FACTORS:
            value = _spread(c, value[:, None])[:, 0] if FACTORS[kind] == side else value
            continue
        rotate_axis = _spread if kind == "second" else jnp.matmul
        value = rotate_axis(c, value) if side == "left" else rotate_axis(c, value.T).T
    return value


def _spread(c: jax.Array, value: jax.Array) -> jax.Array:
    part = c**2
    missing = jnp.maximum(1 - part.sum(axis=1, keepdims=True), 0)
    return part @ value + missing * value.mean(axis=0, keepdims=True)


def _rotated_where_refreshed(value: Any, basis_update: BasisUpdate, kind: Any) -> Any:
    batch = basis_update.new.age.ndim
    flat = lambda array: array.reshape(-1, *array.shape[batch:])
    old, new = (jax.tree.map(flat, basis.vectors) for basis in (basis_update.old, basis_update.new))

    def one(i: jax.Array, values: Any, vectors: Any) -> Any:
        own, (old, new) = jax.tree.map(lambda stack: stack[i], (values, vectors))
        c = {side: as_float32(new[side]).T @ as_float32(old[side]) for side in new}
        rotated_one = stored_like(rotated(as_float32(own), c, kind), own)
        return jax.tree.map(lambda stack, new: stack.at[i].set(new), values, rotated_one)

    flags, stacks = basis_update.refreshed.reshape(-1), jax.tree.map(flat, value)
    done = for_each(flags, one, stacks, (old, new))
    return jax.tree.map(lambda new, old: new.reshape(old.shape), done, value)


def _kind(name: str, node: Coordinates) -> str | None:
    """What a moment of this name is to `rotated`; None where it is unknown or of another shape."""
    shape = node.projection.coordinates_shape
    if name in FACTORS:
        kept = shape[:-1] if FACTORS[name] == "left" else (*shape[:-2], shape[-1])
        return name if node.value.shape == kept else None
    if node.value.shape != shape:
        return None
    return "first" if name in FIRST_MOMENTS else "second" if name in SECOND_MOMENTS else None


def _field(names: tuple[str, ...], parameter: tuple[str, ...]) -> str:
    """The name under which a state keeps a tree like the parameters, from those of a leaf."""
    return names[len(names) - len(parameter) - 1]
