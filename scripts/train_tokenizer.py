"""Trains a SentencePiece vocabulary on the training split.

    python scripts/train_tokenizer.py --source data --vocab-size 4096 --out data/spiece.model

The same command on the same text gives the same file.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from command_line import positive

from galore_jax.errors import InputError, run_cli
from galore_jax.files import atomic_write


def main() -> None:
    """Reads the arguments and trains a vocabulary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        default="python",
        help='folder made by prepare_c4.py, or "python" for the standard library (the default)',
    )
    parser.add_argument(
        "--vocab-size", type=positive, default=32000, help="pieces (default: 32000)"
    )
    parser.add_argument("--out", default="data/spiece.model", help="file (default: %(default)s)")
    parser.add_argument(
        "--limit",
        type=positive,
        default=200_000,
        help="documents to use, spread evenly over the split (default: 200000)",
    )
    arguments = parser.parse_args()
    out = Path(arguments.out)
    if out.suffix != ".model":
        raise InputError(f"--out is {out}: its name must end in .model.")

    from galore_jax.data.batches import DataConfig, documents
    from galore_jax.data.tokenizers import train_sentencepiece

    texts = documents(DataConfig(source=arguments.source), "train")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A folder that cannot be written to fails before the work.
    with atomic_write(out) as unfinished:
        spread = _spread(texts, arguments.limit)
        unfinished.write_bytes(train_sentencepiece(spread, arguments.vocab_size))
    print(f"{out} holds {arguments.vocab_size:,} pieces.")


def _spread(texts: Sequence[str], limit: int) -> Iterator[str]:
    from tqdm import tqdm

    count = min(limit, len(texts))
    for index in tqdm(range(count), unit=" documents", desc="reading"):
        yield texts[index * len(texts) // count]
    print("fitting the pieces (about a minute for 10 MB of text) …", flush=True)


if __name__ == "__main__":
    run_cli(main)
