"""Models from and to other libraries."""

from galore_jax.errors import check_installed

check_installed("safetensors")
