"""The generation_config.json of Hugging Face's transformers."""

from pathlib import Path

from galore_jax.files import read_json, write_json

GENERATION_CONFIG = "generation_config.json"


def copy_generation_config(source: Path, folder: Path, *, eos_id: int | None = None) -> None:
    """Copies the settings with which transformers generates text, if the source has any.

    Args:
      source: a folder of Hugging Face.
      folder: an existing folder.
      eos_id: a token at which generating stops too.
    """
    if not (source / GENERATION_CONFIG).is_file():
        return
    content = read_json(source / GENERATION_CONFIG)
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if eos_id is not None and eos_id not in ends:
        content["eos_token_id"] = [*ends, eos_id]
    write_json(folder / GENERATION_CONFIG, content)
