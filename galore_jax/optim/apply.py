"""Applies updates to parameters: coordinates are lifted and added in place, matrix by matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from galore_jax.ops import lift
from galore_jax.ops.implementation import use_implementation
from galore_jax.ops.int8 import Int8, is_int8, quantized, to_arrays, update_rows
from galore_jax.ops.loops import flatten_batch
from galore_jax.ops.partition import Partition, map_batch, specs_of, with_auto_axes
from galore_jax.ops.precision import stochastic_round, widened
from galore_jax.optim import stock_chain
from galore_jax.optim.chain import is_chain
from galore_jax.optim.galore_state import (
    boxed_as,
    constrain_unprojected,
    galore_states,
    map_bases,
    none_where_no_gradient,
)
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.matrix_view import MatrixView
from galore_jax.subspace.placement import constrain, matrices_partition
from galore_jax.subspace.projection import Projection, Side, is_coordinates
from galore_jax.types import PyTree


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    key: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """`tx.update` and `optax.apply_updates` in one step, for any transformation of parameters.

    Call it under `jax.jit` with the parameters and the state donated. Coordinates are then lifted
    and added in place, one matrix at a time, so that the lifted update of a stacked leaf never
    exists as a whole. (Wrappers around a `chain`, such as `optax.inject_hyperparams`, return lifted
    updates. `optax.lookahead`, whose parameters are pairs, is stepped by its own `update`.)

    Args:
      tx: any transformation.
      grads: full gradients, or `Coordinates` for projected leaves.
      state: from `init(tx, params)`, or from `tx.init(params)` for a `chain`.
      params: the parameters, also from `to_int8`; leaves whose gradient is None are returned
        unchanged, if the state was started with None there too, or the transformations keep nothing
        for a leaf.
      key: if given, parameters in bfloat16 and in 8 bits are rounded stochastically, which is
        unbiased; rounding to nearest loses updates below 1/512 of a weight in bfloat16, and in 8
        bits those below 1/254 of the largest weight of a row.
      **extra_args: passed to the transformations, as by `tx.update`.

    Returns:
      The new parameters and the new state.

    Raises:
      ValueError: a gradient of a projected parameter that is None or has another shape, naming it.
    """
    apply = partial(_apply_gradients, tx)
    arguments = grads, state, params, key, extra_args
    return with_auto_axes(apply, *arguments, out=lambda: specs_of((params, state)))


def _apply_gradients(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    key: jax.Array | None,
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    all_params, params = params, none_where_no_gradient(params, grads)
    arrays = to_arrays(params)  # which are not computed unless a transformation reads them
    if is_chain(tx):
        updates, state = tx.update_coordinates(grads, state, arrays, **extra_args)
        states = galore_states(state.inner_states)
    else:
        updates, state = stock_chain.update(tx, grads, state, arrays, **extra_args)
        states = galore_states(state)
    leaves, tree = jax.tree.flatten(params, is_leaf=is_int8)
    keys = tree.unflatten(
        [None] * len(leaves) if key is None else jax.random.split(key, len(leaves))
    )

    def new_unprojected(update: Any, param: Any, key: Any) -> Any:
        if is_coordinates(update):
            return update
        if is_int8(param):
            return _add_to_int8(param, jnp.asarray(update), key)
        param = jnp.asarray(param)
        total = _at_least_float32(param) + _at_least_float32(jnp.asarray(update))
        return _rounded(total, param.dtype, key)

    def new_projected(basis: Basis, update: Any, param: Any, key: Any) -> Any:
        if not is_coordinates(update):  # of another galore
            return update
        add = _lift_and_add_to_int8 if is_int8(param) else _lift_and_add
        return add(basis, update, param, key)

    # Unprojected leaves first; then each galore replaces coordinates by new parameters.
    new = jax.tree.map(new_unprojected, updates, params, keys, is_leaf=is_coordinates)
    for galore_state in states:
        new = map_bases(new_projected, galore_state.bases, new, params, keys, otherwise=new)
    new = constrain_unprojected(boxed_as(params, new), states)
    return _with_rest(new, all_params), constrain(state)


def _with_rest(new: PyTree, params: PyTree) -> PyTree:
    """The new parameters, with the old ones where the new ones are None."""
    pick = lambda new, old: old if new is None else new
    return jax.tree.map(pick, new, params, is_leaf=lambda node: node is None)


@jax.jit
def _lift_and_add(basis: Basis, update: Any, param: jax.Array, key: Any) -> jax.Array:
    """`(1 − decay) W + scale · lift(N)` for a leaf, matrix by matrix and in place."""
    projection, batch = basis.projection, basis.age.ndim
    partition = matrices_partition(projection)

    def update_all(add: Callable[..., jax.Array], matrices: jax.Array, *others: Any) -> jax.Array:
        update_one = partial(_update_matrix, projection, partition, add, basis.scale)
        if not batch and partition is None:
            return update_one(matrices, *others)
        stack, *rest = flatten_batch((matrices, *others), batch)

        def update_at(i: jax.Array, stack: jax.Array) -> jax.Array:
            arguments = jax.tree.map(lambda array: array[i], rest)
            return stack.at[i].set(update_one(stack[i], *arguments))

        # A kernel updates a stack in place, but inside a loop it would be given copies. On a mesh
        # the loop is needed nonetheless: the basis of one matrix at a time is gathered, and the
        # weights keep their sharding.
        if add is not lift.lift_and_add and partition is None:
            new = jax.vmap(update_one)(stack, *rest)
        else:
            new = lax.fori_loop(0, len(stack), update_at, stack)
        return new.reshape(matrices.shape)

    run = partial(use_implementation, basis.implementation, lift.lift_and_add, update_all)
    matrices, others = projection.view.to_matrices(param), _updates_of(basis, update, key)
    return projection.view.from_matrices(map_batch(partition, run, matrices, *others))


def _updates_of(basis: Basis, update: Any, key: Any) -> tuple[Any, jax.Array, jax.Array | None]:
    """For each matrix of a leaf: its bases and coordinates, its decay and its seed."""
    decay = jnp.broadcast_to(0 if update.decay is None else update.decay, basis.age.shape)
    seeds = None if key is None else jax.random.bits(key, (*basis.age.shape, 2), jnp.uint32)
    return (basis.vectors, update.value), decay, seeds


@jax.jit
def _lift_and_add_to_int8(basis: Basis, update: Any, param: Int8, key: Any) -> Int8:
    """`_lift_and_add` to weights in 8 bits, of which a part of one matrix is in float32 at a time.

    All of them are if their matrices are not the last two axes of the array.
    """
    projection, batch = basis.projection, basis.age.ndim
    if projection.view != MatrixView(param.shape, (batch,), (batch + 1,)):
        new = _lift_and_add(basis, update, param.float32(), None)
        return quantized(new, param.dtype, _seed(key))
    stack, *rest = flatten_batch((param, *_updates_of(basis, update, key)), batch)

    def update_at(i: Any, stack: Int8) -> Int8:
        matrix, (parts, decay, seed) = jax.tree.map(lambda array: array[i], (stack, rest))
        left, right, is_transposed = projection.factors(*parts)

        def new_rows(first: Any, weights: jax.Array) -> jax.Array:
            rows = lax.dynamic_slice_in_dim(left, first, len(weights))
            add = partial(lift.lift_and_add, right_is_transposed=is_transposed)
            return add(weights, rows, right, basis.scale, decay)

        new = update_rows(matrix, new_rows, seed)
        return jax.tree.map(lambda stack, new: stack.at[i].set(new), stack, new)

    new = update_at(0, stack) if not batch else lax.fori_loop(0, basis.age.size, update_at, stack)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), new, param)


def _add_to_int8(param: Int8, update: jax.Array, key: Any) -> Int8:
    """The weights in 8 bits after a full update."""

    def new_rows(first: Any, weights: jax.Array) -> jax.Array:
        return weights + lax.dynamic_slice_in_dim(widened(update), first, len(weights))

    return update_rows(param, new_rows, _seed(key))


def _seed(key: Any) -> jax.Array | None:
    return None if key is None else jax.random.bits(key, (2,), jnp.uint32)


def _update_matrix(
    projection: Projection,
    partition: Partition | None,
    add: Callable[..., jax.Array],
    scale: jax.Array,
    weights: jax.Array,
    parts: tuple[dict[Side, Any], jax.Array],
    decay: jax.Array,
    seed: jax.Array | None,
) -> jax.Array:
    """The new weights of one matrix, on a mesh without moving any part of them.

    Args:
      projection, partition: of the matrix.
      add: `ops.lift.lift_and_add`, or a kernel of that name.
      scale: of the lifted update.
      weights: the matrix.
      parts: its bases and the coordinates of its update.
      decay: the fraction of the weights that is subtracted.
      seed: of stochastic rounding.
    """
    left, right, is_transposed = projection.factors(*parts)
    add = partial(add, right_is_transposed=is_transposed)
    if partition is not None:
        add = _on_parts(add, partition.trailing(2), is_transposed)
    return add(weights, left, right, scale, decay, seed)


def _on_parts(
    add: Callable[..., jax.Array], partition: Partition, right_is_transposed: bool
) -> Callable[..., jax.Array]:
    """`add` on the part of a matrix that each device has."""
    rows, columns = partition.axes
    cut = lambda *names: PartitionSpec(*(each or None for each in names))

    def add_to_part(weights: jax.Array, *others: Any) -> jax.Array:
        index = lambda names: lax.axis_index(names) if names else 0
        start = index(rows) * weights.shape[0], index(columns) * weights.shape[1]
        return add(weights, *others, start=start)

    matrix, whole = cut(rows, columns), PartitionSpec()
    right = cut(columns, ()) if right_is_transposed else cut((), columns)
    in_specs = matrix, cut(rows, ()), right, whole, whole, whole
    return partition.map_parts(add_to_part, in_specs, matrix)


def _at_least_float32(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return widened(x)


def _rounded(x: jax.Array, dtype: Any, key: jax.Array | None) -> jax.Array:
    if key is None or dtype != jnp.bfloat16:
        return x.astype(dtype)
    return stochastic_round(x, key)
