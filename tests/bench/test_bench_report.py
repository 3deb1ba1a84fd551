from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

MACHINE = {"device": "Test GPU", "driver, clocks, power": None, "torch": "9.9"}


def entry(group: str, name: str, **info) -> dict:
    return {
        "group": group,
        "name": f"test[{name}]",
        "stats": {"median": 5.0},
        "extra_info": {"contestant": name, "machine": MACHINE, **info},
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    made = [
        entry("ce-forward", "slow", median_s=0.25, error=3e-3, peak_bytes=3 * 2**20),
        entry("ce-forward", "alro_fast triton", median_s=0.0125, error=1e-5, peak_bytes=2**20, times_floor=1.1),
        entry("ce-forward", "floor (bare GEMMs)", median_s=0.011, times_floor=1.0),
        entry("ce-forward", "gone", absent="absent: gone is not installed"),
        {"group": None, "name": "test_plain", "stats": {"median": 2.0}, "extra_info": {}},
    ]
    path.write_text(json.dumps({"benchmarks": made}))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_tables_hold_the_numbers_of_the_file_fastest_first(results: Path) -> None:
    text = run(results).stdout
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert "Measured on: device Test GPU, torch 9.9." in text
    assert rows[1] == "| floor (bare GEMMs) | 11 ms | 1.00 |  |  |"
    assert rows[2] == "| alro_fast triton | 12.5 ms | 1.10 | 1.0e-05 | 1 MiB |"
    assert rows[3] == "| slow | 250 ms |  | 3.0e-03 | 3 MiB |"
    assert rows[4].startswith("| gone | absent: gone is not installed |")
    assert "| test_plain | 2 s |" in rows


def test_folder_gets_markdown_and_plots(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(results, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "ce-forward.png", "test-plain.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("[1]", "no benchmark result"),
        ("{", "no benchmark result"),
        ('{"benchmarks": []}', "no benchmarks"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    done = run(path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
