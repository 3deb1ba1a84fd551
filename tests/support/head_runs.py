"""Heads and lists of random numbers, and functions run on them with their gradients: what the tests of `ops` share."""

from __future__ import annotations

import pytest
import torch
from list_tensors import random_list_tensors

F64 = torch.float64


SHAPES = [  # N, H, V
    (1, 32, 123),
    (7, 123, 1000),
    (128, 64, 123),
    (129, 32, 1000),
    (17, 32, 301),
    (1000, 32, 1000),
    (7, 896, 123),
    (2, 16, 50257),
]


HEADS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 3.0, "scale": 1.5},
}


def affordable(backend: str, n: int, h: int, v: int) -> None:
    if backend == "triton" and n * h * v > 2**18:
        pytest.skip("too large for the Triton interpreter")


def make_head(n, h, v, *, bias=False, dtype=torch.float32, peak=1.0):
    """hidden, weight and bias whose logits have a spread of a few nats."""
    hidden = torch.randn(n, h) * peak
    weight = torch.randn(v, h) * (2.0 / h**0.5)
    return hidden.to(dtype), weight.to(dtype), torch.randn(v).to(dtype) if bias else None


def run(function, tensors, upstream, *args, **kwargs):
    """Outputs of function(*tensors, ...) and the gradients of sum(outputs * upstream) in the tensors that are given."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*leaves, *args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((out * up.to(out.dtype)).sum() for out, up in zip(outputs, upstream))
    grads = torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])
    return [out.detach() for out in outputs], list(grads)


def logprobs_of(module, targets, **options):
    return lambda hidden, weight, bias=None: module.linear_logprobs(hidden, weight, targets, bias=bias, **options)


def wide(tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def assert_agree(actual, expected, *, values=1e-5, grads=1e-4):
    """Values to 1e-5, gradients to 1e-4 of the largest entry (contracts of this project)."""
    for got, want in zip(actual[0], expected[0]):
        torch.testing.assert_close(got.double(), want, atol=values, rtol=values)
    for got, want in zip(actual[1], expected[1]):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=grads * want.abs().max().item() + 1e-12)


def listwise_case(form: str, sizes: list[int], twin: list[int], seed: int = 0):
    lists = random_list_tensors(sizes, twin, rows=sum(sizes), vocab=200, form=form, seed=seed)
    logits = torch.randn(*lists.slot_rows.shape[:2], lists.slot_rows.shape[1] if form == "ranking" else 5)
    return lists, logits
