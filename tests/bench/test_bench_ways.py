"""The contestants of the step benchmarks, small: they are built, run and agree. Times are for `pytest bench/`."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import bench_dmpo, bench_step, common


def test_alro_step_ours_and_the_ordinary_way():
    shape = bench_step.Shape(300, 32, 48, 2, 2, 1, lists=2, rounds=1, at_least=0.0)
    losses = [bench_step.step(*bench_step.build(way, shape)) for way in ("ours", "ordinary")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_dmpo_step_ours_and_padded(monkeypatch):
    for name, value in {"VOCAB": 300, "HIDDEN": 32, "NEGATIVES": 3, "PROMPT": 30, "ANSWER": 4}.items():
        monkeypatch.setattr(bench_dmpo, name, value)
    bench_dmpo.agree(bench_dmpo.Ours(), bench_dmpo.Padded())


@pytest.mark.parametrize(("dry", "runs"), [(True, 3), (False, 2 + 1 + 4 + 1)])
def test_a_dry_run_takes_one_round(monkeypatch, dry, runs):
    """Once for the peak, once for a time, once for the result; else as often as asked, warmed up."""
    monkeypatch.setattr(common, "DRY", dry)
    calls = []
    made = common.interleave([common.Contestant("one", lambda: lambda: calls.append(1) or len(calls))], rounds=4)
    assert len(calls) == made["one"].result == runs
    assert made["one"].fastest <= made["one"].median <= made["one"].slowest


def test_every_contestant_multiplies_in_the_same_precision(monkeypatch):
    """Under autocast no matrix product is in float32, neither PEFT's (adapters are float32) nor ours."""
    monkeypatch.setattr(bench_step, "AUTOCAST", True)
    shape = bench_step.Shape(300, 32, 48, 2, 2, 1, lists=2, rounds=1, at_least=0.0)
    for way in ("ours", "ordinary"):
        built = bench_step.build(way, shape)
        with Products() as products:
            bench_step.step(*built)
        assert products.dtypes == {torch.bfloat16}, way


class Products(TorchDispatchMode):
    """Dtypes of the operands of every matrix product of a model's width and more."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes.update(a.dtype for a in arguments[-2:])
        return function(*arguments, **(keywords or {}))
