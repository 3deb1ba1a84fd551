"""What launchers see of a process that fails, and what a process sees of a launcher that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from launched import dead_rank
from places import ROOT

from alro_fast.errors import AlroFastError
from alro_fast.options import RankerTrainingArguments
from alro_fast.training.batches import CURSOR, Cursor
from alro_fast.training.engines.checks import SIZES, check_launch, check_same_engine

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
        [*TORCHRUN, dead_rank.__file__, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT
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


def test_a_launch_of_one_process_in_place_of_several_is_refused(monkeypatch, tmp_path):
    """What `accelerate launch --cpu --num_processes 2` sets for the one process it starts."""
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for name in SIZES:
        monkeypatch.delenv(name, raising=False)
    training = RankerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(AlroFastError, match=r"--cpu starts one process, .* give --multi_gpu in place of --cpu"):
        check_launch(training)
    monkeypatch.setenv("PMI_SIZE", "2")
    check_launch(training)


@pytest.mark.parametrize(
    ("left", "engine", "processes", "said"),
    [
        ("pytorch_model_fsdp_0", "plain or DDP", 2, "was written by FSDP training, this run is plain or DDP"),
        ("optimizer.pt", "FSDP", 2, "was written by plain or DDP training, this run is FSDP"),
        ("global_step5", "FSDP", 2, "was written by DeepSpeed training, this run is FSDP"),
        ("global_step5", "DeepSpeed", 4, "DeepSpeed kept .* in 2 parts, and 4 processes were launched; launch 2"),
        ("global_step5", "DeepSpeed", 2, None),
        ("pytorch_model_fsdp_0", "FSDP", 4, None),
        ("optimizer.pt", "plain or DDP", 1, None),
    ],
)
def test_a_checkpoint_goes_on_under_the_engine_that_wrote_it(tmp_path, left, engine, processes, said):
    (tmp_path / left).mkdir()
    cursor = Cursor(processes=2, accumulation=1).to_dict()
    state = {"global_step": 5, "stateful_callbacks": {CURSOR: cursor}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    if said is None:
        check_same_engine(tmp_path, engine, processes)
        return
    with pytest.raises(AlroFastError, match=said):
        check_same_engine(tmp_path, engine, processes)
