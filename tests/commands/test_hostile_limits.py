"""Inputs that unfold: the memory of a process of its own, at most a gibibyte, until it has said no."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_cases import write_files
from places import ROOT

GIBIBYTE = 1 << 30
MEASURED = """
import atexit, sys
from alro_fast.cli import main
def tell():
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")), file=sys.stderr)
atexit.register(tell)
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    write_files(folder / "bad")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the most memory there")
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("prepare --dataset csv --ratings_file bad/bomb.csv.gz --output_dir made", "unfolds to more than"),
        ("prepare --dataset csv --ratings_file bad/line.csv.gz --output_dir made", "has a line of more than"),
        ("rank --adapter bad /dev/zero", "more than 64 million characters"),
        ("rank --adapter bad bad/deep_in.json", "nested too deeply"),
        ("client --adapter bad --model x bad/long.json", "longer than 10,000 characters"),
    ],
)
def test_it_ends_within_a_gibibyte(place, words, answer):
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words.split()],
        cwd=place, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said, _, most = done.stderr.rpartition("VmHWM:")
    assert done.returncode == 2, done.stderr
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert answer in said
    assert int(most.split()[0]) * 1024 < GIBIBYTE
    assert not (place / "made").exists()
