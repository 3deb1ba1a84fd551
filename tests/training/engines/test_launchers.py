"""What launchers see of a process that fails, and what a process sees of a launcher that dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from places import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
}


def test_a_mistake_is_the_last_word_of_torchruns_report(tmp_path):
    """Each process ends with status 2; torchrun's own is 1, and its report ends with the line."""
    words = [
        "-m",
        "alro_fast.train",
        "--output_dir",
        str(tmp_path / "run"),
        "--template",
        "novels",
        "--dataset",
        "demo",
    ]
    done = subprocess.run([*TORCHRUN, *words], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "exitcode  : 2" in done.stderr
    line, rule = [line.strip() for line in done.stderr.splitlines() if line.strip()][-2:]
    assert line.startswith("traceback : error: no prompt template 'novels': expected one of ")
    assert set(rule) == {"="}
    assert not (tmp_path / "run").exists()


def test_a_dead_process_ends_all_and_its_error_comes_first(tmp_path):
    """The other waits for its gradients in a collective that nobody will finish."""
    started = time.monotonic()
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "tests" / "support" / "launched" / "dead_rank.py"), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    first = re.search(r"\w+Error: .*", done.stderr)
    assert first[0] == "ValueError: the second process fails here"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a dead parent on Linux")
def test_a_launchers_death_ends_its_workers():
    """SIGKILL leaves a launcher no time to end anybody."""
    worker = "from alro_fast.processes.elastic import *; import time; end_with_launcher(); print(1); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-uc', {worker!r}])"
    environment = ENVIRONMENT | {"TORCHELASTIC_RUN_ID": "none"}
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == b""  # ends when the worker does, which holds it too
    assert process.returncode == -signal.SIGKILL
