"""GaLore as an optax transformation (arXiv 2403.03507, algorithm 2).

The paper's algorithm, and where each line of it is:

    every T steps: P ← the leading r singular vectors of G   subspace.new_basis.refresh_if_due; or,
                                                             for projected gradients, a call of
                                                             galore_jax.refresh: grads.refresh
    R ← PᵀG                                                  Projection.project; or directly in
                                                             the backward pass:
                                                             grads.value_and_grad
    N ← Adam (or any optimizer) of R, with moments of R's    what comes after galore in the chain;
        shape                                                moments at a refresh: optim.moments
    W ← W − η α P N, where −η N is what the optimizer        apply_gradients: optim.apply, ops.lift;
        returns                                              or `update` of a chain: optim.chain

The mechanism: a `Coordinates` node replaces the parameter's leaf in the trees that
transformations after galore are initialised with and update, so their state is low-rank. The whole
algorithm in plain JAX is in `docs/algorithm.md`, and in plain NumPy, for the tests, in
`tests/reference.py`.
"""

import dataclasses
import warnings
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.implementation import Implementation
from galore_jax.ops.int8 import is_int8
from galore_jax.ops.precision import widened
from galore_jax.optim.chain import GaLore
from galore_jax.optim.galore_settings import Settings
from galore_jax.optim.galore_state import (
    GaLoreState,
    boxed_as,
    check_gradient,
    is_low_rank,
    map_bases,
    to_float32,
)
from galore_jax.subspace.basis import Basis, in_buffer_of
from galore_jax.subspace.new_basis import count_update, refresh_if_due
from galore_jax.subspace.projection import Coordinates, Moments, ProjType, is_coordinates
from galore_jax.subspace.rules import Rank, Rules
from galore_jax.types import PyTree


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
    implementation: Implementation = "xla",
    seed: int = 0,
) -> GaLore:
    """Projects gradients into low-rank subspaces (arXiv 2403.03507, algorithm 2).

    The last two axes of a leaf are matrices, the axes before them a batch. Biases, scales,
    embeddings, heads and norms, recognised by name, are not projected, nor is a leaf whose smaller
    side is not larger than the rank. Each matrix has a basis of its own, computed anew at updates
    0, T, 2T, … from that update's gradient. A matrix is skipped if its gradient is not finite or
    the sum of squares of its coordinates overflows float32: galore passes on zeros, and the chain
    puts weights and moments back as they were. Counts that all leaves share, such as Adam's,
    advance, and leaves that are not projected are not skipped. A refresh from a gradient that is
    zero, not finite, or has a sum of squares that is not, fails: the old basis stays, and the next
    full gradient is tried; with projected gradients the next attempts follow 1, 2, 4, … finite
    updates later, at most T.

    The updates that leave galore are float32: `Coordinates` for projected leaves, `(*batch, r,
    out)` with a left basis, `(*batch, in, r)` with a right one; full gradients for the others. Only
    if it was started by the `init` of a stock chain, with full parameters, does it lift the
    coordinates itself, unscaled.

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
        2410.16103, does; not for Adamax and centred RMSProp, whose `nu` are no mere second
        moments).
      lazy_overlap: if the mean squared cosine of the principal angles between the old and the new
        subspace is at least this, the matrix's own gap doubles, up to 8 T, otherwise it is T again
        (Q-GaLore, arXiv 2407.08296, compares single vectors). None: every gap is T.
      basis_dtype: dtype of the stored bases: float32 (None) or bfloat16; int8 and int4 store codes
        with a scale for each block, as 8-bit moments are stored.
      implementation: of the lift by `apply_gradients`: "xla", plain JAX; or "pallas", a kernel on
        platforms that have one: TPUs and NVIDIA GPUs. The kernels have been compiled for both and
        checked in an interpreter, but nobody has run or timed them on a device yet.
      seed: of the bases before the first gradient, and of "random".

    Returns:
      A transformation for `chain`, or for `optax.chain` with `galore_jax.init` and
      `apply_gradients`.

    Raises:
      ValueError: a setting out of range; at init, a rule that matches no leaf, or a rank, a rule or
        dimension numbers that do not fit a leaf (the message names it); at an update, a gradient of
        a projected leaf that is None or has the wrong shape, or a state that was started with
        another rank, side, refresh, basis_dtype, implementation or handling of moments.

    Warns:
      UserWarning: at init, there are matrices, but none is projected.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from galore_jax import apply_gradients, chain, galore
      >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.zeros(128)}
      >>> tx = chain(galore(rank=8), optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu")["kernel"].value.shape
      (8, 128)
      >>> params, state = apply_gradients(tx, jax.tree.map(jnp.ones_like, params), state, params)
    """
    settings = Settings(
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        proj_type=proj_type,
        refresh=refresh,
        weight_dimension_numbers=weight_dimension_numbers,
        rules=rules,
        moments=moments,
        lazy_overlap=lazy_overlap,
        basis_dtype=basis_dtype,
        implementation=implementation,
        seed=seed,
    )

    def init(params: PyTree) -> GaLoreState:
        if any(map(is_int8, jax.tree.leaves(params, is_leaf=is_int8))):
            raise ValueError(
                "galore: parameters in 8 bits need galore_jax.chain in place of optax.chain, whose "
                "other transformations would take their codes for numbers."
            )
        # Parameters that are given as `Coordinates`, as `chain` and `galore_jax.init` do, make the
        # state low-rank: what comes after galore is started with the same tree.
        lazy_overlap, seed = settings.overlap_and_seed()
        count = jnp.zeros([], jnp.int32)
        return GaLoreState(count, settings.start_bases(params), lazy_overlap, seed)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del params, extra_args
        low_rank = is_low_rank(state)
        lazy_overlap, seed = settings.overlap_and_seed()
        if not low_rank:
            _refuse_or_warn_of_full_size(settings)

        def at_leaf(basis: Basis, gradient: Any) -> tuple[Any, Basis]:
            # Scale and gap may be hyperparameters that change; the rest must be as at the start.
            basis = settings.applied_to(basis)
            projection = basis.projection
            check_gradient(gradient, projection)
            if is_coordinates(gradient):
                # Projected gradients are refreshed by a call of `galore_jax.refresh`, without which
                # bases stay as they are, at first random. It has rotated the moments as well, which
                # the chain must not do again.
                basis = dataclasses.replace(basis, refreshed=in_buffer_of(basis.refreshed, False))
                value = widened(gradient.value)  # Squares overflow early in float16.
            else:
                # New vectors for the matrices that are due, and coordinates in them.
                basis = refresh_if_due(basis, gradient, lazy_overlap, seed=seed, count=state.count)
                value = projection.project(basis.vectors, gradient)
            # Zeros for a matrix that is not finite. What is not finite in a gradient shows in its
            # coordinates, and an infinite sum of squares would end up in a second moment.
            finite = jnp.isfinite(jnp.sum(value**2, axis=(-2, -1)))
            value = jnp.where(finite[..., None, None], value, 0)
            basis = count_update(basis, finite)
            if not low_rank:
                return projection.lift(basis.vectors, value).astype(gradient.dtype), basis
            return Coordinates(value, projection), basis

        # `map_bases` calls this with the basis and the gradient of each projected leaf.
        pairs = map_bases(at_leaf, state.bases, updates, otherwise=state.bases)
        bases = map_bases(lambda _, pair: pair[1], state.bases, pairs, otherwise=state.bases)
        unprojected = to_float32(updates) if low_rank else updates
        new = map_bases(lambda _, pair: pair[0], state.bases, pairs, otherwise=unprojected)
        new = new if low_rank else boxed_as(updates, new)
        return new, GaLoreState(optax.safe_increment(state.count), bases, lazy_overlap, seed)

    return GaLore(init, update)


def _refuse_or_warn_of_full_size(settings: Settings) -> None:
    if settings.moments != "keep":
        raise ValueError(
            f'galore: moments="{settings.moments}" needs low-rank moments, but galore was started '
            "with tx.init(params): use galore_jax.chain in place of optax.chain, or start with "
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
