"""SentencePiece's unigram models (arXiv 1808.06226) as a tokenizer.json of Hugging Face."""

from pathlib import Path

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
)
from tokenizers import decoders, models, normalizers

_SPACE = "▁"  # how SentencePiece writes a space


def unigram_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a SentencePiece model; None if that is not unigram, or has its own symbols.

    It has the same ids, and gives the same tokens but for segmentations whose scores are equal up
    to rounding. The names of special tokens in a text are special, as usual in transformers.
    """
    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    trainer, spec = model.trainer_spec, model.normalizer_spec
    has_symbols = any(piece.type == piece.USER_DEFINED for piece in model.pieces)
    if trainer.model_type != trainer.UNIGRAM or trainer.treat_whitespace_as_suffix or has_symbols:
        return None
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = tokenizers.Tokenizer(
        models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback)  # pyright: ignore[reportCallIssue, reportArgumentType]
    )

    # Letters; then spaces, of which runs and those at the ends may be removed; then their sign.
    # The text is not split at them, since a piece may have some inside.
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Strip())
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        back.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(back)

    special = [p.piece for p in model.pieces if p.type in (p.UNKNOWN, p.CONTROL)]
    tokenizer.add_special_tokens(special)
    return tokenizer
