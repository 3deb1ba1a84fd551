"""Which backend serves a call, and what is said of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types

import pytest
import torch
from head_runs import F64, make_head

from alro_fast import ops
from alro_fast.errors import AlroFastError
from alro_fast.ops import dispatch


def test_auto_is_chosen_by_device_and_said_once(caplog):
    hidden, weight, _ = make_head(3, 32, 101)
    dispatch._resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="alro_fast.ops"):
        for _ in range(2):
            ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]))
    lines = [record.message for record in caplog.records]
    assert lines == [f"backend {ops.available_backends('cpu')[0]} serves float32 tensors on cpu"]


def test_float64_is_served_by_eager_alone_and_automatically():
    assert ops.available_backends("cpu", F64) == ["eager"]
    hidden, weight, _ = make_head(3, 32, 101)
    logprobs, lse = ops.linear_logprobs(hidden.double(), weight.double(), torch.tensor([1, 2, 3]))
    assert logprobs.dtype == lse.dtype == F64


@pytest.fixture
def stand_in(monkeypatch):
    """A backend module named cpp that records its calls; `reason` makes it unavailable."""
    module = types.ModuleType("alro_fast.ops.backends.cpp")
    eager = importlib.import_module("alro_fast.ops.backends.eager")
    module.calls, module.reason = [], None
    module.unavailable = lambda device, dtype: module.reason
    for name in ("vocab_pass", "weight_grad", "listwise"):

        def forward(*args, _name=name, **kwargs):
            module.calls.append(_name)
            return getattr(eager, _name)(*args, **kwargs)

        setattr(module, name, forward)
    monkeypatch.setitem(sys.modules, "alro_fast.ops.backends.cpp", module)
    dispatch._resolve.cache_clear()
    yield module
    dispatch._resolve.cache_clear()


def test_auto_prefers_the_cpp_backend_on_the_cpu(stand_in):
    hidden, weight, _ = make_head(3, 32, 101)
    weight.requires_grad_()
    ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]))[0].sum().backward()
    assert stand_in.calls == ["vocab_pass", "weight_grad"]


def test_backends_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, whichever holds the tensors."""
    module = ops.resolve_backend("eager", torch.device("cpu"), torch.float32)
    current, ran = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def spy(name, original):
        def call(tensor, *args, **kwargs):
            ran.append((name, bool(current) and current[-1].device == tensor.device))
            return original(tensor, *args, **kwargs)

        return call

    names = ("vocab_pass", "gather_logits", "listwise", "gather_backward", "weight_grad")
    for name in names:
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    leaves = [tensor.requires_grad_() for tensor in make_head(3, 8, 23)[:2]]
    ops.linear_logprobs(*leaves, torch.tensor([1, 2, 3]), backend="eager")[0].sum().backward()
    scores, mask = torch.randn(1, 3, 3), torch.ones(1, 3, dtype=torch.bool)
    ops.soft_lambda(scores, torch.ones(1, 3), mask, gamma=1.0, sigma=1.0, backend="eager")
    assert dict(ran) == dict.fromkeys(names, True)


def test_a_backend_that_cannot_serve_is_refused_by_name_and_skipped_by_auto(stand_in):
    hidden, weight, _ = make_head(3, 32, 101)
    stand_in.reason = "its kernels are not installed"
    with pytest.raises(
        AlroFastError, match=r"backend 'cpp' cannot serve torch.float32 tensors on cpu: its kernels are"
    ):
        ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]), backend="cpp")
    ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]))
    assert stand_in.calls == []


def test_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "alro_fast.ops.backends.triton", None)  # import raises ImportError
    dispatch._resolve.cache_clear()
    hidden, weight, _ = make_head(3, 32, 101)
    with pytest.raises(AlroFastError, match=r"backend 'triton' cannot serve .* not installed"):
        ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]), backend="triton")
    dispatch._resolve.cache_clear()
