"""Text, tokens and batches."""

from galore_jax.errors import require_extra

require_extra(
    "train",
    "array_record",
    "grain",
    "sentencepiece",
    "tensorflow_datasets",
    "tokenizers",
    "tqdm",
)
