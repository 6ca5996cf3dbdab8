"""`sketch`: energy captured by bases from sketches along a training run, and by exact bases."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from tqdm import tqdm

import galore_jax
from benchmarks import CONFIGS, Row
from galore_jax.data.batches import train_batches
from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.grads.refresh import refresh_due
from galore_jax.optim.galore_state import galore_states, map_bases
from galore_jax.subspace.basis import Basis
from galore_jax.training.config import Config
from galore_jax.training.config_file import load_config
from galore_jax.training.pretraining import Pretraining, batch_loss
from galore_jax.training.state import init_state
from galore_jax.training.step import make_gradients, make_train_step
from galore_jax.types import PyTree

ENERGIES = ("energy", "exact", "relative_energy")


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py."""

    size: str = "5m"
    source: str = "data"
    tokenizer: str = "data/spiece4096.model"
    steps: int = 1000


def measure(settings: Settings) -> list[Row]:
    """A row for every refresh, and one of their means."""
    overrides = (
        f"data.source={settings.source}",
        f"data.tokenizer={settings.tokenizer}",
        f"training.steps={settings.steps}",
    )
    path = CONFIGS / f"llama_{settings.size}.toml"
    warmup = min(load_config(path).optimizer.warmup_steps, settings.steps)
    rows = measure_run(load_config(path, [*overrides, f"optimizer.warmup_steps={warmup}"]))
    means = {key: float(np.mean([row[key] for row in rows])) for key in ENERGIES}
    lowest = min(row["lowest"] for row in rows)
    return [*rows, {"name": "mean", "step": "all", **means, "lowest": lowest}]


def measure_run(config: Config) -> list[Row]:
    """The rows of the refreshes of a run: means over matrices, and the lowest relative energy."""
    full = replace(config, optimizer=replace(config.optimizer, gradients="full"))
    gradients, step = (
        jax.jit(make_gradients(Pretraining(full))),
        make_train_step(Pretraining(config)),
    )
    loss = partial(batch_loss, config.model)
    refresh = jax.jit(galore_jax.refresh(loss, has_aux=True), donate_argnums=1)
    batches = train_batches(config.data, load_tokenizer(config.data.tokenizer))
    state = jax.jit(lambda: init_state(Pretraining(config)))()
    rows = []
    for number in tqdm(range(config.training.steps), "training"):
        batch = next(batches)
        if refresh_due(state.opt_state):
            full_gradients, _ = gradients(state.params, state.opt_state, batch)
            state = state._replace(opt_state=refresh(state.params, state.opt_state, batch))
            captured, exact = energies(state.opt_state, full_gradients)
            rows.append(
                {
                    "name": "refresh",
                    "step": number,
                    "energy": float(np.mean(captured)),
                    "exact": float(np.mean(exact)),
                    "relative_energy": float(np.mean(captured / exact)),
                    "lowest": float(np.min(captured / exact)),
                }
            )
        state, _ = step(state, batch)
    return rows


def energies(opt_state: PyTree, gradients: PyTree) -> Sequence[np.ndarray]:
    """`‖PᵀG‖² / ‖G‖²` of every matrix, and its largest value for a basis of this rank."""
    captured, exact = [], []

    def at_leaf(basis: Basis, gradient: jax.Array) -> None:
        projection = basis.projection
        matrices = np.asarray(projection.view.to_matrices(gradient), np.float64)
        total = np.sum(matrices**2, axis=(-2, -1))
        coordinates = np.asarray(projection.project(basis.vectors, gradient), np.float64)
        captured.append((np.sum(coordinates**2, axis=(-2, -1)) / total).reshape(-1))
        values = np.linalg.svd(matrices, compute_uv=False)[..., : projection.rank]
        exact.append((np.sum(values**2, axis=-1) / total).reshape(-1))

    for state in galore_states(opt_state, inside_chains=True):
        map_bases(at_leaf, state.bases, gradients, otherwise=state.bases)
    return np.concatenate(captured), np.concatenate(exact)
