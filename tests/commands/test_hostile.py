"""Bad commands and inputs: each is answered by one line and exit status 2, in seconds, and nothing is lost."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import pytest
from hostile_cases import CASES, write_files

from alro_fast import cli
from alro_fast.texts import printable

SECONDS = 20  # of the slowest, on a busy machine


@pytest.fixture(scope="module")
def place(folder):
    write_files(folder / "bad")
    return folder


def standing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("command", "words", "answer"), CASES, ids=[printable(" ".join((name, *words))) for name, words, _ in CASES]
)
def test_a_bad_command_is_one_line(place, monkeypatch, capsys, command, words, answer):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before, start = standing(place), time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.run(importlib.import_module(f"alro_fast.{command}").main, words)
    seconds, said = time.monotonic() - start, capsys.readouterr().err
    assert ended.value.code == 2, said
    assert said.startswith("error: ")
    assert said.endswith("\n")
    assert said.rstrip("\n").isprintable(), said
    assert answer in said
    assert "secret" not in said
    assert len(said) < 2000
    assert seconds < SECONDS
    assert standing(place) == before
