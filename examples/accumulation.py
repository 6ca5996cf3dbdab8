"""Micro-batches accumulated by the optimizer, in coordinates."""

import optax

from galore_jax import chain, galore

steps = 8
tx = chain(
    galore(rank=16, update_proj_gap=200 * steps),
    optax.MultiSteps(optax.adam(1e-3), steps).gradient_transformation(),
)
