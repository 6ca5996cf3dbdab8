"""How the subspaces do: numbers of a step that show whether rank, gap and scale fit.

Always, with GaLore, over all projected matrices:

    subspace_overlap  how much of the old subspace the last refresh kept: the mean squared cosine
                      of the principal angles between old and new. Up to a matrix's second refresh
                      the old one is random, and it is about rank / side.
    refreshes_saved   refreshes that lazily doubled gaps have saved so far
    skipped           updates left out so far because a matrix's gradient was not finite

With `training.diagnostics`, which costs a product of the gradient with each basis and a copy of the
projected weights:

    captured_energy   the part of the gradients' sum of squares that lies in the subspaces
    update_ratio      how far the weights moved over their size, both as root sums of squares
"""

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.optim.state import bases_of, galore_states, map_bases
from galore_jax.subspace.basis import Basis
from galore_jax.types import PyTree


def subspace_metrics(opt_state: PyTree) -> dict[str, jax.Array]:
    """`subspace_overlap`, `refreshes_saved`, `skipped`; nothing where nothing is projected."""
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
    """`captured_energy` and `update_ratio`; nothing where nothing is projected.

    Args:
      opt_state: after the step, with its bases.
      gradients: of the step; matrices in which one is not finite do not count.
      old: the parameters before the step.
      new: the parameters after it.

    Returns:
      float32 scalars by name.
    """

    def sums_of_squares(basis: Basis, gradient: Any, old: Any, new: Any) -> jax.Array:
        projection, view = basis.projection, basis.projection.view
        whole = _squares(view.to_matrices(gradient))
        held = _squares(projection.project(basis.vectors, gradient))
        finite = jnp.isfinite(whole)
        old, new = old.astype(jnp.float32), new.astype(jnp.float32)
        energies = [jnp.where(finite, held, 0), jnp.where(finite, whole, 0)]
        sizes = [_squares(view.to_matrices(new - old)), _squares(view.to_matrices(old))]
        return jnp.stack([part.sum() for part in energies + sizes])

    sums = []
    for state in galore_states(opt_state, inside_chains=True):
        found = map_bases(sums_of_squares, state.bases, gradients, old, new, otherwise=state.bases)
        sums += jax.tree.leaves(found)
    if not sums:
        return {}
    held, whole, moved, size = sum(sums, jnp.zeros(4))
    return {"captured_energy": held / whole, "update_ratio": jnp.sqrt(moved / size)}


def _squares(matrices: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(matrices.astype(jnp.float32)), axis=(-2, -1))
