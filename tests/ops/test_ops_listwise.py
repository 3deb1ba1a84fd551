"""The listwise ops, on every backend that can serve CPU tensors here, against the float64 reference."""

from __future__ import annotations

import logging

import pytest
import torch
from head_runs import F64, assert_agree, listwise_case, run

from alro_fast import ops
from alro_fast.errors import AlroFastError
from alro_fast.losses import reference
from alro_fast.ops import dispatch


@pytest.mark.parametrize("form", ["ranking", "ratings"])
@pytest.mark.parametrize(
    ("normalise", "divergence", "detach", "mask_emitted"),
    [
        (True, "kl", True, False),
        (True, "ce", False, True),
        (True, "symmetric", False, False),
        (True, "symmetric", True, True),
        (False, "kl", False, False),
        (False, "none", True, False),
    ],
)
def test_listwise_values_and_gradients(backend, form, normalise, divergence, detach, mask_emitted):
    """Ragged lists, several twins of one list, a list of one, one without a twin, one that is empty."""
    lists, logits = listwise_case(form, [5, 5, 5, 1, 1, 7, 0, 2], [-1, 0, 0, -1, 3, -1, -1, -1])
    sizes = (lists.slot_rows >= 0).sum(1)
    values = None if lists.grades is None else lists.grades.values
    upstream = torch.randn(8), torch.randn(8)
    gamma, sigma = 1.3, 0.7

    def ours(logits):
        terms = ops.listwise(
            logits, lists.ratings, lists.ranks, sizes, lists.twin, values, gamma=gamma, sigma=sigma,
            normalise=normalise, divergence=divergence, detach=detach, mask_emitted=mask_emitted, backend=backend,
        )  # fmt: skip
        return terms.soft_lambda, terms.permutation, terms.expected

    def plain(logits):
        soft, permutation, expected = [], [], torch.zeros_like(lists.ratings, dtype=logits.dtype)
        for index, n in enumerate(sizes.tolist()):
            ratings, ranks, twin = lists.ratings[index, :n], lists.ranks[index, :n], int(lists.twin[index])
            if form == "ranking":
                z = logits[index, :n, :n]
                s = reference.soft_argmax(z.log_softmax(1) if normalise else z, gamma) if n else z.sum(0)
                badness, rows, z_p, z_q = s, n - 1, logits[twin, :n, :n], z
            else:
                s = logits[index, :n].softmax(1) @ values.to(logits.dtype)
                badness, rows, z_p, z_q = -s, n, logits[twin, :n], logits[index, :n]
            soft.append(reference.pairwise_lambda(badness, ratings, ranks, sigma) if n else logits.new_zeros(()))
            expected[index, :n] = s.detach()
            terms = [logits.new_zeros(())]
            if twin >= 0 and divergence != "none":
                for k in range(rows):
                    kept = ranks > k if mask_emitted and form == "ranking" else slice(None)
                    terms.append(reference.divergence(z_p[k, kept], z_q[k, kept], divergence, detach) / rows)
            permutation.append(sum(terms))
        return torch.stack(soft), torch.stack(permutation), expected

    got = run(ours, (logits,), upstream)
    want = run(plain, (logits.double(),), upstream)
    assert_agree(got, want)
    assert (got[0][2][lists.slot_rows < 0] == 0).all()


def test_listwise_of_128_candidates(backend):
    lists, logits = listwise_case("ranking", [128], [-1])
    mask = torch.ones(1, 128, dtype=torch.bool)

    def soft_lambda_of(module, **more):
        return lambda scores: module.soft_lambda(scores, lists.ratings, mask, gamma=2.0, sigma=1.0, **more)

    upstream = (torch.ones(1),)
    got = run(soft_lambda_of(ops, backend=backend), (logits,), upstream)
    assert_agree(got, run(soft_lambda_of(reference), (logits.double(),), upstream))


