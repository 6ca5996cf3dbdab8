"""GaLore as an optax transformation (arXiv 2403.03507).

`galore` turns the gradient of each matrix into its coordinates in a low-rank basis; whatever optax
transformation comes after it works on the coordinates, so its state is low-rank; the end lifts
the result back. One mechanism carries it: a `Coordinates` node stands in the tree where the
parameter's leaf stood, in what `init` hands to the transformations and in what `galore` emits.
"""

import dataclasses
import math
import warnings
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.chain import GaLore
from galore_jax.projection import (
    MOMENTS,
    Basis,
    Coordinates,
    Moments,
    Projection,
    ProjType,
    is_basis,
    is_coordinates,
)
from galore_jax.rules import Rank, Rule, Rules, projections, rule_for
from galore_jax.state import GaLoreState, is_low_rank, map_bases, to_float32
from galore_jax.subspace import NEVER, random_basis, refresh_due

PyTree = Any


def galore(
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    proj_type: ProjType = "std",
    refresh: str = "subspace_iteration",
    weight_dimension_numbers: PyTree = None,
    rules: Rules | None = None,
    moments: Moments = "keep",
    stagger: bool = False,
    lazy_overlap: float | None = None,
    max_gap: int | None = None,
    basis_dtype: Any = None,
    seed: int = 0,
) -> GaLore:
    """Projects gradients into low-rank bases (arXiv 2403.03507, algorithm 2).

    Matrices are the last two axes of a leaf, axes before them a batch; biases, scales, embeddings,
    heads and norms stay whole, by name, and so does a leaf whose smaller side is not larger than
    the rank. Each matrix has a basis of its own, made anew at updates 0, T, 2T, … from that
    update's gradient. A matrix whose gradient is not finite is left out of the update: its weights,
    moments and basis stay as they are, a refresh that was due takes place at the next finite one.

    What leaves galore is float32: `Coordinates` of projected leaves, `(*batch, r, out)` for a left
    basis, `(*batch, in, r)` for a right one; other gradients whole.

    Args:
      rank: number of basis vectors r; or a fraction of the smaller side, or a function of the
        matrix's shape (in, out) that returns a number.
      update_proj_gap: finite updates between refreshes, the paper's T.
      scale: factor of the lifted update, the paper's α.
      proj_type: "std" (the paper) projects the smaller side, of a square kernel the in side;
        "reverse_std" the other one; "left" the in axis, "right" the out axis (of Flax kernels,
        (in, out): those of the reference, for torch's (out, in), flip); "full" both.
      refresh: "subspace_iteration" (matmuls only, warm-started), "eigh" (exact, from the smaller
        Gram matrix), "svd" (exact, slow) or "random" (whatever the gradient).
      weight_dimension_numbers: which axes are in and out, as in `optax.contrib.galore`, for
        kernels with heads or of convolutions; see `matrices.matrix_views`. Leaves named here are
        projected whatever their name is.
      rules: by pattern of the path, a glob or a compiled regular expression, a `Rule` for the
        leaves it matches, or None to leave them whole. The first match wins, and a leaf that a
        `Rule` matches is projected whatever its name is.
      moments: what a refresh does with the moments of the matrix, whatever optimizer keeps them:
        "keep" (the reference), "reset" (start anew, with bias correction by the basis' own age),
        or "rotate" (into the new basis; see `moments.rotated`).
      stagger: spread the refreshes after update 0 evenly over the interval, so that no later step
        has to do them all.
      lazy_overlap: where the mean squared cosine of the principal angles between the old and the
        new subspace is at least this, the matrix's own gap doubles, else it is T again (Q-GaLore,
        arXiv 2407.08296, section 3.2, has the cosine of single vectors). None: every gap is T.
      max_gap: the bound of a doubled gap; None: 8 T.
      basis_dtype: of the stored bases; None: float32.
      seed: of the bases before the first gradient, and of "random".

    Returns:
      A transformation for `chain`, or for `optax.chain` with `init` and `apply_gradients`.

    Raises:
      ValueError: a setting out of range; at init, a rule without a leaf, or a rank, a rule or
        dimension numbers that do not fit the leaf that is named.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from galore_jax import apply_gradients, chain, galore
      >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.zeros(128)}
      >>> tx = chain(galore(rank=8), optax.adam(1e-3))  # or galore(rank=8)(optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu")["kernel"].value.shape
      (8, 128)
      >>> params, state = apply_gradients(tx, jax.tree.map(jnp.ones_like, params), state, params)
    """
    default = Rule(rank, proj_type, scale, update_proj_gap, refresh)
    rules = dict(rules or {})
    if moments not in MOMENTS:
        raise ValueError(f"galore: moments must be one of {', '.join(MOMENTS)}, not {moments!r}.")

    def settings(projection: Projection) -> Rule:
        rule = rule_for(projection.path, rules)[1] or Rule()
        return rule.or_else(default)

    def init_fn(params: PyTree) -> GaLoreState:
        found = projections(params, default, rules, weight_dimension_numbers)
        leaves, tree = jax.tree.flatten(params, is_leaf=is_coordinates)
        found = tree.flatten_up_to(found)
        total = sum(math.prod(p.view.batch) for p in found if p is not None)
        keys = jax.random.split(jax.random.key(seed), len(leaves) + 1)
        before, bases = 0, []
        for leaf, projection, key in zip(leaves, found, keys[1:], strict=True):
            if projection is None:
                bases.append(optax.MaskedNode())
                continue
            gap = settings(projection).update_proj_gap
            batch, number = projection.view.batch, math.prod(projection.view.batch)
            if stagger:
                gap = gap - (before + jnp.arange(number).reshape(batch)) * gap // total
            before += number
            side_keys = jax.random.split(key, 2)
            vectors = {
                side: random_basis(side_key, shape).astype(basis_dtype or jnp.float32)
                for side_key, (side, shape) in zip(
                    side_keys, projection.basis_shapes.items(), strict=False
                )
            }
            bases.append(
                Basis(
                    vectors=vectors,
                    age=jnp.full(batch, NEVER, jnp.int32),
                    gap=jnp.asarray(jnp.broadcast_to(gap, batch), jnp.int32),
                    skipped=jnp.zeros(batch, jnp.int32),
                    saved=jnp.zeros(batch, jnp.int32),
                    overlap=jnp.zeros(batch, jnp.float32),
                    scale=jnp.asarray(settings(projection).scale, jnp.float32),
                    projection=projection,
                    moments=moments,
                    full_size=not is_coordinates(leaf),
                )
            )
        return GaLoreState(jnp.zeros([], jnp.int32), jax.tree.unflatten(tree, bases))

    def next_gap(rule: Rule, basis: Basis, overlap: jax.Array) -> jax.Array:
        usual = jnp.full_like(basis.gap, rule.update_proj_gap)
        longer = usual
        if lazy_overlap is not None:
            bound = 8 * usual if max_gap is None else max_gap
            doubled = jnp.minimum(2 * jnp.maximum(basis.gap, usual), bound)
            longer = jnp.where(overlap >= lazy_overlap, doubled, usual)
        # The first interval of a staggered matrix is the part of one that was given to it.
        return jnp.where(basis.age >= NEVER, basis.gap, longer)

    def refreshed(basis: Basis, gradient: jax.Array, count: Any, number: int) -> Basis:
        rule, batch = settings(basis.projection), basis.age.shape
        matrices = basis.projection.view.to_matrices(gradient)
        flat = lambda array: array.reshape(-1, *array.shape[len(batch) :])  # noqa: E731
        vectors, new, overlap = refresh_due(
            jax.tree.map(flat, basis.vectors),
            flat(basis.age),
            flat(basis.gap),
            flat(matrices),
            (seed, count, number),
            rule.refresh or "",
        )
        new, overlap = new.reshape(batch), overlap.reshape(batch)
        return dataclasses.replace(
            basis,
            vectors=jax.tree.map(lambda v, old: v.reshape(old.shape), vectors, basis.vectors),
            age=jnp.where(new, 0, basis.age),
            gap=jnp.where(new, next_gap(rule, basis, overlap), basis.gap),
            overlap=jnp.where(new, overlap, basis.overlap),
        )

    def counted(basis: Basis, finite: jax.Array) -> Basis:
        rule = settings(basis.projection)
        age = basis.age + finite
        saved = finite & (age < basis.gap) & (age % rule.update_proj_gap == 0)
        return dataclasses.replace(
            basis,
            age=age,
            skipped=basis.skipped + ~finite,
            saved=basis.saved + saved,
            scale=jnp.asarray(rule.scale, jnp.float32),
        )

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args):
        del params, extra_args
        low_rank = is_low_rank(state)
        if not low_rank:
            _refuse_full_size(moments)
        numbers = iter(range(len(jax.tree.leaves(state.bases, is_leaf=is_basis))))

        def at_leaf(basis: Basis, gradient: Any) -> tuple[Any, Basis]:
            number = next(numbers)
            if is_coordinates(gradient):
                value = gradient.value
            else:
                basis = refreshed(basis, gradient, state.count, number)
                value = basis.projection.project(basis.vectors, gradient)
            # Any number of G that is not finite shows in R.
            finite = jnp.all(jnp.isfinite(value), axis=(-2, -1))
            value = jnp.where(finite[..., None, None], value, 0)
            if basis.full_size:
                update = basis.projection.lift(basis.vectors, value).astype(gradient.dtype)
            else:
                update = Coordinates(value, basis.projection)
            return update, counted(basis, finite)

        pairs = map_bases(at_leaf, state.bases, updates, otherwise=state.bases)
        bases = map_bases(lambda _, pair: pair[1], state.bases, pairs, otherwise=state.bases)
        whole = to_float32(updates) if low_rank else updates
        updates = map_bases(lambda _, pair: pair[0], state.bases, pairs, otherwise=whole)
        return updates, GaLoreState(optax.safe_increment(state.count), bases)

    return GaLore(init_fn, update_fn)


def _refuse_full_size(moments: Moments) -> None:
    if moments != "keep":
        raise ValueError(
            f'galore: moments="{moments}" needs low-rank moments, but galore was started with '
            "tx.init(params): use galore_jax.chain in place of optax.chain, or start with "
            "galore_jax.init(tx, params)."
        )
    _warn_of_full_size()


@cache
def _warn_of_full_size() -> None:
    """Once a process."""
    warnings.warn(
        "galore was started with tx.init(params), so the optimizer after it keeps full-size "
        "moments. For low-rank ones use galore_jax.chain in place of optax.chain, or start with "
        "galore_jax.init(tx, params) and step with galore_jax.apply_gradients.",
        stacklevel=2,
    )
