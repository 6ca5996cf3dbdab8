"""The folder of a run: its files, and the conditions to start or resume a run there.

    config.toml     the complete configuration
    text.json       a fingerprint of the training text
    metrics.jsonl   one line per step and per evaluation
    checkpoints/    the latest checkpoints
    curves.png      training loss, validation loss and learning rate
    summary.json    written last: the run is finished
    diverged.txt    why a run ended that diverged
    lock            held while a process trains here

A folder holds a run as soon as it has metrics or a checkpoint. Starting a new run there is refused,
so that nothing is lost. Resuming needs the same configuration except for the keys in `MAY_CHANGE`,
which affect output and checkpoints, but no result.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from galore_jax.data.batches import tokenizer_checksum
from galore_jax.errors import InputError
from galore_jax.files import locked, read_json, write_json, write_text
from galore_jax.training.config_file import AnyConfig, differences, load_config, to_toml
from galore_jax.training.mesh import MeshConfig

SUMMARY = "summary.json"
MAY_CHANGE = {
    *(f"training.{key}" for key in ("folder", "evaluate_every", "checkpoint_every", "log_every")),
    "training.seeds",
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
}


class RunFolder:
    """The paths of a run's files."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.config = self.path / "config.toml"
        self.text = self.path / "text.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / SUMMARY
        self.diverged = self.path / "diverged.txt"
        self.curves = self.path / "curves.png"
        self.lock = self.path / "lock"

    def holds_run(self) -> bool:
        """Whether the folder has metrics or checkpoints, or results of a fine-tuning."""
        has_checkpoints = any(self.checkpoints.glob("*"))
        return self.metrics.exists() or has_checkpoints or any(self.path.glob("seed-*"))


def check_start(config: Any, resume: bool) -> None:
    """Checks that a run can be started, or resumed, in its folder.

    Raises:
      InputError: a new run would start in a folder that holds one; there is no run to resume, it is
        finished or diverged, or it has another configuration.
    """
    run = RunFolder(config.training.folder)
    if not resume and run.holds_run():
        raise InputError(
            f"{run.path} already holds a run: continue it with --resume, or name another "
            "training.folder."
        )
    if not resume:
        return
    # A run that ended before its first metrics starts from the beginning.
    if not run.holds_run() and not run.config.exists():
        raise InputError(
            f"there is nothing to resume in {run.path}: start without --resume, or name the "
            "training.folder of the run."
        )
    if run.summary.exists():
        raise InputError(
            f"the run in {run.path} is finished, there is nothing to resume: name another "
            "training.folder to start a new one."
        )
    if run.diverged.exists():
        raise InputError(f"nothing can be resumed: {run.diverged.read_text().strip()}")
    check_same_run(recorded_config(run, type(config)), config, run.path)


def recorded_config(run: RunFolder, kind: type[AnyConfig]) -> AnyConfig:
    """The configuration of a run; an `InputError` if it is of another kind, or damaged."""
    try:
        return load_config(run.config, kind=kind)
    except InputError as error:
        raise InputError(
            f"{run.config} is not of such a training ({error}): name another training.folder."
        ) from None


def check_same_run(recorded: Any, config: Any, place: Path) -> None:
    """Raises an `InputError` if the configuration differs in a key that may not change."""
    changed = differences(dataclasses.asdict(recorded), dataclasses.asdict(config))
    changed = {key: values for key, values in changed.items() if key not in MAY_CHANGE}
    if changed:
        key, (old, new) = next(iter(changed.items()))
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise InputError(
            f"{place} holds a run with another {key}, {old!r}, which is {new!r} here{others}: "
            "resume with the same configuration, or name another training.folder."
        )


def check_same_text(run: RunFolder, found: dict[str, int], resume: bool) -> None:
    """Records the fingerprint of a text; an `InputError` if a resumed run had another one."""
    if not (resume and run.text.exists()):
        write_json(run.text, found)
        return
    recorded = read_json(run.text)
    if recorded != found:
        raise InputError(
            f"the text of data.source, or the tokenizer, is not the one that the run in {run.path} "
            f"was started with ({recorded} in {run.text.name}, {found} now): restore it, or name "
            "another training.folder."
        )


def check_same_tokenizer(run: RunFolder, tokenizer: str) -> None:
    """Raises an `InputError` if the tokenizer of a run is missing or has changed."""
    if tokenizer != "bytes" and not Path(tokenizer).is_file():
        raise InputError(
            f"there is no {tokenizer}, the tokenizer of the run in {run.path}: restore it or, if "
            "its path is relative, work in the folder in which the run was started."
        )
    recorded = read_json(run.text).get("tokenizer") if run.text.exists() else None
    if recorded not in (None, tokenizer_checksum(tokenizer)):
        raise InputError(
            f"{tokenizer} is not the tokenizer that the run in {run.path} was trained with: "
            "restore it."
        )


@contextmanager
def open_folder(config: Any, resume: bool) -> Iterator[RunFolder]:
    """Creates the folder, writes config.toml, and locks out other processes.

    Raises:
      InputError: another process is training in it, or `check_start` fails.
      OSError: the folder cannot be created or written to.
    """
    run = RunFolder(config.training.folder)
    run.path.mkdir(parents=True, exist_ok=True)
    with locked(run.lock, f"training in {run.path}", "name another training.folder"):
        # Another process may have trained here since the first check.
        check_start(config, resume)
        write_text(run.config, to_toml(config))
        yield run
