"""Training on a device: a step beside the CPU's eager backend, and a run that is stopped and goes on."""

from __future__ import annotations

import long_run
import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # the CPU proves what a GPU runs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", ["sft", "alro"])
def test_steps_are_those_of_the_eager_backend_on_the_cpu(tmp_path, device, objective):
    """Three steps of SGD, float32: weights to a thousandth of how far they moved."""
    small = {"lists": 24, "epochs": 1, "accumulation": 2, "objective": objective, "optim": "sgd", "stop": 3}
    start, _ = long_run.train(tmp_path / "start", **small, backend="eager", max_grad_norm=1.0, learning_rate=0.0)
    wanted, lists = long_run.train(tmp_path / "cpu", **small, backend="eager", max_grad_norm=1.0)
    got, seen = long_run.train(tmp_path / "device", **small, device=device, max_grad_norm=1.0)
    assert got.args.device.type == device
    assert seen == lists
    moved = (long_run.weights(wanted) - long_run.weights(start)).abs().max()
    assert moved > 1e-4
    assert (long_run.weights(got) - long_run.weights(wanted)).abs().max() <= 1e-3 * moved


@pytest.mark.parametrize("device", DEVICES)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, device):
    """With dropout, so that the device's random numbers go on as well; sums by atomic additions differ in last bits."""
    small = {"lists": 40, "epochs": 2, "accumulation": 2, "dropout": 0.1, "device": device}
    whole, expected = long_run.train(tmp_path / "whole", **small)
    _, seen = long_run.train(tmp_path / "stopped", **small, stop=4)
    resumed, rest = long_run.train(tmp_path / "stopped", **small, resume=tmp_path / "stopped" / "checkpoint-4")
    assert seen + rest == expected
    assert resumed.state.global_step == whole.state.global_step > 6
    close = 1e-6 if device == "cpu" else 1e-4
    torch.testing.assert_close(long_run.weights(resumed), long_run.weights(whole), rtol=0, atol=close)