@pytest.mark.parametrize("form", ["ranking", "ratings"])
def test_lists_longer_than_the_kernel_takes(form, monkeypatch, caplog):
    """Left to eager by "auto", and refused by a backend asked for by name."""
    triton = pytest.importorskip("alro_fast.ops.backends.triton")
    lists, logits = listwise_case(form, [130], [-1])
    values = None if lists.grades is None else lists.grades.values
    arguments = (logits, lists.ratings, lists.ranks, torch.tensor([130]), lists.twin, values)
    want = ops.listwise(*arguments, backend="eager")
    refused = r"backend 'triton' does not serve lists of more than 128 candidates or grades: use 'auto' or 'eager'"
    with pytest.raises(AlroFastError, match=refused):
        ops.listwise(*arguments, backend="triton")
    monkeypatch.setattr(dispatch, "resolve_backend", lambda *_: triton)  # what "auto" is on CUDA
    dispatch._say_once_declined.cache_clear()
    with caplog.at_level(logging.INFO, logger="alro_fast.ops"):
        for _ in range(2):
            torch.testing.assert_close(ops.listwise(*arguments)[:3], want[:3])
    said = "backend eager serves lists of more than 128 candidates or grades, which triton does not"
    assert [record.message for record in caplog.records] == [said]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_lists_and_lists_without_candidates(backend, shape):
    scores = torch.randn(*shape, shape[1], requires_grad=True)
    ratings, mask = torch.ones(shape), torch.ones(shape, dtype=torch.bool)
    for module, more in ((ops, {"backend": backend}), (reference, {})):
        loss, expected = module.soft_lambda(scores, ratings, mask, gamma=1.0, sigma=1.0, **more)
        assert torch.equal(loss, torch.zeros(shape[0]))
        assert expected.shape == module.soft_argmax_ranks(scores, mask, gamma=1.0).shape == shape
        (grad,) = torch.autograd.grad(loss.sum(), scores)
        assert grad.shape == scores.shape


@pytest.mark.parametrize("ratings", [[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [float("nan")] * 4])
def test_lists_with_nothing_to_order(backend, ratings):
    scores = torch.randn(1, 4, 4, requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, expected = ops.soft_lambda(scores, torch.tensor([ratings]), mask, gamma=1.0, sigma=1.0, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert loss.item() == 0
    assert (grad == 0).all()
    assert expected.isfinite().all()


def test_soft_lambda_on_half_precision_scores(backend):
    scores, mask = torch.randn(2, 5, 5).bfloat16(), torch.ones(2, 5, dtype=torch.bool)
    ratings = torch.randint(0, 5, (2, 5)).float()
    loss, expected = ops.soft_lambda(scores, ratings, mask, gamma=1.0, sigma=1.0, backend=backend)
    want = reference.soft_lambda(scores.double(), ratings, mask, gamma=1.0, sigma=1.0)
    assert loss.dtype == expected.dtype == torch.float32
    assert_agree(((loss, expected), ()), (want, ()))


def test_soft_argmax_ranks_are_differentiable():
    scores, mask = torch.randn(2, 4, 4, dtype=F64), torch.tensor([[True] * 4, [True, True, True, False]])
    upstream = (torch.randn(2, 4),)
    ours = run(lambda s: ops.soft_argmax_ranks(s, mask, gamma=1.5), (scores,), upstream)
    assert_agree(
        ours, run(lambda s: reference.soft_argmax_ranks(s, mask, gamma=1.5), (scores,), upstream), values=1e-12
    )
    half = ops.soft_argmax_ranks(scores.bfloat16(), mask, gamma=1.5)
    assert half.dtype == torch.float32


def test_descending_ranks():
    ratings = torch.tensor([[2.0, 5.0, float("nan"), 5.0, 0.0], [1.0, 2.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    ranks = ops.descending_ranks(ratings, mask)
    assert ranks[0].tolist() == [3, 1, 5, 2, 4]
    assert ranks[1, :2].tolist() == [2, 1]
