"""The generation_config.json of Hugging Face's transformers."""

from pathlib import Path
from typing import Any

from galore_jax.files import read_json

GENERATION_CONFIG = "generation_config.json"


def generation_config(folder: Path, *, eos_id: int | None = None) -> dict[str, Any] | None:
    """The settings with which transformers generates text; None if a folder has none.

    Args:
      folder: a folder of Hugging Face.
      eos_id: a token at which generating is to stop too.

    Raises:
      InputError: the file is damaged.
    """
    if not (folder / GENERATION_CONFIG).is_file():
        return None
    content = read_json(folder / GENERATION_CONFIG)
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if eos_id is not None and eos_id not in ends:
        content["eos_token_id"] = [*ends, eos_id]
    return content
