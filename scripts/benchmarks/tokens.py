"""`tokens`: time of a step with projected gradients relative to AdamW, by tokens per step."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from benchmarks.baselines import baselines
from benchmarks.models import blocks_loss, init_llama, with_dense
from benchmarks.report import Row
from benchmarks.state import CONFIGS, require_size
from benchmarks.step import DENSE, Run
from benchmarks.timing import interleaved, seconds
from galore_jax.errors import check_installed, require, require_choice
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config_file import load_config
from galore_jax.training.plots import COLOURS, new_figure, write_png

ROW_LENGTH = 256
NAMES = ("adamw", "galore_full", "galore_projected")


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: a number is out of range, or a list has something else than numbers.
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
        require("layers", self.layers, self.layers >= 1, "at least 1")
        require("repeats", self.repeats, self.repeats >= 1, "at least 1")
        require_choice("dense", self.dense, DENSE)
        for size in self.sizes.split(","):
            require_size("sizes", size)
        for number in self.tokens.split(","):
            holds = number.isdigit() and int(number) > 0 and int(number) % ROW_LENGTH == 0
            require("tokens", number, holds, f"multiples of {ROW_LENGTH}, with commas between")


def measure(settings: Settings) -> list[Row]:
    """The rows of every size, number of tokens and baseline; draws their ratios."""
    check_installed("matplotlib")
    rows = []
    for size in settings.sizes.split(","):
        config = load_config(CONFIGS / f"llama_{size}.toml")
        model = replace(config.model, num_layers=settings.layers, dtype="float32")
        for tokens in map(int, settings.tokens.split(",")):
            shape = (tokens // ROW_LENGTH, ROW_LENGTH)
            rows += measure_size(size, model, int(config.optimizer.rank), shape, settings)
    draw(rows, Path(settings.picture))
    return rows


def measure_size(
    size: str, model: LlamaConfig, rank: int, shape: tuple[int, int], settings: Settings
) -> list[Row]:
    """The rows for one size and one shape of a batch (rows, tokens), with stacked blocks."""
    params = {"layers": init_llama(model)["layers"]}
    batch = jax.random.normal(jax.random.key(1), (2, *shape, model.hidden_size))
    loss = with_dense(settings.dense, functools.partial(blocks_loss, model))
    chosen = [baseline for baseline in baselines(rank) if baseline.name in NAMES]
    runs = {baseline.name: Run(baseline, loss, params, batch) for baseline in chosen}
    for run in runs.values():
        seconds(run)
    tokens = shape[0] * shape[1]
    median = interleaved(runs, settings.repeats, f"{size}, {tokens:,} tokens")
    return [
        {
            "name": name,
            "size": size,
            "rank": rank,
            "tokens": tokens,
            "seconds": time,
            "of_adamw": time / median["adamw"],
        }
        for name, time in median.items()
    ]


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
