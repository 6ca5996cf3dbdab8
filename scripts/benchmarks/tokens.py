"""`tokens`: time of a step with projected gradients relative to AdamW, by tokens per step."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from benchmarks import CONFIGS, Row
from benchmarks.baselines import baselines, rank_of
from benchmarks.models import blocks_loss, init_llama, with_dense
from benchmarks.step import DENSE, measure_steps
from galore_jax.errors import check_installed, require, require_choice
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config_file import load_config
from galore_jax.training.plots import COLOURS, new_figure, write_png

ROW_LENGTH = 256


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: there is no folder for the picture, or a number of tokens is not a multiple of the
        length of a row.
    """

    sizes: str = "130m,350m,1b"
    tokens: str = "256,512,1024,2048,4096,8192"
    layers: int = 1
    dense: str = "flax"
    repeats: int = 3
    picture: str = "tokens.png"

    def __post_init__(self):
        folder = Path(self.picture).parent
        require("picture", self.picture, folder.is_dir(), "a file in a folder that exists")
        require_choice("dense", self.dense, DENSE)
        for number in self.tokens.split(","):
            holds = number.isdigit() and int(number) > 0 and int(number) % ROW_LENGTH == 0
            require("tokens", number, holds, f"multiples of {ROW_LENGTH}, with commas between")


def measure(settings: Settings) -> list[Row]:
    """The rows of every size, number of tokens and baseline; draws their ratios."""
    check_installed("matplotlib")
    configs = {
        name: load_config(CONFIGS / f"llama_{name}.toml") for name in settings.sizes.split(",")
    }
    rows = []
    for size, config in configs.items():
        model = replace(config.model, num_layers=settings.layers, dtype="float32")
        for tokens in map(int, settings.tokens.split(",")):
            shape = (tokens // ROW_LENGTH, ROW_LENGTH)
            rows += measure_size(size, model, rank_of(config), shape, settings)
    draw(rows, Path(settings.picture))
    return rows


def measure_size(
    size: str, model: LlamaConfig, rank: int, shape: tuple[int, int], settings: Settings
) -> list[Row]:
    """The rows for one size and one shape of a batch (rows, tokens), with stacked blocks."""
    params = {"layers": init_llama(model)["layers"]}
    batch = jax.random.normal(jax.random.key(1), (2, *shape, model.hidden_size))
    loss = with_dense(settings.dense, functools.partial(blocks_loss, model))
    chosen = [baseline for baseline in baselines(rank) if baseline.stacks]
    tokens = shape[0] * shape[1]
    title = f"{size}, {tokens:,} tokens"
    rows = measure_steps(chosen, loss, params, batch, settings.repeats, title)
    return [{"size": size, "rank": rank, "tokens": tokens} | row for row in rows]


def draw(rows: list[Row], picture: Path) -> None:
    """Draws the ratios to AdamW over the tokens per step into a PNG."""
    figure = new_figure((7.5, 4.4))
    axes = figure.subplots()
    axes.axhline(1, color="#444444", linewidth=1)
    where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
    axes.annotate("AdamW", (1.07, 1), **where)
    for name, style in (("galore_projected", "-"), ("galore_full", ":")):
        for number, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
            line = [row for row in rows if row["size"] == size and row["name"] == name]
            label = f"{size.upper()}, {'projected' if style == '-' else 'full'} gradients"
            colour = COLOURS[number % len(COLOURS)]
            tokens, ratio = [row["tokens"] for row in line], [row["of_adamw"] for row in line]
            axes.plot(tokens, ratio, style, marker="o", color=colour, label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["tokens"] for row in rows})
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    axes.set(xlabel="tokens per step", ylabel="time of a step relative to AdamW", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    write_png(figure, picture)
