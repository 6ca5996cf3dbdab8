"""Generates text with the model of a training run, or of a folder of Hugging Face's transformers.

    python scripts/generate.py FOLDER --prompt "import os" --tokens 200 --top-k 40

It reads the run's latest checkpoint. The text ends early if the model ends its document. After a
training on conversations the prompt is a question, and the answer is printed.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError, run_cli


def main() -> None:
    """Prints the prompt and its continuation, or the answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="of a run, or of transformers")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--tokens", type=int, default=200, help="how many to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 takes the most likely (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample among the k most likely; 0: all (default: 0)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the sampling (default: %(default)s)"
    )
    arguments = parser.parse_args()

    print(generate_text(**vars(arguments)))


def generate_text(
    folder: str | Path,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """Continues a prompt with the latest checkpoint of a run, up to the end of the document.

    If the run was trained on conversations, the prompt is a question, and its answer is returned. A
    model of transformers gets the token that its tokenizer puts before a text; documents of the
    trainer have none.

    Args:
      folder: the folder of the run, or one with a model of transformers.
      prompt: text to continue, or a question.
      tokens: the largest number of tokens to generate.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens only; 0: among all.
      seed: random seed of the sampling.

    Returns:
      The prompt and its continuation, or the answer alone.

    Raises:
      InputError: there is no checkpoint, the tokenizer is missing or has changed, the prompt is
        empty, the text would be longer than the model allows, or the temperature is out of range.
    """
    import jax
    import jax.numpy as jnp

    from galore_jax.data.chat_template import ChatTemplate
    from galore_jax.data.tokenizers import load_tokenizer
    from galore_jax.models.generation import generate
    from galore_jax.training.run_folder import RunFolder, check_same_tokenizer

    config, params = load_model(folder)
    check_same_tokenizer(RunFolder(folder), config.data.tokenizer)
    tokenizer = load_tokenizer(config.data.tokenizer)
    is_chat = config.data.rows == "conversations"
    template = ChatTemplate(config.data.tokenizer) if is_chat else None
    prompt_tokens = template.prompt(prompt) if template else tokenizer.encode(prompt)
    if _is_huggingface(folder):
        prompt_tokens = [*tokenizer.prefix, *prompt_tokens]
    start = jnp.asarray([prompt_tokens], jnp.int32)
    key = jax.random.key(seed)
    new = generate(config.model, params, start, tokens, key, temperature, top_k)[0].tolist()
    document = itertools.takewhile(lambda token: token != tokenizer.eos_id, new)
    # The model's vocabulary may be larger than the tokenizer's; ids beyond that have no text.
    text_tokens = [token for token in document if token < tokenizer.vocab_size]
    return tokenizer.decode(text_tokens if template else prompt_tokens + text_tokens)


def load_model(folder: str | Path) -> tuple[Any, Any]:
    """The configuration and the parameters of a model, with adapters merged into the kernels.

    Args:
      folder: of a run, of which the latest checkpoint is read, or one with a model of transformers.

    Raises:
      InputError: there is no checkpoint, or it is damaged; or a folder of transformers cannot be
        read, or has no tokenizer.
    """
    import jax
    import jax.numpy as jnp

    from galore_jax.data.batches import DataConfig
    from galore_jax.models.llama import Llama
    from galore_jax.training.checkpoint import open_parameters
    from galore_jax.training.config import Config

    def parameters(config: Config, read: Any) -> tuple[Config, Any]:
        def whole(path: Any, leaf: Any) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return jnp.asarray(read(name, tuple(slice(0, size) for size in leaf.shape)))

        tokens = jax.ShapeDtypeStruct((1, 1), "int32")
        shapes: Any = jax.eval_shape(Llama(config.model).init, jax.random.key(0), tokens)
        return config, jax.tree_util.tree_map_with_path(whole, shapes["params"])

    if not _is_huggingface(folder):
        with open_parameters(folder) as (config, read):
            return parameters(config, read)
    from galore_jax.interop.config_json import read_config
    from galore_jax.interop.decoders import open_model
    from galore_jax.interop.tokenizer_files import find_tokenizer

    tokenizer, model = find_tokenizer(Path(folder)), read_config(Path(folder))
    if tokenizer is None:
        raise InputError(f"{folder} has no tokenizer.json or tokenizer.model: add the model's.")
    length = min(DataConfig.sequence_length, model.max_length)
    config = Config(model, DataConfig(tokenizer=str(tokenizer), sequence_length=length))
    return parameters(config, open_model(Path(folder), model))


def _is_huggingface(folder: str | Path) -> bool:
    return (Path(folder) / "config.json").is_file()


if __name__ == "__main__":
    run_cli(main)
