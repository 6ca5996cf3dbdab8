"""Refreshes without full gradients: a round of subspace iteration is two backward passes.

For a left basis P, the first pass gives the coordinates `R = PᵀG` and hence `A = orth(Rᵀ)`. The
second one, over the same batch, gives `Y = G A`, the coordinates in the right basis A; then
`P = orth(Y)`. For a right basis the sides are swapped. There are three rounds if a basis that is
due has never been refreshed, otherwise one.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_jax.grads.projected_product import product_dtype
from galore_jax.grads.value_and_grad import Loss, Names, Passes, bases_in
from galore_jax.ops.loops import flatten_batch, for_each
from galore_jax.ops.partition import AxisNames, map_batch, specs_of, with_auto_axes
from galore_jax.ops.quantization import Quantized, as_float32
from galore_jax.optim.galore_state import (
    GaLoreState,
    bases_of,
    galore_states,
    map_bases,
    with_galore_states,
)
from galore_jax.optim.moments import rotate
from galore_jax.subspace.basis import AGE_UNINITIALIZED, Basis
from galore_jax.subspace.matrix_view import unboxed
from galore_jax.subspace.new_basis import Sketch, orthonormalise, refresh_if_due, span, updates_left
from galore_jax.subspace.placement import constrain, matrices_partition
from galore_jax.subspace.projection import Side
from galore_jax.types import PyTree

# Coordinates of the gradient in given bases, by a backward pass.
Backward = Callable[[dict[Names, Basis]], dict[Names, jax.Array]]
OPPOSITE: dict[Side, Side] = {"left": "right", "right": "left"}


def updates_until_refresh(opt_state: PyTree) -> jax.Array:
    """The smallest number of updates until a refresh is due, int32 scalar.

    It is 0 if one is due now, and 2**30 if nothing is projected.
    """
    return _updates_and_due(galore_states(opt_state, inside_chains=True))[0]


def refresh_due(opt_state: PyTree) -> jax.Array:
    """Whether any basis is due for a refresh, a boolean scalar.

    Raises:
      ValueError: there is no state of `galore` in `opt_state`.
    """
    states = galore_states(opt_state, inside_chains=True)
    if not states:
        raise ValueError("refresh_due: this holds no state of galore: pass the optimizer's state.")
    return _updates_and_due(states)[1]


# Compiled, so that no numbers are sent to the device; see `jax.transfer_guard`.
@jax.jit
def _updates_and_due(states: list[GaLoreState]) -> tuple[jax.Array, jax.Array]:
    left = [jnp.min(updates_left(basis), initial=2**30) for basis in unboxed(bases_of(states))]
    least = jnp.maximum(jnp.min(jnp.stack([jnp.int32(2**30), *left])), 0)
    return least, least == 0


def refresh(
    loss: Loss,
    *,
    has_aux: bool = False,
    micro_batches: int = 1,
    data_axes: AxisNames = (),
) -> Callable[..., PyTree]:
    """Refreshes the bases that are due, by backward passes that never form a full gradient.

    Call it before `value_and_grad`, with the same batch, when `refresh_due(opt_state)` is true. A
    matrix whose gradient is zero or not finite keeps its basis and is retried 1, 2, 4, 8, … finite
    updates after it became due, with at most `update_proj_gap` between attempts. Parameters whose
    gradient is full in `value_and_grad` are refreshed by `apply_gradients` instead. Moments are
    kept or rotated, as chosen by `galore(moments=…)`. A refresh does not count as an update.

    Args:
      loss: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.
      micro_batches: as for `value_and_grad`; each pass covers all micro-batches before the next one
        begins.
      data_axes: as for `value_and_grad`.

    Returns:
      A function `(params, opt_state, *batch, **unsplit)` that returns the new state.

    Raises:
      ValueError: when called: a refresh method that needs full gradients, naming the leaf; inside
        `jax.pmap` or `jax.shard_map`; and as for `value_and_grad`.
    """

    def run(params: PyTree, opt_state: PyTree, *batch: Any, **unsplit: Any) -> PyTree:
        bases = bases_in(params, opt_state)
        passes = Passes(loss, params, bases, batch, unsplit, has_aux, micro_batches, data_axes)
        return refreshed(passes, opt_state, when_due=False)

    return run


def refreshed(passes: Passes, opt_state: PyTree, *, when_due: bool) -> PyTree:
    """The optimizer's state with new bases where they are due, and its moments expressed in them.

    Args:
      passes: over the batch, with the bases of the state.
      opt_state: the optimizer's state.
      when_due: whether to branch on whether anything is due, in a step that may not refresh.
    """
    states = galore_states(opt_state, inside_chains=True)
    new = partial(_refreshed_states, passes, states)
    # Only bases go through the branch, which may copy what it returns.
    new = lax.cond(refresh_due(states), new, lambda: states) if when_due else new()
    return with_auto_axes(_adopted, opt_state, new, out=lambda: specs_of(opt_state))


def _refreshed_states(passes: Passes, states: list[GaLoreState]) -> list[GaLoreState]:
    if axes := jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            f"refresh: inside jax.pmap or jax.shard_map over {', '.join(map(str, axes))}, each "
            "device would compute bases of its own: refresh outside of it, under jax.jit, with "
            "data_axes if the batch is divided."
        )
    uses = passes.find_uses()
    multiplied = {
        basis.projection.path: basis
        for basis in bases_of(states)
        if uses[basis.projection.path].gradient != "full"
    }
    if not multiplied:
        return states

    def backward(given: dict[Names, Basis]) -> dict[Names, jax.Array]:
        def chosen(basis: Basis, param: jax.Array) -> Any:
            if basis.projection.path not in given:
                return optax.MaskedNode()
            basis = given[basis.projection.path]
            # Already in the dtype of the products, so that no wider copies are stored.
            dtype = product_dtype(param.dtype)
            vectors = jax.tree.map(lambda own: own.astype(dtype), basis.vectors)
            return dataclasses.replace(basis, vectors=vectors)

        bases = map_bases(chosen, passes.bases, passes.params, otherwise=passes.bases)
        return passes.coordinates(bases)

    sketches = _sketches(backward, multiplied)
    return with_auto_axes(_renewed, states, sketches, out=lambda: specs_of(states))


def _sketches(backward: Backward, bases: dict[Names, Basis]) -> dict[Names, Sketch]:
    """A sketch for each basis; nothing is computed if none is due.

    Only subspace iteration needs backward passes: random bases are drawn later, and the methods
    that need full gradients are refused later.
    """
    sketches = {
        path: Sketch(
            {side: _unquantized(stored) for side, stored in basis.vectors.items()},
            jnp.ones(basis.age.shape, bool),
        )
        for path, basis in bases.items()
    }
    iterated = {path: b for path, b in bases.items() if b.method == "subspace_iteration"}
    if not iterated:
        return sketches

    def one_round(_: int, sketches: dict[Names, Sketch]) -> dict[Names, Sketch]:
        # The second side of a two-sided basis takes two more passes.
        for place in (0, 1):
            sides: dict[Names, Side] = {
                path: basis.projection.sides[place]
                for path, basis in iterated.items()
                if place < len(basis.projection.sides)
            }
            if sides:
                sketches = sketches | _half_round(backward, iterated, sides, sketches)
        return sketches

    due = {path: updates_left(basis) <= 0 for path, basis in iterated.items()}
    first = [jnp.any(due[path] & (b.age >= AGE_UNINITIALIZED)) for path, b in iterated.items()]
    any_due = jnp.any(jnp.stack([jnp.any(flags) for flags in due.values()]))
    rounds = jnp.where(jnp.any(jnp.stack(first)), 3, any_due.astype(jnp.int32))
    return lax.fori_loop(0, rounds, one_round, sketches)


def _half_round(
    backward: Backward,
    bases: dict[Names, Basis],
    sides: dict[Names, Side],
    sketches: dict[Names, Sketch],
) -> dict[Names, Sketch]:
    """New vectors on one side of each basis in `sides`, by two backward passes."""

    def columns(sides: dict[Names, Side], vectors: dict[Names, Any]) -> dict[Names, jax.Array]:
        """`PᵀG` (r, out) as r columns, or `G P` (in, r) as it is."""
        given = {path: _one_sided(bases[path], side, vectors[path]) for path, side in sides.items()}
        found = backward(given)
        return {path: found[path].mT if sides[path] == "left" else found[path] for path in found}

    old = {path: sketches[path].vectors[side] for path, side in sides.items()}
    first = columns(sides, old)
    opposite = {
        # In the dtype of the bases: a layer-wise refresh has little room for float32.
        path: _where_due(bases[path], span, first[path].astype(old[path].dtype), first[path])
        for path in sides
    }
    second = columns({path: OPPOSITE[side] for path, side in sides.items()}, opposite)
    new_sketches = {}
    for path, side in sides.items():
        new = _where_due(bases[path], orthonormalise, old[path], second[path], old[path])
        # As for full gradients: a zero gradient, or one whose squares overflow, is not used.
        finite = jnp.isfinite(jnp.sum(second[path] ** 2, axis=(-2, -1)))
        usable = sketches[path].usable & finite & jnp.any(second[path] != 0, axis=(-2, -1))
        vectors: dict[Side, Any] = {**sketches[path].vectors, side: new}
        new_sketches[path] = Sketch(vectors, usable)
    return new_sketches


def _one_sided(basis: Basis, side: Side, vectors: jax.Array) -> Basis:
    projection = dataclasses.replace(basis.projection, sides=(side,), over=())
    return dataclasses.replace(basis, vectors={side: vectors}, projection=projection)


def _where_due(
    basis: Basis, f: Callable[..., jax.Array], stack: jax.Array, *arrays: jax.Array
) -> jax.Array:
    """The stack with `f` of the arrays' matrices in place of its own for the matrices that are due.

    The stack and the arrays have matrices of the same shape.
    """

    def apply_to(i: jax.Array, result: jax.Array, arrays: tuple[jax.Array, ...]) -> jax.Array:
        return result.at[i].set(f(*(array[i] for array in arrays)).astype(result.dtype))

    def where_due(due: jax.Array, *stacks: jax.Array) -> jax.Array:
        result, *others = flatten_batch(stacks, basis.age.ndim)
        result = for_each(due.reshape(-1), apply_to, result, tuple(others))
        return result.reshape(stacks[0].shape)

    where_due_on_parts = partial(map_batch, matrices_partition(basis.projection), where_due)
    due = updates_left(basis) <= 0
    return with_auto_axes(where_due_on_parts, due, stack, *arrays, out=lambda: specs_of(stack))


def _unquantized(stored: Any) -> jax.Array:
    """Basis vectors as one array, where the stored ones lie: as they are, or decoded to float32."""
    if not isinstance(stored, Quantized):
        return stored
    return with_auto_axes(as_float32, stored, out=lambda: specs_of(stored.codes))


def _renewed(states: list[GaLoreState], sketches: dict[Names, Sketch]) -> list[GaLoreState]:
    """The states with bases renewed from the sketches."""

    def renewed(state: GaLoreState) -> GaLoreState:
        settings = {"seed": state.seed, "count": state.count}

        def at_leaf(basis: Basis) -> Basis:
            sketch = sketches.get(basis.projection.path)
            if sketch is None:
                return basis
            return refresh_if_due(basis, sketch, state.lazy_overlap, **settings)

        return state._replace(bases=map_bases(at_leaf, state.bases, otherwise=state.bases))

    return [renewed(state) for state in states]


def _adopted(opt_state: PyTree, new: list[GaLoreState]) -> PyTree:
    """The optimizer's state with the new states of galore, and its moments rotated into them."""
    pairs = zip(bases_of(galore_states(opt_state, inside_chains=True)), bases_of(new), strict=True)
    # `refreshed` may still be that of the last update.
    changes = {
        old.projection.path: (old, dataclasses.replace(basis, refreshed=basis.age < old.age))
        for old, basis in pairs
    }
    rotated = rotate(opt_state, changes)
    return constrain(with_galore_states(rotated, new, inside_chains=True))
