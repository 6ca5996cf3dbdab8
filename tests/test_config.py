import dataclasses
import tomllib
from pathlib import Path

import pytest

from galore_jax.errors import InputError
from galore_jax.training.config import (
    Config,
    FinetuneConfig,
    GaloreConfig,
    OptimizerConfig,
    TrainingConfig,
)
from galore_jax.training.config_file import (
    differences,
    load_comparison,
    load_config,
    to_toml,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text("[model]\nnum_layers = 3\n[optimizer]\nlearning_rate = 1\n")
    return path


def test_a_file_sets_what_it_names_and_leaves_the_rest(small):
    config = load_config(small)
    assert config.model.num_layers == 3
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.optimizer.galore.rank == OptimizerConfig().galore.rank


def test_overrides_are_toml_values_and_bare_words_are_text(small):
    config = load_config(
        small,
        [
            "optimizer.name=adamw",
            'data.tokenizer="bytes"',
            "training.layerwise=true",
            "optimizer.learning_rate=3e-4",
            "model.num_kv_heads=4",
        ],
    )
    assert config.optimizer.name == "adamw"
    assert config.data.tokenizer == "bytes"
    assert config.training.layerwise is True
    assert config.optimizer.learning_rate == 3e-4
    assert config.model.num_kv_heads == 4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "optimizer.learning_rat=1",
            "optimizer.learning_rat is unknown; did you mean learning_rate or matrix_rate?",
        ),
        ("optimiser.name=adamw", "optimiser is unknown; did you mean optimizer?"),
        ("optimizer.rank=4", "optimizer.rank is unknown; did you mean galore.rank or lora.rank?"),
        ("mesh.axes=auto", "mesh.axes is unknown; there are data, fsdp, tensor, shard_moments."),
        ("training=1", "training is a table: write [training], then a line for each key."),
        ("model.num_layers", "'model.num_layers' is not an override: write section.key=value"),
        ("optimizer.name=adam", "optimizer.name must be 'adamw', 'adamw8bit', 'galore_adamw', "),
        ("optimizer.b1=0.99999999", "optimizer.b1 must be less than 0.9999999701976776, not"),
        ("optimizer.galore.rank=0", "galore.rank must be an integer of at least 1, a fraction"),
        ("optimizer.galore.rank=half", "galore.rank must be a valid number, not 'half'."),
        (f"optimizer.galore.scale={'9' * 5000}", "galore.scale must be a valid number, not '999"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate must be a finite number, not nan"),
        ("training.steps=true", "training.steps must be a valid integer, not True."),
        ("training.folder=2026", "training.folder must be a valid string, not 2026."),
        ("training.folder=", "training.folder must have at least 1 character, not ''."),
        ("training.folder=\udce9", "training.folder must be a valid string, unable to parse raw"),
        ("training.accumulation=3", "training.accumulation is 3, which does not divide"),
        ("training.steps=10", "optimizer.warmup_steps is 1000, but training.steps is only 10"),
        ("model.rope_low_freq_factor=4", "model.rope_low_freq_factor must be below"),
        ("mesh.fsdp=0", "mesh.fsdp must be greater than 0, not 0."),
        ("mesh.fsdp=-1", "mesh.data and mesh.fsdp are -1"),
    ],
    ids=lambda text: text[:40],
)
def test_a_bad_override_is_refused_in_a_sentence_that_names_what_is_valid(
    small, override, sentence
):
    with pytest.raises(InputError) as refused:
        load_config(small, [override])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused_with_the_nearest_names(small):
    with pytest.raises(
        InputError, match=r"there is no file .*smal\.toml; did you mean small\.toml\?"
    ):
        load_config(small.with_name("smal.toml"))


@pytest.mark.parametrize(
    "text",
    ["[model\n", "model = 3\n", "steps = 3\n", "x = " + "[" * 10_000, "x = " + "9" * 5000, "\0"],
    ids=len,
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path, text):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(InputError):
        load_config(path)


