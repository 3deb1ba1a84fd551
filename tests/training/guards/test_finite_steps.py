"""Steps whose loss or gradient is no number: as if they had not been, counted, and after some in a row the end."""

from __future__ import annotations

import json
import math

import long_run
import pytest
import torch
from torch import Tensor

from alro_fast.errors import AlroFastError
from alro_fast.objectives import sft
from alro_fast.training.guards import finite
from alro_fast.training.guards import trainer as guarded

SMALL = {"lists": 60, "epochs": 1, "accumulation": 1, "logging_steps": 4, "save_steps": 5}


class Wrong(torch.autograd.Function):
    """The identity, with a gradient that is none."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * math.inf


def breaking(monkeypatch, what: dict[int, str], after: int = 10**9) -> None:
    """Make the loss of some steps (counted from 1, and all `after` one) infinite, or its gradient."""
    loss, calls = sft.SFTObjective.loss, iter(range(1, 10**9))

    def broken(self, *given):
        step = next(calls)
        kind = "loss" if step > after else what.get(step)
        terms = loss(self, *given)
        if kind == "loss":
            return [term._replace(value=term.value * math.inf) for term in terms]
        return [term._replace(value=Wrong.apply(term.value)) for term in terms] if kind else terms

    monkeypatch.setattr(sft.SFTObjective, "loss", broken)


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_without_a_number_changes_nothing(tmp_path, monkeypatch, on_device):
    """Weights, moments and Adam's count of steps; also where the optimiser's kernels are told, as on CUDA."""
    monkeypatch.setattr(guarded, "told_on_device", lambda *_: on_device)
    breaking(monkeypatch, {2: "loss", 3: "gradient"})
    states = []
    judge = finite.FiniteSteps.judge

    def noting(self, *given):
        states.append((long_run.weights(runner).clone(), moments(runner)))
        judge(self, *given)

    def moments(trainer):
        return [{k: v.clone() for k, v in s.items()} for s in trainer.optimizer.state_dict()["state"].values()]

    class Keep(long_run.RankerTrainer):
        def __init__(self, *given, **options):
            nonlocal runner
            super().__init__(*given, **options)
            runner = self

    runner: long_run.RankerTrainer
    monkeypatch.setattr(long_run, "RankerTrainer", Keep)
    monkeypatch.setattr(finite.FiniteSteps, "judge", noting)
    trainer, _ = long_run.train(tmp_path, **SMALL, optim="adamw_torch_fused", max_steps=6)
    weights, kept = zip(*states)
    assert torch.equal(weights[1], weights[2])  # before step 2, and before step 3
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
    for before, after in zip(kept[1], kept[3], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.finite.skipped == 2


def test_the_log_is_of_the_steps_that_counted(tmp_path, monkeypatch):
    once, _ = long_run.train(tmp_path / "sound", **SMALL, max_steps=4, learning_rate=0.0)
    sound = [line["loss"] for line in logged(tmp_path / "sound") if "loss" in line]
    values = []
    compute = long_run.RankerTrainer.compute_loss

    def noting(self, *given, **more):
        loss = compute(self, *given, **more)
        values.append(loss.item())
        return loss

    monkeypatch.setattr(long_run.RankerTrainer, "compute_loss", noting)
    breaking(monkeypatch, {3: "loss"})
    long_run.train(tmp_path / "broken", **SMALL, max_steps=4, learning_rate=0.0)
    line = logged(tmp_path / "broken")[1]  # steps 2 to 4
    assert line["step"] == 4
    assert line["skipped_steps"] == 1
    assert line["loss"] == pytest.approx((values[1] + values[3]) / 2)
    assert line["sft"] == pytest.approx(line["loss"])
    assert sound[1] == pytest.approx(sum(values[1:2] + values[3:]) / 3 + (3 * sound[1] - values[1] - values[3]) / 3)
    assert once.finite.skipped == 0


def test_a_line_of_a_step_that_did_not_count_has_no_loss(tmp_path, monkeypatch):
    breaking(monkeypatch, {2: "loss"})
    long_run.train(tmp_path, **SMALL | {"logging_steps": 1}, max_steps=3)
    first, second, third, _ = logged(tmp_path)
    assert second["skipped_steps"] == 1
    assert not {"loss", "sft", "grad_norm"} & second.keys()
    assert {"loss", "sft", "grad_norm"} <= first.keys() & third.keys()


@pytest.mark.parametrize("on_device", [False, True])
def test_too_many_in_a_row_end_the_run_with_a_diagnosis(tmp_path, monkeypatch, on_device):
    monkeypatch.setattr(guarded, "told_on_device", lambda *_: on_device)
    breaking(monkeypatch, {2: "loss"}, after=5)
    with pytest.raises(AlroFastError) as caught:
        long_run.train(tmp_path, **SMALL, max_nonfinite_steps=3, optim="adamw_torch_fused")
    message = str(caught.value)
    assert message.startswith("steps 6 to 8 have no finite loss and gradient (not finite: sft, on lists l")
    assert "--learning_rate 0.01, weights in float32" in message
    assert "none of them changed a weight" in message
    assert message.endswith("checkpoint-5 is the last good checkpoint")
    monkeypatch.undo()
    trainer, _ = long_run.train(tmp_path, **SMALL, resume=tmp_path / "checkpoint-5")
    assert trainer.finite.skipped == 1  # before step 5, and counted on


def test_a_gradient_that_is_none_is_told_apart(tmp_path, monkeypatch):
    breaking(monkeypatch, {1: "gradient"})
    with pytest.raises(
        AlroFastError, match=r"step 1 has no finite .*\(the loss was finite, its gradient was not;.*yet$"
    ):
        long_run.train(tmp_path, **SMALL, max_nonfinite_steps=1)


def test_what_another_process_found_is_told_too(tmp_path, monkeypatch):
    """Its loss is no number, and here only the gradient, which all share, is none."""
    breaking(monkeypatch, {1: "gradient"})
    others = [finite.Row(1, 1, ["sft"], ["l-7"])]
    monkeypatch.setattr(guarded, "gather_object", lambda mine: [*mine, *others])
    with pytest.raises(AlroFastError, match=r"step 1 has no finite .*\(not finite: sft, on lists l-7;"):
        long_run.train(tmp_path, **SMALL, max_nonfinite_steps=1)


def test_weights_without_numbers_are_never_saved(tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def overflowing(self, *given, **more):
        found = step(self, *given, **more)
        if next(calls) == 7:
            for weight in self.param_groups[0]["params"]:
                weight.data.fill_(math.inf)
        return found

    calls = iter(range(1, 99))
    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(AlroFastError, match=r"weights are no numbers, .*checkpoint-5 is the last good checkpoint"):
        long_run.train(tmp_path, **SMALL, max_nonfinite_steps=100)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
