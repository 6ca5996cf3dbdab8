"""Tokenizers in exported folders: transformers has to read them as the training did."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from galore_jax.data.tokenizers import load_tokenizer, train_sentencepiece
from galore_jax.interop.tokenizer_files import complete_tokenizer, copy_tokenizer
from galore_jax.interop.unigram import unigram_tokenizer

TEXTS = [
    f"The {a} {b} runs\n    over {c}, and\tback.\n"
    for a in ("quick", "brown", "lazy", "small")
    for b in ("fox", "dog", "horse", "mouse")
    for c in ("hills", "fields", "rivers")
]
AWKWARD = ["  two  spaces\n\n\ttab, naïve 日本語 🎉 \n", "", " ", "   ", "▁a▁ b", "ﬁ ½ e\u0301"]
SETTINGS = "tokenizer_config.json"


def exported(source, folder):
    """The tokenizer of a new folder, and its settings."""
    folder.mkdir()
    copy_tokenizer(source, folder)
    complete_tokenizer(folder, load_tokenizer(str(source)))
    settings = json.loads((folder / SETTINGS).read_text())
    return load_tokenizer(str(folder / "tokenizer.json")), settings


def test_a_unigram_model_becomes_a_tokenizer_json_with_the_same_tokens(tmp_path):
    source = tmp_path / "spiece.model"
    source.write_bytes(train_sentencepiece(TEXTS, 290))
    ours = load_tokenizer(str(source))
    theirs, settings = exported(source, tmp_path / "new")
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    assert (theirs.vocab_size, theirs.eos_id, theirs.pad_id, theirs.prefix) == (290, 1, 0, [])
    for text in [*TEXTS, *AWKWARD]:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.parametrize("kind", ["unigram", "json"])
def test_transformers_reads_an_exported_tokenizer_as_the_training_did(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="it is the reference of this test")
    source = tmp_path / "spiece.model"
    source.write_bytes(train_sentencepiece(TEXTS, 290))
    if kind == "json":
        tokenizer, source = unigram_tokenizer(source), tmp_path / "own.json"
        assert tokenizer is not None
        tokenizer.save(str(source))
    ours, _ = exported(source, tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (1, 0, None)
    for text in [*TEXTS, *AWKWARD]:
        assert theirs(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("extra_spaces", [True, False])
def test_spaces_are_treated_as_the_model_says(tmp_path, dummy_prefix, extra_spaces):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "own"),
        vocab_size=36,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=not extra_spaces,
        minloglevel=2,
    )
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "own.model"))
    theirs = unigram_tokenizer(tmp_path / "own.model")
    assert theirs is not None
    for text in [*TEXTS, *AWKWARD]:
        assert theirs.encode(text).ids == ours.encode(text)


@pytest.mark.skipif("GALORE_JAX_TEST_DATA" not in os.environ, reason="needs real data")
def test_the_vocabulary_of_t5_gives_the_same_tokens_of_c4():
    data = Path(os.environ["GALORE_JAX_TEST_DATA"])
    path = data / "tokenizers" / "t5-spiece.model"
    ours, theirs = load_tokenizer(str(path)), unigram_tokenizer(path)
    assert theirs is not None
    assert theirs.get_vocab_size() == ours.vocab_size
    shard = next((data / "c4" / "en").glob("c4-validation.*.json.gz"))
    with gzip.open(shard) as lines:
        for line in itertools.islice(lines, 100):
            text = json.loads(line)["text"]
            assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_a_tokenizer_json_alone_gets_the_special_tokens_of_the_training(tmp_path):
    vocabulary = {"a": 0, "<|endoftext|>": 1, "<unk>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)]
    )
    tokenizer.save(str(tmp_path / "own.json"))
    theirs, settings = exported(tmp_path / "own.json", tmp_path / "new")
    assert settings["eos_token"] == settings["bos_token"] == "<|endoftext|>"
    assert "pad_token" not in settings
    assert theirs.prefix == [1]


def test_settings_beside_a_model_file_go_along_and_are_not_replaced(tmp_path):
    source = tmp_path / "spiece.model"
    source.write_bytes(train_sentencepiece(TEXTS, 290))
    source.with_name(SETTINGS).write_text('{"eos_token": "<pad>"}')
    (tmp_path / "new").mkdir()
    copy_tokenizer(source, tmp_path / "new")
    complete_tokenizer(tmp_path / "new", load_tokenizer(str(source)))
    assert json.loads((tmp_path / "new" / SETTINGS).read_text()) == {"eos_token": "<pad>"}
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"tokenizer.model", SETTINGS}


@pytest.mark.parametrize("options", [{"model_type": "bpe"}, {"user_defined_symbols": ["<turn>"]}])
def test_another_kind_of_sentencepiece_stays_as_it_is_with_a_warning(tmp_path, options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "own"),
        vocab_size=36,
        minloglevel=2,
        **options,
    )
    source = tmp_path / "own.model"
    (tmp_path / "new").mkdir()
    copy_tokenizer(source, tmp_path / "new")
    with pytest.warns(UserWarning, match=r"tokenizer\.model stays as it is, .* write a tokenizer_"):
        complete_tokenizer(tmp_path / "new", load_tokenizer(str(source)))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.model"]
