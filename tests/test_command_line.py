"""Arguments of scripts: lists, and what is refused before any work."""

import argparse
import os
import runpy
import sys
from pathlib import Path

import pytest

from galore_jax.command_line import check_folder, separated
from galore_jax.errors import InputError

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    return path


def test_lists_are_separated_by_commas_without_repetitions():
    assert separated()(" a b,c,,c") == ["a b", "c"]
    assert separated(float)("1e-3, 2,0.001") == [0.001, 2]
    for kind, text, reason in ((str, ",", "list something"), (int, "0,x", "'0,x' has more than")):
        with pytest.raises(argparse.ArgumentTypeError, match=reason):
            separated(kind)(text)


def test_a_folder_that_exists_or_can_be_made_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "newer", "new", "."):
        check_folder("--out", folder)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_or_is_in_a_file_is_refused(file, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for none in (file, tmp_path / "link"):
        for folder in (none, none / "new" / "newer"):
            with pytest.raises(
                InputError, match=f"folder {folder}, but {none} is not a folder: name"
            ):
                check_folder("--out", folder)


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write there
    with pytest.raises(InputError, match=f"{tmp_path} cannot be written to: change its permissi"):
        check_folder("--out", tmp_path / "new")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("export.py", ["nowhere", "TARGET"]),
        ("prepare_c4.py", ["nowhere", "--out", "TARGET"]),
        ("train_tokenizer.py", ["--source", "nowhere", "--out", "TARGET/spiece.model"]),
    ],
)
def test_a_script_refuses_such_a_folder_first(file, monkeypatch, capsys, script, arguments):
    arguments = [argument.replace("TARGET", str(file)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.endswith(f"but {file} is not a folder: name another.\n")
