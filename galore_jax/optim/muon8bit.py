"""Full-rank Muon with its moment in 8 bits: what a low rank has to be compared with.

Like Fira and APOLLO it is an ordinary optax transformation of full gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_jax.ops.implementation import Implementation
from galore_jax.optim.adam8bit import scale_by_adam8bit
from galore_jax.optim.muon import scale_by_muon
from galore_jax.subspace.matrix_view import MatrixView
from galore_jax.subspace.rules import Rule, Rules, projections
from galore_jax.types import Mask, PyTree


def muon8bit(
    learning_rate: optax.ScalarOrSchedule,
    scale: float = 1.0,
    *,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    rules: Rules | None = None,
    weight_dimension_numbers: PyTree = None,
    implementation: Implementation = "xla",
) -> optax.GradientTransformation:
    """Muon for whole matrices and AdamW for everything else, with all moments in 8 bits.

    A matrix is updated by `lr · scale · 0.2 √max(in, out) · O`, where O is its orthogonalised
    momentum, see `scale_by_muon`: it keeps one byte per parameter, AdamW in float32 eight. The
    matrices are those that `galore` would project at some rank.

    It takes full gradients: those of `jax.value_and_grad`, or of `make_step`, layer by layer too. A
    gradient that is not finite is not skipped: put `optax.apply_if_finite` around it.

    Args:
      learning_rate: a number, or a schedule of the update count.
      scale: factor of the learning rate of the matrices.
      beta: decay of the moment of the matrices.
      b1: decay of the first moment of the other leaves.
      b2: decay of their second moment.
      eps: added to the square root of their second moment.
      weight_decay: as for `optax.adamw`.
      mask: as for `optax.adamw`.
      rules: as for `galore`, which leaves are matrices: `{"*router*": None}` leaves some to AdamW.
      weight_dimension_numbers: as for `galore`.
      implementation: of AdamW's moments, "xla" or "pallas"; see `scale_by_adam8bit`.

    Returns:
      An optax transformation.

    Raises:
      ValueError: at init, a rule that matches no leaf, or dimension numbers that do not fit one.

    Examples:
      >>> import galore_jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)}
      >>> tx = galore_jax.muon8bit(0.02, 0.5)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
    """
    return optax.chain(
        scale_by_muon8bit(
            scale,
            beta=beta,
            b1=b1,
            b2=b2,
            eps=eps,
            rules=rules,
            weight_dimension_numbers=weight_dimension_numbers,
            implementation=implementation,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_muon8bit(
    scale: float = 1.0,
    *,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    rules: Rules | None = None,
    weight_dimension_numbers: PyTree = None,
    implementation: Implementation = "xla",
) -> optax.GradientTransformation:
    """The step of `muon8bit`, without its learning rate and decay, for chains of your own."""
    by_label: dict[Any, optax.GradientTransformation] = {
        "matrix": optax.chain(scale_by_muon(beta, eight_bit=True), optax.scale(scale)),
        "rest": scale_by_adam8bit(b1, b2, eps, implementation=implementation),
    }

    def views_and_optimizer(tree: PyTree) -> tuple[list[MatrixView | None], Any]:
        """The view of each leaf, None for the rest, and Muon and AdamW for these leaves."""
        rule = Rule(rank=1, proj_type="std")
        found = projections(tree, rule, rules or {}, weight_dimension_numbers)
        structure = jax.tree.structure(tree)
        views = [each and each.view for each in structure.flatten_up_to(found)]
        labels = ["matrix" if view else "rest" for view in views]
        return views, optax.partition(by_label, structure.unflatten(labels))

    def mapped(function: Callable[..., Any], views: list[Any], tree: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        pairs = zip(views, leaves, strict=True)
        return structure.unflatten([function(view, leaf) if view else leaf for view, leaf in pairs])

    def init(params: PyTree) -> Any:
        views, tx = views_and_optimizer(params)
        return tx.init(mapped(MatrixView.to_matrices, views, params))

    def update(updates: PyTree, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        views, tx = views_and_optimizer(updates)
        updates, state = tx.update(mapped(MatrixView.to_matrices, views, updates), state)
        return mapped(MatrixView.from_matrices, views, updates), state

    return optax.GradientTransformation(init, update)
