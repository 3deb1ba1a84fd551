"""bench/device.sh on a CPU: its parts and their limits, and a dry run of the smallest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

KILLED_AFTER = 10  # seconds that a part may take to end, past its limit


def device(*arguments: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", ROOT / "bench" / "device.sh", *map(str, arguments)]
    others = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # this run's workers
    environment = {**others, "PATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def listed(*options: str) -> dict[str, int]:
    made = device("--list", *options)
    assert made.returncode == 0, made.stderr
    return {name: int(limit) for name, limit in map(str.split, made.stdout.splitlines())}


def test_a_real_run_ends_within_ten_minutes() -> None:
    parts = listed()
    assert {"tests", "listwise", "head", "attention", "rates", "step-0.5B", "step-8B", "report"} == parts.keys()
    assert sum(limit + KILLED_AFTER for limit in parts.values()) < 590


def test_a_dry_run_has_the_same_parts_tiny() -> None:
    dry = listed("--dry")
    assert {"tests", "interpreted", "listwise", "head", "attention", "rates", "step-tiny", "report"} == dry.keys()


@pytest.mark.parametrize(("arguments", "message"), [(("out", "heads"), "heads is no part"), (("--dyr",), "no option")])
def test_what_it_does_not_know_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = device(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_dry_part_leaves_results_and_a_broken_file_takes_none_along(tmp_path: Path) -> None:
    (tmp_path / "head.json").write_text("{")
    done = device(tmp_path, "--dry", "attention", "rates", "report")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()[1:]] == ["attention", "rates", "report"]
    records = json.loads((tmp_path / "attention.json").read_text())["benchmarks"]
    assert all(record["extra_info"]["machine"]["torch"] for record in records)
    assert "Rates(nan, nan, " in (tmp_path / "summary.txt").read_text()
    report = (tmp_path / "report.md").read_text()
    assert "not a measurement" in report
    assert "| median | spread |" in report
    assert "left out" in (tmp_path / "report.log").read_text()
