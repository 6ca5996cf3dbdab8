"""Metrics of the subspaces, which show whether rank, gap and scale are well chosen.

With GaLore, over all projected matrices:

    subspace_overlap  overlap of the old and new subspaces at the last refresh: the mean squared
                      cosine of the principal angles between them. Before a matrix's second refresh
                      the old subspace is random, and the overlap is about rank / side.
    refreshes_saved   number of refreshes saved so far by lazily doubled gaps
    skipped           number of updates skipped so far because a matrix's gradient was not finite

With `training.diagnostics`, at the cost of a product of the gradient with each basis, a copy of the
projected weights and, with projected gradients, the full gradients:

    captured_energy   fraction of the gradients' sum of squares that is in the subspaces
    update_ratio      norm of the change of the weights over the norm of the weights
"""

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.optim.galore_state import bases_of, galore_states, map_bases
from galore_jax.subspace.basis import Basis
from galore_jax.types import PyTree


def subspace_metrics(opt_state: PyTree) -> dict[str, jax.Array]:
    """`subspace_overlap`, `refreshes_saved` and `skipped`; empty if nothing is projected."""
    bases = bases_of(galore_states(opt_state, inside_chains=True))
    if not bases:
        return {}
    overlap, saved, skipped = (
        jnp.concatenate([getattr(basis, name).reshape(-1) for basis in bases])
        for name in ("overlap", "saved", "skipped")
    )
    return {
        "subspace_overlap": overlap.mean(),
        "refreshes_saved": saved.sum(),
        "skipped": skipped.sum(),
    }


def energy_metrics(
    opt_state: PyTree, gradients: PyTree, old: PyTree, new: PyTree
) -> dict[str, jax.Array]:
    """`captured_energy` and `update_ratio`; empty if nothing is projected.

    Args:
      opt_state: the optimizer's state after the step.
      gradients: full gradients of the step; matrices with one that is not finite do not count.
      old: the parameters before the step.
      new: the parameters after the step.

    Returns:
      float32 scalars by name.
    """

    def sums_of_squares(basis: Basis, gradient: Any, old: Any, new: Any) -> jax.Array:
        projection, view = basis.projection, basis.projection.view
        total = _squares(view.to_matrices(gradient))
        captured = _squares(projection.project(basis.vectors, gradient))
        finite = jnp.isfinite(total)
        old, new = old.astype(jnp.float32), new.astype(jnp.float32)
        energies = [jnp.where(finite, captured, 0), jnp.where(finite, total, 0)]
        sizes = [_squares(view.to_matrices(new - old)), _squares(view.to_matrices(old))]
        return jnp.stack([part.sum() for part in energies + sizes])

    sums = []
    for state in galore_states(opt_state, inside_chains=True):
        by_basis = map_bases(
            sums_of_squares, state.bases, gradients, old, new, otherwise=state.bases
        )
        sums += jax.tree.leaves(by_basis)
    if not sums:
        return {}
    captured, total, change, size = sum(sums, jnp.zeros(4))
    return {"captured_energy": captured / total, "update_ratio": jnp.sqrt(change / size)}


def _squares(matrices: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(matrices.astype(jnp.float32)), axis=(-2, -1))
