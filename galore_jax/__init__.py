"""GaLore in JAX: memory-efficient full-parameter training as an optax transformation."""

from galore_jax.apply import apply_gradients
from galore_jax.chain import chain, init
from galore_jax.describe import describe
from galore_jax.links import clip_by_finite_norm, decay_weights, scale_by_factored_rms
from galore_jax.optimizers import adafactor, adamw, lion
from galore_jax.projection import Basis, Coordinates
from galore_jax.rules import Rule
from galore_jax.state import ChainState, GaLoreState
from galore_jax.transform import galore

__all__ = [
    "Basis",
    "ChainState",
    "Coordinates",
    "GaLoreState",
    "Rule",
    "adafactor",
    "adamw",
    "apply_gradients",
    "chain",
    "clip_by_finite_norm",
    "decay_weights",
    "describe",
    "galore",
    "init",
    "lion",
    "scale_by_factored_rms",
]
