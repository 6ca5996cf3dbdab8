"""Language models in Flax Linen."""

from galore_jax.errors import require_extra

require_extra("train", "flax")
