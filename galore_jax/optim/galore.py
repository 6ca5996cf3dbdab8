"""GaLore as an optax transformation (arXiv 2403.03507, algorithm 2).

The paper's algorithm, and where each line of it is:

    every T steps: P ← the leading r singular vectors of G     subspace.refresh.refresh_basis
    R ← PᵀG                                                    Projection.project; or
                                                               directly in the backward pass: grads
    Adam (or any optimizer) on R, with moments of R's shape    what comes after galore in the chain
    W ← W + η · α P N                                          optim.apply, or chain's own lift

The mechanism: a `Coordinates` node replaces the parameter's leaf in the trees that
transformations after galore are initialised with and update, so their state is low-rank. The
algorithm in plain NumPy, which the tests compare with step by step, is `tests/reference.py`.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.dtypes import widened
from galore_jax.optim.chain import GaLore
from galore_jax.optim.flax_serialization import register_if_flax_imported
from galore_jax.optim.nonfinite import zero_nonfinite
from galore_jax.optim.state import (
    GaLoreState,
    boxed_as,
    check_gradient,
    is_low_rank,
    map_bases,
    to_float32,
)
from galore_jax.subspace.basis import Basis, count_update, start_basis
from galore_jax.subspace.matrix_view import unboxed
from galore_jax.subspace.projection import (
    MOMENTS,
    Coordinates,
    Moments,
    Projection,
    ProjType,
    is_coordinates,
)
from galore_jax.subspace.refresh import refresh_basis
from galore_jax.subspace.rules import (
    Rank,
    Rule,
    Rules,
    check_number,
    projection_of,
    projections,
    rule_for,
    static_hint,
    warn_if_nothing_projected,
)
from galore_jax.types import PyTree

BASIS_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8)))


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
    lazy_overlap: float | None = None,
    basis_dtype: Any = None,
    seed: int = 0,
) -> GaLore:
    """Projects gradients into low-rank subspaces (arXiv 2403.03507, algorithm 2).

    The last two axes of a leaf are matrices, the axes before them a batch. Biases, scales,
    embeddings, heads and norms, recognised by name, are not projected, nor is a leaf whose smaller
    side is not larger than the rank. Each matrix has a basis of its own, computed anew at updates
    0, T, 2T, … from that update's gradient. A matrix is skipped if its gradient is not finite or
    the sum of squares of its coordinates overflows float32: its weights, moments and basis stay as
    they are, and a refresh that was due takes place at the next finite gradient (that of projected
    gradients 1, 2, 4, … updates later).

    The updates that leave galore are float32: `Coordinates` for projected leaves, `(*batch, r,
    out)` with a left basis, `(*batch, in, r)` with a right one; full gradients for the others.

    Args:
      rank: number of basis vectors r, an integer; or a fraction of the smaller side, or a function
        from the matrix's shape (in, out) to an integer.
      update_proj_gap: number of finite updates between refreshes, the paper's T.
      scale: factor of the lifted update, the paper's α.
      proj_type: "std" (the paper) projects the smaller side, for a square kernel the in side;
        "reverse_std" the other one; "left" the in axis and "right" the out axis (of Flax kernels,
        (in, out); for the reference's torch weights, (out, in), they are swapped); "full" both
        (with an exact method the coordinates are diagonal at a refresh, up to rounding, and Adam
        normalises that rounding).
      refresh: "subspace_iteration" (matrix products and r × r factorisations, warm-started), "eigh"
        (exact, from the smaller Gram matrix), "svd" (exact, slow) or "random" (independent of the
        gradient).
      weight_dimension_numbers: which axes are in and out, as in `optax.contrib.galore`, for
        kernels with heads or of convolutions. The leaves named here are projected whatever their
        name is.
      rules: by pattern of the path, a glob or a compiled regular expression, a `Rule` for the
        leaves it matches, or None not to project them. The first match wins, and a leaf that a
        `Rule` matches is projected even if it is an embedding, a head or part of a norm.
      moments: what a refresh does with the moments of the matrix, whatever optimizer keeps them:
        "keep" (the reference) or "rotate" (express them in the new basis, as LDAdam, arXiv
        2410.16103, does; not for Adamax, whose `nu` is no second moment).
      lazy_overlap: if the mean squared cosine of the principal angles between the old and the new
        subspace is at least this, the matrix's own gap doubles, up to 8 T, otherwise it is T again
        (Q-GaLore, arXiv 2407.08296, compares single vectors). None: every gap is T.
      basis_dtype: dtype of the stored bases: float32 (None) or bfloat16; int8 stores codes with a
        scale for each block, as 8-bit moments are stored.
      seed: of the bases before the first gradient, and of "random".

    Returns:
      A transformation for `chain`, or for `optax.chain` with `init` and `apply_gradients`.

    Raises:
      ValueError: a setting out of range; at init, a rule that matches no leaf, or a rank, a rule or
        dimension numbers that do not fit a leaf (the message names it); at an update, a gradient of
        a projected leaf that is None or has the wrong shape, or a state that was started with
        another rank, side, refresh, basis_dtype or handling of moments.

    Warns:
      UserWarning: at init, there are matrices, but none is projected.

    Examples:
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
    if not isinstance(rules, Mapping | None):
        raise ValueError(f"galore: rules must be a mapping from patterns to Rules, not {rules!r}.")
    rules = dict(rules or {})
    if moments not in MOMENTS:
        raise ValueError(f"galore: moments must be one of {', '.join(MOMENTS)}, not {moments!r}.")
    for pattern, rule in rules.items():
        if not isinstance(rule, Rule | None):
            raise ValueError(
                f"galore: the rule for {pattern!r} is {rule!r}; give a galore_jax.Rule, or None "
                "not to project its leaves."
            )
    dtype_of_bases = _basis_dtype(basis_dtype)
    check_number("lazy_overlap", lazy_overlap, "above 0 and at most 1", lambda x: 0 < x <= 1)
    check_number("seed", seed, "a whole number", lambda seed: isinstance(seed, Integral))

    def complete(projection: Projection) -> Rule:
        return (rule_for(projection.path, rules)[1] or Rule()).or_else(default)

    def check_settings(basis: Basis) -> None:
        """Checks that the state was started with these settings, as far as it depends on them."""
        found, (_, rule) = basis.projection, rule_for(basis.projection.path, rules)
        wanted = rule and projection_of(found.path, found.view, rule, default)
        stored = jax.tree.leaves(basis.vectors)[0].dtype  # of the codes, if they are quantised
        pairs: dict[str, tuple[Any, Any]] = {
            "rank": (found.rank, wanted and wanted.rank),
            "sides": (found.sides, wanted and wanted.sides),
            "refresh": (basis.method, complete(found).refresh),
            "moments": (basis.moments, moments),
            "basis_dtype": (stored.name, dtype_of_bases.name),
        }
        for name, (old, new) in pairs.items():
            if old != new:
                raise ValueError(
                    f"galore: the state of {found.name} was started with {name} = {old!r}, which "
                    f"is {new!r} here: use the optimizer that it was started with, or start anew."
                )

    def init_fn(params: PyTree) -> GaLoreState:
        register_if_flax_imported()
        leaves, tree = jax.tree.flatten(params, is_leaf=is_coordinates)
        if not leaves:  # A placeholder, as `optax.tree.map_params` uses.
            return GaLoreState(jnp.zeros([], jnp.int32), params, *settings())
        # What is projected.
        leaf_projections = tree.flatten_up_to(
            projections(params, default, rules, weight_dimension_numbers)
        )
        if not any(leaf_projections):
            warn_if_nothing_projected(params, rules, weight_dimension_numbers)
        # A random basis for each projected leaf.
        bases = []
        for leaf, projection in zip(leaves, leaf_projections, strict=True):
            if projection is None:
                bases.append(optax.MaskedNode())
                continue
            rule = complete(projection)
            basis = start_basis(
                projection,
                scale=rule.scale,
                interval=rule.update_proj_gap,
                method=str(rule.refresh),
                moments=moments,
                full_size=not is_coordinates(leaf),
                dtype=dtype_of_bases,
                seed=seed,
            )
            bases.append(basis)
        count = jnp.zeros([], jnp.int32)
        # Without boxes: the axis names in them are the parameter's, not those of a basis.
        tree = jax.tree.structure(unboxed(params), is_leaf=is_coordinates)
        return GaLoreState(count, jax.tree.unflatten(tree, bases), *settings())

    def settings() -> tuple[jax.Array | None, jax.Array]:
        # Kept in the state for `refresh`, which works from the state alone.
        # Copies, as arrays among the settings outlive a donated state.
        lazy = None if lazy_overlap is None else jnp.array(lazy_overlap, jnp.float32)
        return lazy, jnp.array(seed if isinstance(seed, jax.Array) else seed % 2**32, jnp.uint32)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args):
        del params, extra_args
        low_rank = is_low_rank(state)
        if not low_rank:
            _check_low_rank(moments)
        lazy, seed = settings()

        def at_leaf(old: Basis, gradient: Any) -> tuple[Any, Basis]:
            projection, rule = old.projection, complete(old.projection)
            check_settings(old)
            check_gradient(gradient, projection)
            basis = dataclasses.replace(
                old,
                scale=jnp.asarray(rule.scale, jnp.float32),
                interval=jnp.array(rule.update_proj_gap, jnp.int32),
            )
            if is_coordinates(gradient):
                value = widened(gradient.value)  # Squares overflow early in float16.
            else:
                basis = refresh_basis(basis, gradient, lazy, seed=seed, count=state.count)
                value = projection.project(basis.vectors, gradient)
            value, finite = zero_nonfinite(value)
            update = Coordinates(value, projection)
            if basis.full_size:
                update = projection.lift(basis.vectors, value).astype(gradient.dtype)
            return update, _using_settings_of(old, count_update(basis, finite))

        pairs = map_bases(at_leaf, state.bases, updates, otherwise=state.bases)
        bases = map_bases(lambda _, pair: pair[1], state.bases, pairs, otherwise=state.bases)
        unprojected = to_float32(updates) if low_rank else updates
        new = map_bases(lambda _, pair: pair[0], state.bases, pairs, otherwise=unprojected)
        updates = new if low_rank else boxed_as(updates, new)
        return updates, GaLoreState(optax.safe_increment(state.count), bases, lazy, seed)

    return GaLore(init_fn, update_fn)


