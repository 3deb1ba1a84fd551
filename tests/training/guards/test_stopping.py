"""SIGTERM and SIGINT: the step is finished and saved, and the run goes on from there as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import long_run
import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

from alro_fast import cli
from alro_fast.errors import Stopped
from alro_fast.training.checkpoints import damage

SMALL = {"lists": 60, "epochs": 2, "accumulation": 1, "logging_steps": 4, "save_steps": 100}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer, seen = long_run.train(folder, **SMALL)
    return folder, long_run.weights(trainer), seen


def signalled(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal within a step."""
    compute = long_run.RankerTrainer.loss_terms

    def struck(self, *given):
        if self.model.training and self.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return compute(self, *given)

    monkeypatch.setattr(long_run.RankerTrainer, "loss_terms", struck)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 6), (signal.SIGINT, 12), (signal.SIGTERM, 24)])
def test_a_signal_leaves_a_checkpoint_and_loses_nothing(whole, tmp_path, monkeypatch, capfd, number, step):
    folder, weights, expected = whole
    before = signal.getsignal(number)
    signalled(monkeypatch, step, number)
    with pytest.raises(Stopped) as caught:
        long_run.train(tmp_path, **SMALL)
    assert signal.getsignal(number) is before
    assert caught.value.status == 128 + number
    name = signal.Signals(number).name
    last, checkpoint = history(folder)[-1]["step"], tmp_path / f"checkpoint-{step}"
    assert str(caught.value) == (
        f"stopped by {name} after step {step} of {last}: {checkpoint}; go on with the same command and "
        "--resume_from_checkpoint true"
    )
    assert capfd.readouterr().err.count(f"{name}: a checkpoint is saved after this step; again: ends at once\n") == 1
    monkeypatch.undo()
    assert damage(checkpoint) is None
    trainer, rest = long_run.train(tmp_path, **SMALL, resume=tmp_path / f"checkpoint-{step}")
    assert rest == expected[len(expected) - len(rest) :]
    torch.testing.assert_close(long_run.weights(trainer), weights, rtol=0, atol=1e-6)
    steps, expected_steps = ([line["step"] for line in history(one)] for one in (tmp_path, folder))
    assert steps == sorted([*expected_steps, *{step} - set(expected_steps)])


@pytest.mark.parametrize("step", [12, 23])  # where it is also saved, and where it is not
def test_a_stop_saves_the_steps_own_weights_and_not_the_best(whole, tmp_path, monkeypatch, step):
    _, weights, expected = whole
    monkeypatch.setattr(long_run.RankerTrainer, "evaluate", lambda self, *_, **__: judged(self))

    def judged(trainer):  # the first is the best
        metrics = {"eval_loss": float(trainer.state.global_step)}
        trainer.log(metrics)
        return metrics

    best = {"load_best_model_at_end": True, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 4}
    best |= {"save_steps": 4, "judged": 4}
    signalled(monkeypatch, step, signal.SIGTERM)
    with pytest.raises(Stopped, match=f"checkpoint-{step};"):
        long_run.train(tmp_path, **SMALL | best)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}", "checkpoint-4"]
    saved = {path.parent.name: load_file(path) for path in tmp_path.glob("checkpoint-*/adapter_model.safetensors")}
    assert any(not torch.equal(saved["checkpoint-4"][name], w) for name, w in saved[f"checkpoint-{step}"].items())
    if step == 12:
        undone = long_run.train(tmp_path, **SMALL, resume=tmp_path / "checkpoint-12")
        assert undone[1] == expected[len(expected) - len(undone[1]) :]
        torch.testing.assert_close(long_run.weights(undone[0]), weights, rtol=0, atol=1e-6)


def test_a_signal_after_all_agreed_to_end_is_not_lost(tmp_path, monkeypatch):
    def struck(self, *_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(long_run._StopAt, "on_train_end", struck)
    with pytest.raises(KeyboardInterrupt):
        long_run.train(tmp_path, **SMALL | {"max_steps": 3})


def history(folder):
    return list(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))


def test_the_command_ends_with_the_signals_status(capsys):
    def main(_):
        raise Stopped("stopped by SIGTERM after step 6 of 24: x/checkpoint-6; go on", 143)

    with pytest.raises(SystemExit) as caught:
        cli.run(main, [])
    assert caught.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM after step 6 of 24: x/checkpoint-6; go on\n"


def test_a_second_signal_ends_at_once(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from alro_fast.training.guards.stopping import Stopping\n"
        "with (stopping := Stopping()).listening(say=True):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stopping.heard.name, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGTERM\n")
    assert time.monotonic() - started < 50


def test_all_processes_stop_after_the_same_step(tmp_path, whole):
    """A signal to one of two ends both, with one checkpoint, from which one process goes on."""
    _, weights, expected = whole
    words = [f"{key}={value}" for key, value in (SMALL | {"accumulation": 2, "strike": 5}).items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", long_run.__file__,
         str(tmp_path), *words],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("Stopped: stopped by SIGTERM after step 6 of ") == 1  # of the first process alone
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert (tmp_path / "checkpoint-6" / "rng_state_1.pth").is_file()
    del weights, expected
