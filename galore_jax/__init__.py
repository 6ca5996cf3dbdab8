"""GaLore in JAX: memory-efficient full-parameter training as an optax transformation."""

from galore_jax.apply import apply_gradients
from galore_jax.describe import describe
from galore_jax.optimizers import adamw, decay_weights
from galore_jax.state import ChainState, GaLoreState
from galore_jax.subspace import Basis, Coordinates
from galore_jax.transform import chain, galore, init

__all__ = [
    "Basis",
    "ChainState",
    "Coordinates",
    "GaLoreState",
    "adamw",
    "apply_gradients",
    "chain",
    "decay_weights",
    "describe",
    "galore",
    "init",
]
