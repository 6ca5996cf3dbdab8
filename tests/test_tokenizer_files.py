"""Tokenizers in exported folders: transformers has to read them as the training did."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
import sentencepiece
import transformers

from galore_jax.data.tokenizers import load_tokenizer, train_sentencepiece
from galore_jax.interop.tokenizer_files import complete_tokenizer, copy_tokenizer

TEXTS = [
    f"The {a} {b} runs\n    over {c}, and\tback.\n"
    for a in ("quick", "brown", "lazy", "small")
    for b in ("fox", "dog", "horse", "mouse")
    for c in ("hills", "fields", "rivers")
]
AWKWARD = ["  two  spaces\n\n\ttab, naïve 日本語 🎉 \n", "", " ", "   ", "▁a▁ b", "ﬁ ½ e\u0301"]
SETTINGS = "tokenizer_config.json"


def exported(source, folder):
    """The tokenizer that transformers makes of a new folder, and its settings."""
    folder.mkdir()
    copy_tokenizer(source, folder)
    complete_tokenizer(folder, load_tokenizer(str(source)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, json.loads((folder / SETTINGS).read_text())


def test_a_trained_vocabulary_is_read_as_in_the_training(tmp_path):
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
    ids = (len(theirs), theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id)
    assert ids == (290, 1, 0, None)
    for text in [*TEXTS, *AWKWARD]:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    again = load_tokenizer(str(tmp_path / "new" / "tokenizer.json"))
    assert (again.vocab_size, again.eos_id, again.pad_id, again.prefix) == (290, 1, 0, [])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("extra_spaces", [True, False])
def test_other_models_are_read_as_in_the_training(tmp_path, kind, dummy_prefix, extra_spaces):
    source = tmp_path / "own.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(source.with_suffix("")),
        model_type=kind,
        vocab_size=39,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=not extra_spaces,
        user_defined_symbols=["<turn>"],
        minloglevel=2,
    )
    ours = load_tokenizer(str(source))
    theirs, _ = exported(source, tmp_path / "new")
    for text in [*TEXTS, *AWKWARD]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


@pytest.mark.skipif(not os.environ.get("GALORE_JAX_TEST_DATA"), reason="needs real data")
def test_the_vocabulary_of_t5_gives_the_same_tokens_of_c4(tmp_path):
    data = Path(os.environ["GALORE_JAX_TEST_DATA"])
    path = data / "tokenizers" / "t5-spiece.model"
    ours, (theirs, _) = load_tokenizer(str(path)), exported(path, tmp_path / "new")
    assert len(theirs) == ours.vocab_size
    shard = next((data / "c4" / "en").glob("c4-validation.*.json.gz"))
    with gzip.open(shard) as lines:
        for line in itertools.islice(lines, 100):
            text = json.loads(line)["text"]
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_settings_beside_a_model_file_go_along_and_are_not_replaced(tmp_path):
    source = tmp_path / "tokenizer.model"
    source.write_bytes(train_sentencepiece(TEXTS, 290))
    source.with_name(SETTINGS).write_text('{"eos_token": "</s>"}')
    tools = Path("additional_chat_templates", "tools.jinja")
    (tmp_path / tools).parent.mkdir()
    (tmp_path / tools).write_text("{{ tools }}")
    (tmp_path / "new").mkdir()
    copy_tokenizer(source, tmp_path / "new")
    complete_tokenizer(tmp_path / "new", load_tokenizer(str(source)))
    assert json.loads((tmp_path / "new" / SETTINGS).read_text()) == {"eos_token": "</s>"}
    assert (tmp_path / "new" / tools).read_text() == "{{ tools }}"
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"tokenizer.model", SETTINGS, tools.parts[0]}
