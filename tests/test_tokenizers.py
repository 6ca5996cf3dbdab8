"""Tokenizers: bytes, SentencePiece, tokenizer.json, and the trained vocabulary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from galore_jax.data.batches import tokenizer_checksum
from galore_jax.data.tokenizers import load_tokenizer, tokenizer_files, train_sentencepiece
from galore_jax.errors import InputError

ROOT = Path(__file__).parent.parent
TEXTS = [
    f"The {a} {b} runs\n    over {c}, and\tback.\n"
    for a in ("quick", "brown", "lazy", "small")
    for b in ("fox", "dog", "horse", "mouse")
    for c in ("hills", "fields", "rivers")
]
AWKWARD = "  two  spaces\n\n\ttab, naïve 日本語 🎉 \n"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    path.write_bytes(train_sentencepiece(TEXTS, 290))
    return path


@pytest.fixture
def json_file(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=8)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    settle(path, eos_token="</s>", pad_token="<pad>")
    return path


def settle(path, **settings):
    """Writes the settings beside a tokenizer."""
    path.with_name("tokenizer_config.json").write_text(json.dumps(settings))


def test_bytes_are_shifted_by_the_two_special_ids():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (258, 0, 1)
    assert tokenizer.encode("é") == [0xC3 + 2, 0xA9 + 2]
    assert tokenizer.decode([0, *tokenizer.encode(AWKWARD), 1]) == AWKWARD
    assert tokenizer.decode([0xC3 + 2]) == "\ufffd"


def test_a_trained_sentencepiece_vocabulary_loses_nothing(model_file):
    tokenizer = load_tokenizer(str(model_file))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (290, 0, 1)
    ids = tokenizer.encode(AWKWARD)
    assert 2 not in ids  # unk
    assert tokenizer.decode(ids) == AWKWARD
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])


def test_training_a_vocabulary_twice_gives_the_same_bytes(model_file):
    assert train_sentencepiece(TEXTS, 290) == model_file.read_bytes()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "reason"),
    [
        (TEXTS, 5000, "size too high .* <= 29"),
        (TEXTS, 200, "smaller than required_chars"),
        (["", "\n"], 290, "empty"),
    ],
)
def test_an_impossible_vocabulary_is_explained(texts, vocab_size, reason):
    with pytest.raises(InputError, match=f"no vocabulary of {vocab_size} pieces .*{reason}"):
        train_sentencepiece(texts, vocab_size)


def test_a_tokenizer_json_is_read_without_its_template_truncation_and_padding(json_file):
    tokenizer = load_tokenizer(str(json_file))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (300, 0, 1)
    ids = tokenizer.encode(AWKWARD)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode([*ids, 1, 0]) == AWKWARD


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({"eos_token": "<unk>", "pad_token": "</s>"}, (1, 2)),
        # A model may have no row for a pad token behind its vocabulary.
        ({"eos_token": "</s>", "pad_token": "[PAD]"}, (1, 1)),
    ],
)
def test_a_tokenizer_config_beside_the_file_names_eos_and_pad(json_file, settings, ids):
    settle(json_file, **settings)
    tokenizer = load_tokenizer(str(json_file))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (*ids, 300)


def test_tokens_that_only_the_files_beside_it_have_count(json_file):
    json_file.with_name("added_tokens.json").write_text('{"<|turn|>": 300}')
    tokenizer = load_tokenizer(str(json_file))
    assert (tokenizer.vocab_size, tokenizer.encode("<|turn|>")) == (301, [300])


def test_a_model_beside_its_settings_is_read_as_they_say(model_file, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file.read_bytes())
    settle(path, eos_token="<pad>")
    ours, alone = load_tokenizer(str(path)), load_tokenizer(str(model_file))
    assert (ours.eos_id, alone.eos_id) == (0, 1)
    assert ours.encode(AWKWARD) == alone.encode(AWKWARD)


def test_the_files_of_a_tokenizer_are_those_that_are_read(model_file, json_file):
    path = json_file.with_name("tokenizer.model")
    path.write_bytes(model_file.read_bytes())
    read = load_tokenizer(str(path)).encode(AWKWARD)
    assert read == load_tokenizer(str(json_file)).encode(AWKWARD)
    before = tokenizer_checksum(str(path))
    json_file.write_text(json_file.read_text() + " ")
    assert tokenizer_checksum(str(path)) != before
    assert path not in tokenizer_files(str(json_file))


@pytest.mark.parametrize(("template", "prefix"), [("$A </s>", []), ("<pad> $A </s>", [0])])
def test_the_prefix_is_what_the_template_puts_before_a_text(json_file, template, prefix):
    tokenizer = tokenizers.Tokenizer.from_file(str(json_file))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", 1), ("<pad>", 0)]
    )
    tokenizer.save(str(json_file))
    assert list(load_tokenizer(str(json_file)).prefix) == prefix


def test_sentencepiece_begins_a_text_with_its_bos(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "own"),
        vocab_size=36,
        minloglevel=2,
    )
    assert list(load_tokenizer(str(tmp_path / "own.model")).prefix) == [1]


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer at .*gone\.model"):
        load_tokenizer(str(tmp_path / "gone.model"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("spiece.model", "spiece.model is not a SentencePiece model"),
        ("tokenizer.json", "transformers cannot read the tokenizer in .*: "),
        ("own.json", r"own.json is not a tokenizer .* or be tokenizer\.json"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path, name, problem):
    path = tmp_path / name
    path.write_text("{}")
    with pytest.raises(InputError, match=problem):
        load_tokenizer(str(path))


def catastrophic(table):
    table["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }


def unreadable(table):
    table["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def nested(table):
    normalizer = {"type": "Lowercase"}
    for _ in range(300):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    table["normalizer"] = normalizer


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (catastrophic, "cannot encode a text: .*retry-limit-in-match over"),
        (unreadable, "cannot read the tokenizer in .*: .*precompiled_charsmap"),
        (nested, "cannot read the tokenizer in .*: recursion limit exceeded"),
    ],
)
def test_a_panic_in_the_library_or_deep_nesting_is_one_sentence(json_file, change, problem):
    table = json.loads(json_file.read_text())
    change(table)
    json_file.write_text(json.dumps(table))
    with pytest.raises(InputError, match=problem) as refused:
        load_tokenizer(str(json_file)).encode("a" * 40 + "!")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_nested_beyond_reason_are_one_sentence(json_file, name):
    json_file.with_name(name).write_text('{"a":' * 10**5 + "1" + "}" * 10**5)
    with pytest.raises(InputError, match=r"cannot read the tokenizer in .*recursion depth"):
        load_tokenizer(str(json_file))


def test_a_tokenizer_without_an_end_of_sequence_is_refused(json_file):
    settle(json_file, pad_token="<pad>")
    with pytest.raises(InputError, match="no end-of-sequence token: name one as eos_token in its"):
        load_tokenizer(str(json_file))


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, "scripts/train_tokenizer.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_script_trains_on_some_documents_of_the_standard_library(tmp_path):
    out = tmp_path / "new" / "spiece.model"
    result = run_script("--limit", 8, "--vocab-size", 400, "--out", out)
    assert result.returncode == 0, result.stderr
    assert load_tokenizer(str(out)).vocab_size == 400
    assert os.listdir(out.parent) == ["spiece.model"]
