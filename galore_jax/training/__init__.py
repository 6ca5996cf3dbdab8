"""Configuration, training step, loop, evaluation, checkpoints and metrics."""

from galore_jax.errors import require_extra

require_extra("train", "flax", "orbax", "grain", "tqdm")
