"""Language models in Flax Linen."""

from galore_jax.errors import check_installed

check_installed("flax")
