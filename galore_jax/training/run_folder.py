"""The run's folder: what lies in it, and who may start or go on there.

    config.toml     the resolved configuration
    metrics.jsonl   a line for every step and every evaluation
    checkpoints/    the latest ones
    tensorboard/    on request
    summary.json    written last: the run is finished
    curves.png
    lock            held while a process trains here

A folder holds a run as soon as it holds metrics or a checkpoint. A fresh start into it is refused,
so that nothing is lost; going on needs the same configuration, but for the keys in `MAY_CHANGE`,
which decide where and how often to look and to save, never what is computed.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from galore_jax.errors import FULL_DISK, InputError
from galore_jax.files import atomic_write
from galore_jax.training.config import Config
from galore_jax.training.config_file import differences, load_config, to_dict, to_toml
from galore_jax.training.lock import locked

MAY_CHANGE = frozenset(
    f"training.{key}"
    for key in (
        "folder",
        "evaluate_every",
        "evaluation_tokens",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "diagnostics",
        "tensorboard",
        "bigram",
    )
)


class RunFolder:
    """Paths of a run's files."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.config = self.path / "config.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.summary = self.path / "summary.json"
        self.curves = self.path / "curves.png"
        self.lock = self.path / "lock"

    def holds_run(self) -> bool:
        """Whether there are metrics or checkpoints."""
        return self.metrics.exists() or any(self.checkpoints.glob("*"))


def refuse_wrong_start(config: Config, resume: bool) -> None:
    """Looks whether the folder suits a fresh start, or a resumed one.

    Raises:
      InputError: a fresh start where a run lies; a resumed one where none lies, where it is
        finished or where it has another configuration; or a name that no folder can have.
    """
    with _unusable_told(config):
        _refuse_wrong_start(config, resume)


def _refuse_wrong_start(config: Config, resume: bool) -> None:
    run = RunFolder(config.training.folder)
    if not resume:
        if run.holds_run():
            raise InputError(
                f"{run.path} already holds a run: go on with it by --resume, or name another "
                "training.folder."
            )
        return
    if not run.holds_run():
        raise InputError(
            f"there is nothing to resume in {run.path}: start without --resume, or name the "
            "training.folder of the run."
        )
    if run.summary.exists():
        raise InputError(
            f"the run in {run.path} is finished, there is nothing to resume: name another "
            "training.folder to start a new one."
        )
    refuse_other_run(load_config(run.config), config, run.path)


def refuse_other_run(recorded: Config, config: Config, place: Path) -> None:
    """Raises an `InputError` naming the first key in which a run differs, where it may not."""
    found = differences(to_dict(recorded), to_dict(config))
    found = {key: values for key, values in found.items() if key not in MAY_CHANGE}
    if found:
        key, (old, new) = next(iter(found.items()))
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        section = key.partition(".")[0]
        what = {"model": "another model", "training": "another training"}.get(
            section, f"other {section} settings"
        )
        raise InputError(
            f"{place} holds a run of {what}: {key} is {old!r} there and {new!r} here{others}; "
            "resume with the same configuration, or name another training.folder."
        )


@contextmanager
def open_folder(config: Config, resume: bool) -> Iterator[RunFolder]:
    """Makes the folder, writes config.toml, and keeps other processes from training there.

    Raises:
      InputError: the folder cannot be made or written to, another process trains in it, or, as
        `refuse_wrong_start` says, it does not suit the start (any more).
    """
    run = RunFolder(config.training.folder)
    with ExitStack() as stack:
        with _unusable_told(config):
            run.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run.lock))
            # Another process may have been here since the first look.
            _refuse_wrong_start(config, resume)
            with atomic_write(run.config) as path:
                path.write_text(to_toml(config), encoding="utf-8")
        yield run


@contextmanager
def _unusable_told(config: Config) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise InputError(
            f"training.folder = {config.training.folder!r} cannot be made or written to "
            f"({error.strerror}): name another."
        ) from None


def resume_command(config: Config) -> str:
    """What to type to go on with a run: its own configuration, resumed."""
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if inside else sys.executable
    script = Path(sys.argv[0]).with_name("train.py")
    recorded = RunFolder(config.training.folder).config
    return shlex.join([python, str(script), "--config", str(recorded), "--resume"])