def _using_settings_of(old: Basis, new: Basis) -> Basis:
    """The new basis, computed so that its settings depend on those of the old one.

    JAX drops arguments that nothing depends on. It would then give the buffers of the donated state
    to other numbers than those they hold, all of which XLA would copy at each step.
    """
    same = lambda old, new: jnp.where(old == new, old, new)
    scale, interval = same(old.scale, new.scale), same(old.interval, new.interval)
    return dataclasses.replace(new, scale=scale, interval=interval)


def _basis_dtype(basis_dtype: Any) -> jnp.dtype:
    is_array = isinstance(basis_dtype, jax.Array)
    if not is_array:
        with suppress(TypeError):  # not a dtype
            found = jnp.dtype(jnp.float32 if basis_dtype is None else basis_dtype)
            if found in BASIS_DTYPES:
                return found
    names = ", ".join(dtype.name for dtype in BASIS_DTYPES)
    hint = f"; {static_hint('basis_dtype')}" if is_array else ""
    raise ValueError(f"galore: basis_dtype must be one of {names}, not {basis_dtype!r}{hint}.")


def _check_low_rank(moments: Moments) -> None:
    if moments != "keep":
        raise ValueError(
            f'galore: moments="{moments}" needs low-rank moments, but galore was started with '
            "tx.init(params): use galore_jax.chain in place of optax.chain, or start with "
            "galore_jax.init(tx, params)."
        )
    _warn_of_full_size()


@cache
def _warn_of_full_size() -> None:
    """Warns once per process."""
    warnings.warn(
        "galore was started with tx.init(params), so the optimizer after it keeps full-size "
        "moments, scale has no effect, and a matrix whose gradient is not finite still takes the "
        "step of a gradient of zeros. Use galore_jax.chain in place of optax.chain, or start with "
        "galore_jax.init(tx, params) and step with galore_jax.apply_gradients.",
        stacklevel=2,
    )
