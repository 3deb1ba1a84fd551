"""Runs that are stopped and go on: every list of every epoch once, and the weights of a run that was never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import long_run
import pytest
import torch
from places import ROOT


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing stops: its folder, weights, steps and lists by epoch."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, seen = long_run.train(folder, dropout=0.1, save_steps=40)
    return folder, long_run.weights(trainer), trainer.state.global_step, seen


def test_every_list_is_trained_in_every_epoch(whole):
    _, _, steps, seen = whole
    assert steps == 3 * 40
    assert Counter(seen) == {(epoch, f"l{i}"): 1 for epoch in range(3) for i in range(400)}


@pytest.mark.parametrize("stops", [(40, 48, 70), (80, 108, 120)])
def test_a_run_stopped_twice_is_the_run_that_was_not(whole, tmp_path, stops):
    """At an epoch's boundary, then twice within an epoch, or within one and at the very end."""
    folder, weights, steps, expected = whole
    first, *later = stops
    resume, seen = folder / f"checkpoint-{first}" if first else None, expected[: 400 * first // 40]
    for stop in (*later, 0):
        trainer, trained = long_run.train(tmp_path, stop=stop, resume=resume, dropout=0.1)
        seen += trained
        resume = tmp_path / f"checkpoint-{stop}"
    assert seen == expected
    assert trainer.state.global_step == steps
    assert trainer.state.epoch == 3
    torch.testing.assert_close(long_run.weights(trainer), weights, rtol=0, atol=1e-6)


def test_processes_may_come_and_go_within_an_epoch(tmp_path):
    """1 -> 2 -> 1 processes, within one epoch, with steps of as many batches: the same run."""
    small = {"lists": 60, "epochs": 2}
    trainer, expected = long_run.train(tmp_path / "whole", **small)
    folder = tmp_path / "stopped"
    _, seen = long_run.train(folder, stop=3, **small)
    ranks = two_processes(folder, **small, accumulation=2, stop=6, resume=folder / "checkpoint-3")
    assert ranks[0]["step"] == ranks[1]["step"] == 6
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)
    resumed, rest = long_run.train(folder, resume=folder / "checkpoint-6", **small)
    assert Counter(seen + ranks[0]["seen"] + ranks[1]["seen"] + rest) == Counter(expected)
    assert resumed.state.global_step == trainer.state.global_step
    torch.testing.assert_close(long_run.weights(resumed), long_run.weights(trainer), rtol=0, atol=1e-6)


@pytest.mark.parametrize("epochs", [2, 1.5])
def test_steps_of_other_size_still_train_every_list_once(tmp_path, capsys, epochs):
    small = {"lists": 60, "epochs": epochs}
    _, expected = long_run.train(tmp_path / "whole", **small, accumulation=1)
    _, seen = long_run.train(tmp_path / "stopped", **small, stop=6)
    capsys.readouterr()
    resume = tmp_path / "stopped" / "checkpoint-6"
    trainer, rest = long_run.train(tmp_path / "stopped", **small, resume=resume, accumulation=1)
    assert seen + rest == expected
    left = trainer.state.global_step - 6
    said = f"{resume} was trained by 1 x 4 batches a step, processes x accumulation; with 1 x 1, {left} steps are left"
    assert said in capsys.readouterr().out


def test_workers_build_the_same_batches_and_leave_the_place_exact(tmp_path):
    """Batches built ahead by two workers: the same weights bit by bit, also of a run that was stopped among them."""
    small = {"lists": 60, "epochs": 2, "dropout": 0.1}
    ahead = {**small, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}
    trainer, expected = long_run.train(tmp_path / "whole", **small)
    _, seen = long_run.train(tmp_path / "ahead", **ahead, stop=4)
    resumed, rest = long_run.train(tmp_path / "ahead", **ahead, resume=tmp_path / "ahead" / "checkpoint-4")
    assert resumed.get_train_dataloader().prefetch_factor == 3
    assert seen + rest == expected
    assert torch.equal(long_run.weights(resumed), long_run.weights(trainer))


def two_processes(folder, **options):
    """What each of two processes trained."""
    words = [f"{key}={value}" for key, value in options.items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", long_run.__file__,
         str(folder), *words],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"seen-{rank}.pt", weights_only=False) for rank in range(2)]
