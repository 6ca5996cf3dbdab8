"""Interleaved timing, so that other load on the machine affects all baselines alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from tqdm import tqdm

Name = TypeVar("Name")


def seconds(run: Callable[[], Any]) -> float:
    """The seconds that `run` takes until its result is computed."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleaved(
    runs: Mapping[Name, Callable[[], Any]], repeats: int, title: str
) -> dict[Name, float]:
    """The median seconds of each run over rounds of one execution each; all must be compiled."""
    measured = {name: [] for name in runs}
    for _ in tqdm(range(repeats), title):
        for name, run in runs.items():
            measured[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in measured.items()}
