"""Which backend serves a call, and what is said of it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import types

import pytest
import torch
from head_runs import F64, listwise_case, make_head

from alro_fast import ops
from alro_fast.errors import AlroFastError
from alro_fast.ops import dispatch
from alro_fast.ops.backends import eager, serves


def test_auto_is_chosen_by_device_and_said_once(caplog):
    hidden, weight, _ = make_head(3, 32, 101)
    dispatch._resolve.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="alro_fast.ops"):
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
    module.calls, module.reason = [], None
    module.unavailable = lambda device, dtype: module.reason
    module.SERVES = serves.Serves(("cpu",), (torch.float32,))
    for name in serves.FUNCTIONS:

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
    assert stand_in.calls == ["vocab_pass", "gather_logits", "weight_grad", "gather_backward"]


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


@pytest.mark.parametrize("limit", [{"functions": ("vocab_pass", "gather_logits")}, {"softcap": False}])
def test_what_a_backend_leaves_out_of_the_head_is_served_by_eager(stand_in, caplog, limit):
    """The trainable head, or the soft-cap: said once under "auto", refused where the backend was asked for."""
    stand_in.SERVES = dataclasses.replace(stand_in.SERVES, **limit)
    hidden, weight, _ = make_head(3, 32, 101)
    weight.requires_grad_()

    def grad(backend):
        logprobs, _ = ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]), softcap=3.0, backend=backend)
        return torch.autograd.grad(logprobs.sum(), weight)[0]

    dispatch._say_once_declined.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="alro_fast.ops"):
        for _ in range(2):
            torch.testing.assert_close(grad("auto"), grad("eager"))
    said = ["backend cpp serves float32 tensors on cpu"]
    left_out = ["weight_grad", "gather_backward"] if "functions" in limit else ["a soft-cap"]
    said += [f"backend eager serves {name}, which cpp does not" for name in left_out]
    assert [record.message for record in caplog.records] == said
    assert stand_in.calls == (2 * ["vocab_pass", "gather_logits"] if "functions" in limit else [])
    with pytest.raises(AlroFastError, match=f"backend 'cpp' does not serve {left_out[0]}: use 'auto' or 'eager'"):
        grad("cpp")


@pytest.mark.parametrize(
    ("limit", "form", "options"),
    [
        ({"functions": ("vocab_pass",)}, "ranking", {}),
        ({"forms": ("ranking",)}, "ratings", {}),
        ({"divergences": ("kl",)}, "ranking", {"divergence": "ce"}),
        ({"mask_emitted": False}, "ranking", {"divergence": "kl", "mask_emitted": True}),
        ({"longest_list": 4}, "ranking", {}),
    ],
)
def test_what_a_backend_leaves_out_of_lists_is_served_by_eager(stand_in, limit, form, options):
    lists, logits = listwise_case(form, [5, 5], [-1, 0])
    values = None if form == "ranking" else lists.grades.values
    arguments = (logits, lists.ratings, lists.ranks, torch.tensor([5, 5]), lists.twin, values)
    ops.listwise(*arguments, **options)
    assert stand_in.calls == ["listwise"]
    stand_in.SERVES = dataclasses.replace(stand_in.SERVES, **limit)
    got = ops.listwise(*arguments, **options)
    assert stand_in.calls == ["listwise"]
    torch.testing.assert_close(got[:3], ops.listwise(*arguments, **options, backend="eager")[:3])
    with pytest.raises(AlroFastError, match=r"backend 'cpp' does not serve .*: use 'auto' or 'eager'"):
        ops.listwise(*arguments, **options, backend="cpp")


def test_a_divergence_that_nobody_knows():
    lists, logits = listwise_case("ranking", [4], [-1])
    with pytest.raises(AlroFastError, match="divergence is 'js'; expected 'none' or one of 'kl', 'ce', 'symmetric'"):
        ops.listwise(logits, lists.ratings, lists.ranks, torch.tensor([4]), lists.twin, divergence="js")


@pytest.mark.parametrize("name", ops.BACKENDS)
def test_declarations_name_what_the_modules_have(name):
    module = pytest.importorskip(f"alro_fast.ops.backends.{name}")
    assert set(module.SERVES.functions) <= set(serves.FUNCTIONS)
    assert all(callable(getattr(module, function)) for function in module.SERVES.functions)
    assert set(module.SERVES.forms) <= set(serves.FORMS)
    assert set(module.SERVES.divergences or ()) <= {"none", *ops.DIVERGENCES}


def test_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "alro_fast.ops.backends.triton", None)  # import raises ImportError
    dispatch._resolve.cache_clear()
    hidden, weight, _ = make_head(3, 32, 101)
    with pytest.raises(AlroFastError, match=r"backend 'triton' cannot serve .* not installed"):
        ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]), backend="triton")
    dispatch._resolve.cache_clear()
