"""A measurement takes the place of an earlier one as a whole, whenever the process that writes it ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from alro_fast.run_folder import READY, RESULTS, replacing, settle

OLD = {"results.json": "old", "run.trec": "old", "report.html": "old"}
NEW = {"results.json": "new", "predictions.jsonl": "new"}


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


def replaced(folder: Path, die_at: int = 10**9) -> int:
    """Replace OLD by NEW in a process that SIGKILL ends at one of its changes to files; how many it got to make."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as told:
            return len(told.read())
    changes = 0

    def counted(event: str, given: tuple) -> None:
        nonlocal changes
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(folder) in str(given[0]):
            changes += 1
            os.write(writer, b".")
            if changes == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(counted)
    with replacing(folder, {*OLD, *NEW}) as work:
        write(work, NEW)
    os._exit(0)


def test_whenever_it_ends_one_of_the_two_is_there(tmp_path):
    write(tmp_path / "whole", OLD)
    changes = replaced(tmp_path / "whole")
    assert held(tmp_path / "whole") == NEW
    found = []
    for at in range(1, changes + 1):
        folder = tmp_path / str(at)
        write(folder, OLD)
        assert replaced(folder, at) == at
        assert set(held(folder).values()) in ({"old"}, {"new"}, set())  # before anything is mended
        settle(folder)
        assert held(folder) in (OLD, NEW)
        found.append(held(folder) == NEW)
        replaced(folder)  # and the next one finds nothing in its way
        assert held(folder) == NEW
        assert not (folder / RESULTS).exists()
        assert not (folder / READY).exists()
    assert found == sorted(found)
    assert len(set(found)) == 2


def test_what_fails_leaves_the_earlier_one(tmp_path):
    write(tmp_path, OLD)

    def full() -> None:
        with replacing(tmp_path, OLD) as work:
            write(work, NEW)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        full()
    assert held(tmp_path) == OLD
    assert not (tmp_path / RESULTS).exists()
