"""Kernels compiled for every generation without a GPU: spills, shared memory, tensor cores.

One configuration per kernel here; `python -m bench.kernel_report --check` takes all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("triton")
KIB = 1024  # of shared memory that a block may have, by the vendors' manuals
LIMITS = {
    "sm80": 163 * KIB, "sm89": 99 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "sm120": 99 * KIB, "gfx942": 64 * KIB,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def report(cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The report in a process of its own: kernels are compiled only where they are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.kernel_report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("architecture", ["sm80", "sm89", "sm90", "sm100", "sm120", "gfx942"])  # sm86 is sm89's
def test_no_kernel_breaks_a_rule(cache: Path, architecture: str) -> None:
    result = report(cache, "--sample", "--check", "--arch", architecture)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith(f"| {architecture}")]
    kernels = {line.split("|")[2].strip() for line in rows}
    assert kernels == {
        "vocab_stats_kernel", "combine_kernel", "select_kernel", "probability_kernel", "accumulate_kernel",
        "advance_kernel", "differentiate_kernel", "listwise_kernel", "gather_logits_kernel", "scatter_kernel",
        "trie_forward_kernel", "trie_query_grad_kernel", "trie_key_grad_kernel", "trie_add_up_kernel",
    }  # fmt: skip
    assert all(int(row.split("|")[5]) <= LIMITS[architecture] for row in rows)


@pytest.mark.parametrize(
    ("architecture", "change", "said"),
    [
        ("sm90", "half[0], half[1]._replace(block_m=128), half[2]", "spilled"),  # a tile too large for the registers
        ("sm89", "*half[:2], half[2]._replace(block_h=64, num_stages=5)", "shared memory over 101376"),
    ],
)
def test_the_check_can_fail(cache: Path, tmp_path: Path, architecture: str, change: str, said: str) -> None:
    """What breaks a rule is reported, and ends with status 1."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "from alro_fast.kernels import configs\n"
        "from bench import kernel_report\n"
        f"half, full = configs._TILES['{architecture}']\n"
        f"configs._TILES['{architecture}'] = (({change}), full)\n"
        f"sys.exit(kernel_report.main(['--sample', '--check', '--arch', '{architecture}']))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert said in result.stdout


def test_interpreted_kernels_are_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.kernel_report"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
