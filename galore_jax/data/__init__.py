"""Text, tokens and batches."""

from galore_jax.errors import check_installed

check_installed("grain", "sentencepiece", "tensorflow_datasets", "array_record", "tqdm")
