"""What the ops never do: tensors of the size of the logits, and products with the vocabulary that are not needed."""

from __future__ import annotations

import pytest
import torch
from head_runs import affordable, make_head
from torch.utils._python_dispatch import TorchDispatchMode

from alro_fast import ops
from alro_fast.losses import reference
from alro_fast.ops.head import _head, _head_backward

INSIDE = {"alro_fast::head": _head, "alro_fast::head_backward": _head_backward}


class Watch(TorchDispatchMode):
    """Shows `see` every operation with its result, looking inside this project's custom ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in INSIDE:
            with self:
                return INSIDE[name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.see(name, args, result)
        return result


class Spy(Watch):
    """The largest tensor any operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def see(self, name, args, result):
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, tensor.numel())

    def measure(self, function, *given) -> int:
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        with self:
            function()
        return self.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "h", "v"), [(300, 64, 5003), (2, 64, 5003), (300, 16, 123)])
def test_nothing_of_the_size_of_logits_or_a_frozen_head(backend, n, h, v, dtype):
    affordable(backend, n, h, v)
    hidden, weight, _ = make_head(2 * n, h, v, dtype=dtype)
    hidden.requires_grad_()
    targets = torch.randint(0, v, (2 * n,))

    def step():
        logprobs, _ = ops.linear_logprobs(hidden, weight, targets, softcap=5.0, backend=backend)
        kl = ops.linear_kl(hidden[:n], hidden[n:], weight, detach_p=False, backend=backend)
        (logprobs.sum() + kl.sum()).backward()

    largest = Spy().measure(step, hidden, weight)
    assert 0 < largest < 2 * n * v
    if v > 8 * n:  # else [2N, H], the gradient, is itself as large as the head
        assert largest < v * h


def test_the_spy_sees_full_logits():
    hidden, weight, _ = make_head(30, 64, 503)
    hidden.requires_grad_()
    targets = torch.randint(0, 503, (30,))
    full = Spy().measure(lambda: reference.linear_logprobs(hidden, weight, targets)[0].sum().backward(), hidden, weight)
    assert full >= 30 * 503


class Products(Watch):
    """Floating-point operations of matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def see(self, name, args, result):
        if name.removesuffix("_") in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            left = [tensor for tensor in args if isinstance(tensor, torch.Tensor)][-2]
            self.flops += 2 * result.numel() * left.shape[-1]

    @classmethod
    def of(cls, function) -> int:
        with cls() as counter:
            function()
        return counter.flops


def test_one_pass_forward_and_none_backward_on_every_backend(backend, monkeypatch):
    """Cross-entropy and KL in one call, frozen head: backward calls no function that reads the vocabulary."""
    n, h, v = 32, 16, 301
    hidden, weight, bias = make_head(n, h, v, bias=True)
    module, calls = ops.resolve_backend(backend, torch.device("cpu"), torch.float32), []
    for name in ("paired_vocab_pass", "paired_weight_grad"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _f=original, **k: calls.append(_n) or _f(*a, **k))
    first = torch.arange(n // 2)

    def loss(weight):
        stats = ops.head(
            hidden.requires_grad_(), weight, bias, softcap=5.0, targets=torch.randint(0, v, (n, 1)), first=first,
            second=first + n // 2, backend=backend,
        )  # fmt: skip
        return (stats.lse - stats.target_logits[:, 0]).sum() + stats.cross.sum()

    frozen = loss(weight)
    assert calls == ["paired_vocab_pass"]
    flops = Products.of(frozen.backward)
    assert calls == ["paired_vocab_pass"]
    assert flops < 0.01 * 2 * n * h * v  # nor multiplies with it itself
    loss(weight.clone().requires_grad_()).backward()
    assert calls == ["paired_vocab_pass", "paired_vocab_pass", "paired_weight_grad"]


def test_two_products_with_the_vocabulary_forward_none_backward():
    n, h, v = 64, 32, 4001
    hidden, weight, _ = make_head(n, h, v)
    targets = torch.randint(0, v, (n,))
    unit = 2 * n * h * v
    leaf = hidden.clone().requires_grad_()
    outputs = []
    forward = Products.of(lambda: outputs.append(ops.linear_logprobs(leaf, weight, targets, backend="eager")[0].sum()))
    backward = Products.of(outputs[0].backward)
    without = Products.of(lambda: ops.linear_logprobs(hidden, weight, targets, backend="eager"))
    assert 2 * unit <= forward < 2.01 * unit
    assert without < 1.01 * unit
    assert backward < 0.01 * unit
    trainable = weight.clone().requires_grad_()
    ops_total = Products.of(lambda: ops.linear_logprobs(leaf, trainable, targets, backend="eager")[0].sum().backward())
    assert 4 * unit <= ops_total < 4.02 * unit  # logits and U, then logits again and dW
