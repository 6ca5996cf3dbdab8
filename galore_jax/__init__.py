"""GaLore in JAX: memory-efficient full-parameter training as an optax transformation."""

from galore_jax.grads import layerwise
from galore_jax.grads.describe import check_projection, describe
from galore_jax.grads.make_step import make_step
from galore_jax.grads.refresh import refresh, refresh_due
from galore_jax.grads.value_and_grad import value_and_grad
from galore_jax.ops.int8 import to_arrays
from galore_jax.optim.adam8bit import scale_by_adam8bit
from galore_jax.optim.aliases import adafactor, adamw, lion, muon
from galore_jax.optim.apollo import apollo
from galore_jax.optim.apply import apply_gradients
from galore_jax.optim.chain import chain
from galore_jax.optim.clipping import clip_by_finite_norm
from galore_jax.optim.fira import fira
from galore_jax.optim.galore import galore
from galore_jax.optim.muon import scale_by_muon
from galore_jax.optim.muon8bit import muon8bit
from galore_jax.optim.sharding import init, shardings, state_shardings
from galore_jax.optim.weight_decay import add_decayed_full_weights
from galore_jax.subspace.int8_params import to_int8
from galore_jax.subspace.projection import Coordinates
from galore_jax.subspace.rules import Rule

__all__ = [
    "Coordinates",
    "Rule",
    "adafactor",
    "adamw",
    "add_decayed_full_weights",
    "apollo",
    "apply_gradients",
    "chain",
    "check_projection",
    "clip_by_finite_norm",
    "describe",
    "fira",
    "galore",
    "init",
    "layerwise",
    "lion",
    "make_step",
    "muon",
    "muon8bit",
    "refresh",
    "refresh_due",
    "scale_by_adam8bit",
    "scale_by_muon",
    "shardings",
    "state_shardings",
    "to_arrays",
    "to_int8",
    "value_and_grad",
]
