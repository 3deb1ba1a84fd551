"""A few of the faults of `python -m bench.faults`; the whole of it is run by hand and, weekly, by CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from places import ROOT


@pytest.fixture(scope="module")
def struck(tmp_path_factory):
    """Its table, by fault, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("faults")
    done = subprocess.run(
        [sys.executable, "-m", "bench.faults", "--only", "step,save,full,evaluate", "--times", "1", "--seed", "3",
         "--folder", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}, folder


def test_what_was_struck_goes_on_as_if_it_had_not_been(struck):
    table, _ = struck
    assert [row[1] for row in table.values()] == ["137", "137", "2", "137"]
    for _, _, _, weights, lists, failed in table.values():
        assert weights in ("-", "0") or float(weights) <= 1e-6
        assert (lists, failed) == ("0", "0")


def test_a_full_disk_is_one_line_that_says_how_to_go_on(struck):
    _, folder = struck
    lines = [line for log in folder.glob("log-*.txt") for line in log.read_text().splitlines()]
    (said,) = [line for line in lines if line.startswith("error: ")]
    reason = r"\((File too large|the file was written in part)\)"  # by the file that it met
    assert re.search(rf"checkpoint-4 cannot be written {reason}; mend that, then go on from ", said)
    assert said.endswith("checkpoint-2 with --resume_from_checkpoint true")
    assert not [line for line in lines if line.startswith("Traceback")]