def test_the_written_toml_reads_back_as_the_same_configuration():
    config = dataclasses.replace(
        Config(),
        optimizer=OptimizerConfig("galore_lion", galore=GaloreConfig(0.25, lazy_overlap=0.5)),
        training=TrainingConfig(folder='a "quoted" \\ tab\t é 𝕏 \U000e0001'),
    )
    assert Config(**tomllib.loads(to_toml(config))) == config
    assert Config(**dataclasses.asdict(config)) == config


def test_differences_name_the_keys_and_both_values():
    other = dataclasses.replace(Config(), optimizer=OptimizerConfig(galore=GaloreConfig(rank=7)))
    assert differences(dataclasses.asdict(Config()), dataclasses.asdict(other)) == {
        "optimizer.galore.rank": (128, 7)
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_of_the_repository_is_valid(path):
    assert load_config(path).training.folder == f"runs/{path.stem}"
    assert load_comparison(path)


TABLES = """
[optimizer]
warmup_steps = 0
galore.rank = 16

[compare.adamw]
matrix_rate = 0.5

[compare."rank 8"]
name = "galore_adamw"
galore.rank = 8
"""


@pytest.fixture
def tables(tmp_path):
    path = tmp_path / "tables.toml"
    path.write_text(TABLES)
    return path


def test_a_table_has_what_differs_and_its_label_is_the_name_by_default(tables):
    configs = load_comparison(tables, ["optimizer.learning_rate=0.1", "optimizer.galore.rank=32"])
    assert list(configs) == ["adamw", "rank 8"]
    optimizers = [config.optimizer for config in configs.values()]
    assert [optimizer.name for optimizer in optimizers] == ["adamw", "galore_adamw"]
    assert [optimizer.matrix_rate for optimizer in optimizers] == [0.5, 1.0]
    assert [optimizer.galore.rank for optimizer in optimizers] == [32, 8]
    assert {optimizer.learning_rate for optimizer in optimizers} == {0.1}
    assert {config.training.folder for config in configs.values()} == {"runs/tables"}


@pytest.mark.parametrize("override", ["optimizer.name=muon", "optimizer.galore.rank=32"])
def test_an_override_of_what_every_table_sets_is_refused(tables, override):
    with pytest.raises(InputError, match=f"{override} has no effect"):
        load_comparison(tables, [override], names=["rank 8"])


def test_optimizers_are_chosen_by_label_or_by_name(tables, small):
    chosen = load_comparison(tables, names=["muon", "rank 8"])
    assert [config.optimizer.name for config in chosen.values()] == ["muon", "galore_adamw"]
    assert list(load_comparison(small)) == ["adamw", "muon", "galore_adamw"]


@pytest.mark.parametrize(
    ("text", "names", "sentence"),
    [
        ("", ["muom"], "there is no optimizer 'muom' to compare; did you mean muon?"),
        ("compare = 3", [], "compare is a table: write [compare.LABEL] for each optimizer."),
        ("[compare]\nrank = 3", [], "[compare.rank] is not an optimizer to compare: write"),
        ('[compare."a/b"]\nname = "adamw"', [], "[compare.a/b] is not an optimizer to compare"),
        ("[compare.mini]", [], "[compare.mini]: optimizer.name must be 'adamw', 'adamw8bit'"),
        ("[compare.muon]\ngalore.rnak = 3", [], "[compare.muon]: optimizer.galore.rnak is unknown"),
        ("[comparr.muon]", [], "comparr is unknown; there are model"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_in_a_sentence(tmp_path, text, names, sentence):
    path = tmp_path / "bad.toml"
    path.write_text(f"{text}\n")
    with pytest.raises(InputError) as refused:
        load_comparison(path, names=names)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def sections(kind):
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield field.type
            yield from sections(field.type)


@pytest.mark.parametrize("kind", [Config, FinetuneConfig])
def test_the_page_of_settings_has_every_section_and_its_docstring_every_setting(kind):
    page = (CONFIGS[0].parents[1] / "docs" / "settings.md").read_text()
    for section in sections(kind):
        assert f"::: {section.__module__}.{section.__qualname__}\n" in page
        documented = {line.partition(":")[0].strip() for line in section.__doc__.splitlines()}
        assert documented >= {field.name for field in dataclasses.fields(section)}
