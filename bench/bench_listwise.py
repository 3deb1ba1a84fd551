"""Listwise terms and their gradient beside the reference: `pytest bench/bench_listwise.py --benchmark-json lists.json`.

Soft lambda loss and permutation KL of L lists of M candidates with their twins, forward and backward from the logits
[L, M, M] of identifier tokens. Errors are of d logits against the reference in float64.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from alro_fast import ops
from alro_fast.losses import reference
from alro_fast.ops.backends import eager
from bench.common import CUDA, DEVICE, DRY, Absent, Contestant, compiled, interleave, record

SIZES = [(64, 10), (64, 25), (512, 10), (64, 100)] if CUDA else [(32, 10), (32, 25)]
ROUNDS, SECONDS = (50, 3.0) if CUDA else (15, 10.0)
if DRY:
    SIZES = [(2, 4)]
OPTIONS = {"gamma": 1.0, "sigma": 1.0, "normalise": True, "divergence": "kl"}


def lists(count: int, size: int) -> dict[str, Tensor]:
    """`count` lists in the original order, then their twins."""
    generator = torch.Generator().manual_seed(0)
    ratings = torch.randint(1, 6, (count, size), generator=generator).float().repeat(2, 1)
    order = torch.sort(ratings, dim=1, descending=True, stable=True).indices
    twin = torch.cat([torch.full((count,), -1), torch.arange(count)])
    made = {
        "logits": 3 * torch.randn(2 * count, size, size, generator=generator),
        "ratings": ratings,
        "ranks": torch.argsort(order, dim=1, stable=True) + 1,
        "sizes": torch.full((2 * count,), size),
        "twin": twin,
    }
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def our_loss(backend: str, tensors: dict[str, Tensor]) -> Tensor:
    terms = ops.listwise(**tensors, **OPTIONS, backend=backend)
    return terms.soft_lambda.mean() + terms.permutation.sum()


def reference_loss(tensors: dict[str, Tensor]) -> Tensor:
    """By the definition in `alro_fast.losses.reference`, one list after the other."""
    scores, ratings = tensors["logits"].log_softmax(dim=2), tensors["ratings"]
    mask = torch.ones_like(ratings, dtype=torch.bool)
    loss, _ = reference.soft_lambda(scores, ratings, mask, ranks=tensors["ranks"], gamma=1.0, sigma=1.0)
    return loss.mean() + permutation_loss(scores)


def batched_loss(tensors: dict[str, Tensor]) -> Tensor:
    """All lists at once in plain PyTorch, differentiated by autograd."""
    scores, ratings = tensors["logits"].log_softmax(dim=2), tensors["ratings"]
    mask = torch.ones_like(ratings, dtype=torch.bool)
    rank = ops.soft_argmax_ranks(scores, mask, gamma=1.0)
    loss, _ = eager._pairwise_lambda(rank, ratings, tensors["ranks"], mask, 1.0)
    return loss.mean() + permutation_loss(scores)


def permutation_loss(scores: Tensor) -> Tensor:
    """KL of every original list to its twin, lists of one size."""
    original, permuted = scores.chunk(2)
    teacher = original.detach()[:, :-1]
    divergence = (teacher.exp() * (teacher - permuted[:, :-1])).sum(dim=2).mean(dim=1)
    return divergence.sum()


def contestants(tensors: dict[str, Tensor]) -> list[Contestant]:
    available = ops.available_backends(DEVICE, torch.float32)
    made = [
        Contestant("reference", functools.partial(_prepare, reference_loss, tensors)),
        Contestant("torch batched", functools.partial(_prepare, batched_loss, tensors)),
        Contestant("torch.compile", lambda: _prepare(compiled(batched_loss), tensors)),
    ]
    for backend in ops.BACKENDS:
        if backend not in available or (backend == "triton" and not (CUDA or DRY)):
            reason = "needs a GPU" if backend == "triton" else "serves the CPU only" if CUDA else "not built"
            made.append(Contestant(f"alro_fast {backend}", functools.partial(_absent, reason)))
        else:
            loss = functools.partial(our_loss, backend)
            made.append(Contestant(f"alro_fast {backend}", functools.partial(_prepare, loss, tensors)))
    return made


def _absent(reason: str):
    raise Absent(reason)


def _prepare(loss, tensors: dict[str, Tensor]):
    logits = tensors["logits"].clone().requires_grad_()

    def run() -> Tensor:
        logits.grad = None
        loss({**tensors, "logits": logits}).backward()
        return logits.grad

    return run


@functools.cache
def measured(count: int, size: int) -> tuple[dict, dict]:
    tensors = lists(count, size)
    outcomes = interleave(contestants(tensors), rounds=ROUNDS, seconds=SECONDS)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    wanted = _prepare(reference_loss, exact)()
    errors = {
        name: float((outcome.result.double() - wanted).abs().max() / wanted.abs().max())
        for name, outcome in outcomes.items()
        if not isinstance(outcome, str)
    }
    return outcomes, errors


NAMES = ["reference", "torch batched", "torch.compile", *(f"alro_fast {backend}" for backend in ops.BACKENDS)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("count", "size"), SIZES, ids=lambda value: str(value))
def test_listwise(benchmark, count: int, size: int, name: str) -> None:
    outcomes, errors = measured(count, size)
    outcome, base = outcomes[name], outcomes["reference"]
    benchmark.group = f"listwise-L{count}-M{size}"
    shares = {}
    if not isinstance(outcome, str) and not isinstance(base, str):
        shares = {"times_faster": base.median / outcome.median, "error": errors[name]}
    case = {"group": "listwise", "mode": "forward+backward", "lists": count, "candidates": size}
    record(benchmark, case, name, outcome, **shares)
