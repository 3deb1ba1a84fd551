"""The ops, on every backend that can serve CPU tensors here, against the float64 reference."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import sys
import types

import pytest
import torch
from random_lists import random_lists
from torch.utils._python_dispatch import TorchDispatchMode

from alro_fast import ops
from alro_fast.errors import AlroFastError
from alro_fast.losses import reference
from alro_fast.ops import dispatch
from alro_fast.ops.backends import eager, serves
from alro_fast.ops.head import _head, _head_backward
from alro_fast.ops.listwise import _listwise

F64 = torch.float64
INF, NAN = float("inf"), float("nan")
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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=ops.available_backends("cpu"))
def backend(request) -> str:
    return request.param


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


def assert_close(actual, expected, *, values=1e-5, grads=1e-4):
    """Values to 1e-5, gradients to 1e-4 of the largest entry (contracts of this project)."""
    for got, want in zip(actual[0], expected[0]):
        torch.testing.assert_close(got.double(), want, atol=values, rtol=values)
    for got, want in zip(actual[1], expected[1]):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=grads * want.abs().max().item() + 1e-12)


# ---- log-probs


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("n", "h", "v"), SHAPES)
def test_logprobs_values_and_gradients(backend, n, h, v, options):
    affordable(backend, n, h, v)
    tensors = make_head(n, h, v, bias="scale" in options)
    targets = torch.randint(0, v, (n,))
    targets[n // 2 :: 3] = -100
    upstream = torch.randn(n), torch.randn(n)  # a weight per token, and one on the log-sum-exp
    got = run(logprobs_of(ops, targets, backend=backend, **options), tensors, upstream)
    want = run(logprobs_of(reference, targets, **options), wide(tensors), upstream)
    assert got[0][0].dtype == got[0][1].dtype == torch.float32
    assert_close(got, want)


def test_several_targets_per_row_some_ignored(backend):
    tensors = make_head(9, 32, 101, bias=True)
    targets = torch.randint(0, 101, (9, 5))
    targets[2] = -1
    targets[4, 1:3] = -1
    upstream = torch.randn(9, 5), torch.zeros(9)
    got = run(logprobs_of(ops, targets, backend=backend, ignore_index=-1), tensors, upstream)
    want = run(logprobs_of(reference, targets, ignore_index=-1), wide(tensors), upstream)
    assert_close(got, want)
    assert (got[0][0][targets == -1] == 0).all()


def test_ignored_rows_get_no_gradient(backend):
    tensors = make_head(100, 16, 61)
    targets = torch.full((100,), -100)
    targets[17] = 3  # 1 % supervised
    upstream = torch.randn(100), torch.zeros(100)
    got = run(logprobs_of(ops, targets, backend=backend), tensors, upstream)
    assert_close(got, run(logprobs_of(reference, targets), wide(tensors), upstream))
    d_hidden = got[1][0]
    assert (d_hidden[targets == -100] == 0).all()
    assert (d_hidden[17] != 0).any()


def test_all_rows_ignored(backend):
    tensors = make_head(6, 32, 101)
    got = run(logprobs_of(ops, torch.full((6,), -100), backend=backend), tensors, (torch.ones(6), torch.zeros(6)))
    assert (got[0][0] == 0).all()
    assert all((grad == 0).all() for grad in got[1])
    assert got[0][1].isfinite().all()


def test_no_rows(backend):
    hidden, weight, _ = make_head(0, 32, 101)
    logprobs, lse = ops.linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), backend=backend)
    assert logprobs.shape == lse.shape == (0,)


@pytest.mark.parametrize("layout", ["strided hidden", "transposed weight", "int32 targets", "uint8 targets", "all"])
def test_layouts(backend, layout):
    hidden, weight, _ = make_head(14, 64, 201)
    targets = torch.randint(0, 200, (14,))
    upstream = torch.randn(14), torch.randn(14)
    want = run(logprobs_of(reference, targets), wide((hidden, weight)), upstream)
    strided = torch.empty(14, 3, 64)
    strided[:, 1] = hidden
    if layout in ("strided hidden", "all"):
        hidden = strided[:, 1]
    if layout in ("transposed weight", "all"):
        weight = weight.T.contiguous().T
    if layout in ("int32 targets", "all"):
        targets = targets.int()
    if layout == "uint8 targets":
        targets = targets.to(torch.uint8)
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    assert leaves[0].stride() == hidden.stride()
    assert leaves[1].stride() == weight.stride()
    outputs = ops.linear_logprobs(*leaves, targets, backend=backend)
    grads = torch.autograd.grad(sum((out * up).sum() for out, up in zip(outputs, upstream)), leaves)
    assert_close((outputs, grads), want)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_every_combination_of_requires_grad(backend, needs):
    tensors = make_head(7, 32, 101, bias=True)
    targets = torch.randint(0, 101, (7,))
    upstream = torch.randn(7), torch.randn(7)
    _, want = run(logprobs_of(reference, targets, softcap=5.0), wide(tensors), upstream)
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs)]
    outputs = logprobs_of(ops, targets, softcap=5.0, backend=backend)(*leaves)
    assert all(out.requires_grad == any(needs) for out in outputs)
    if not any(needs):
        return
    sum((out * up).sum() for out, up in zip(outputs, upstream)).backward()
    for leaf, need, grad in zip(leaves, needs, want):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad.double(), grad, rtol=0, atol=1e-4 * grad.abs().max().item())


def test_no_grad_and_inference_mode(backend):
    hidden, weight, _ = make_head(7, 32, 101)
    hidden.requires_grad_()
    targets = torch.randint(0, 101, (7,))
    want = ops.linear_logprobs(hidden, weight, targets, backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = ops.linear_logprobs(hidden, weight, targets, backend=backend)
        assert not got[0].requires_grad
        torch.testing.assert_close(got, tuple(out.detach() for out in want), rtol=1e-6, atol=1e-6)


def test_logits_of_any_size_stay_finite(backend):
    hidden, weight, _ = make_head(5, 32, 101)
    targets = torch.randint(0, 101, (5,))
    for factor in (0.0, 1e-6, 1e4):
        tensors = hidden * factor, weight
        got = run(logprobs_of(ops, targets, backend=backend), tensors, (torch.ones(5), torch.zeros(5)))
        assert_close(got, run(logprobs_of(reference, targets), wide(tensors), (torch.ones(5), torch.zeros(5))))


def test_bitwise_equal_on_rerun(backend):
    tensors = make_head(17, 64, 201, bias=True)
    targets = torch.randint(0, 20, (17, 4))  # repeated tokens share rows of dW
    upstream = torch.randn(17, 4), torch.randn(17)
    first, second = (run(logprobs_of(ops, targets, backend=backend), tensors, upstream) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_twice_that_of_eager(backend, dtype):
    """Eager: half-precision product, float32 softmax over the full logits, half-precision gradients."""
    if backend not in ops.available_backends("cpu", dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    tensors = make_head(33, 64, 397, dtype=dtype, peak=2.0)
    targets = torch.randint(0, 397, (33,))
    upstream = torch.randn(33) / 33, torch.zeros(33)

    def eager(hidden, weight, bias=None):
        z = torch.nn.functional.linear(hidden, weight).float()
        lse = z.logsumexp(1)
        return z.gather(1, targets[:, None])[:, 0] - lse, lse

    got = run(logprobs_of(ops, targets, backend=backend), tensors, upstream)
    plain = run(eager, tensors, upstream)
    want = run(logprobs_of(reference, targets), wide(tensors), upstream)
    for ours, theirs, exact in zip([*got[0], *got[1]], [*plain[0], *plain[1]], [*want[0], *want[1]]):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


def test_mass_bound_is_honoured(backend):
    """|d(gradient)| <= bound * max|w| per row, and 0 means exact."""
    hidden, weight, _ = make_head(9, 32, 803, peak=4.0)
    targets = torch.randint(0, 803, (9,))
    upstream = torch.ones(9), torch.zeros(9)
    _, (want, _) = run(logprobs_of(reference, targets), wide((hidden, weight)), upstream)
    for bound in (0.0, 1e-3, 0.2):
        leaf = hidden.clone().requires_grad_()
        out, _ = ops.linear_logprobs(leaf, weight, targets, mass_bound=bound, backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert (grad - want).norm(dim=1).max() <= bound * weight.norm(dim=1).max() + 1e-4


def test_autocast_computes_in_the_head_dtype(backend):
    hidden, weight, bias = make_head(7, 32, 101, bias=True)
    targets = torch.randint(0, 101, (7,))
    upstream = torch.randn(7), torch.randn(7)
    want = run(logprobs_of(ops, targets, backend=backend), (hidden, weight, bias), upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(logprobs_of(ops, targets, backend=backend), (hidden, weight, bias), upstream)
        mixed = run(logprobs_of(ops, targets, backend=backend), (hidden.bfloat16(), weight, bias), upstream)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]]):
        assert torch.equal(a, b)
    assert mixed[1][0].dtype == torch.bfloat16  # hidden as autocast left it; its gradient alike
    rounded = run(logprobs_of(reference, targets), wide((hidden.bfloat16(), weight, bias)), upstream)
    assert_close(mixed, rounded, grads=5e-3)
    with pytest.raises(AlroFastError, match=r"hidden has dtype torch.bfloat16 and weight torch.float32"):
        ops.linear_logprobs(hidden.bfloat16(), weight, targets, backend=backend)


def test_double_backward_is_refused(backend):
    hidden, weight, _ = make_head(3, 32, 101)
    hidden.requires_grad_()
    loss = ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]), backend=backend)[0].sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(AlroFastError, match="double backward"):
        grad.sum().backward()
    scores = torch.randn(1, 3, 3, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = ops.soft_lambda(scores, torch.tensor([[1.0, 2.0, 3.0]]), mask, gamma=1.0, sigma=1.0, backend=backend)
    weight = torch.ones(1, requires_grad=True)
    (grad,) = torch.autograd.grad((loss * weight).sum(), scores, create_graph=True)
    with pytest.raises(AlroFastError, match="double backward"):
        grad.sum().backward()


# ---- KL


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("relabel", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("n", "h", "v"), [(1, 32, 123), (11, 32, 301), (33, 64, 501)])
def test_kl_values_and_gradients(backend, n, h, v, options, relabel, detach):
    affordable(backend, n, h, v)
    hidden, weight, bias = make_head(2 * n, h, v, bias="scale" in options)
    pairs = None
    if relabel:
        ids = torch.stack([torch.randperm(v)[:6] for _ in range(n)])
        pairs = ids, ids[:, torch.randperm(6)]
        pairs[0][0, 4:], pairs[1][0, :] = -1, torch.cat([ids[0, :4].flip(0), torch.tensor([-1, -1])])
    tensors = hidden[:n], hidden[n:], weight, bias
    upstream = (torch.randn(n),)

    def kl_of(module, **more):
        def kl(p, q, weight, bias=None):
            return module.linear_kl(p, q, weight, bias=bias, relabel=pairs, detach_p=detach, **options, **more)

        return kl

    if detach:  # no gradient reaches hidden_p at all
        leaf = hidden[:n].clone().requires_grad_()
        (grad,) = torch.autograd.grad(kl_of(ops, backend=backend)(leaf, *tensors[1:]).sum(), leaf, allow_unused=True)
        assert grad is None or (grad == 0).all()
        got, want = (
            run(lambda q, w, b=None, kl=kl, p=p: kl(p, q, w, b), rest, upstream)
            for kl, p, rest in (
                (kl_of(ops, backend=backend), tensors[0], tensors[1:]),
                (kl_of(reference), tensors[0].double(), wide(tensors[1:])),
            )
        )
    else:
        got = run(kl_of(ops, backend=backend), tensors, upstream)
        want = run(kl_of(reference), wide(tensors), upstream)
    assert_close(got, want)


def test_kl_of_equal_rows_is_zero(backend):
    hidden, weight, _ = make_head(9, 32, 301)
    kl = ops.linear_kl(hidden, hidden.clone(), weight, backend=backend)
    assert kl.abs().max() <= 1e-6
    assert (ops.linear_kl(hidden, hidden.flip(0), weight, backend=backend) >= -1e-6).all()


def test_cross_entropy_pairs_share_rows_and_skip_pads(backend):
    """`head` with E_a[-z_b], one row in two pairs, a pad in between, gradients stopped per pair."""
    hidden, weight, _ = make_head(5, 32, 101)
    first, second = torch.tensor([0, -1, 0, 3]), torch.tensor([1, -1, 2, 0])
    stop_first, stop_second = torch.tensor([True, True, False, False]), torch.tensor([False, False, False, True])
    upstream = torch.randn(4)

    def ours(hidden, weight):
        return ops.head(
            hidden, weight, first=first, second=second, entropy=False, softcap=4.0,
            detach_first=stop_first, detach_second=stop_second, backend=backend,
        ).cross  # fmt: skip

    def plain(hidden, weight):
        z = reference.head_logits(hidden, weight, softcap=4.0)
        terms = []
        for a, b, stop_a, stop_b in zip(first, second, stop_first, stop_second):
            z_a, z_b = z[a].detach() if stop_a else z[a], z[b].detach() if stop_b else z[b]
            terms.append(z.new_zeros(()) if a < 0 else -(z_a.softmax(0) * z_b).sum())
        return torch.stack(terms)

    got = run(ours, (hidden, weight), (upstream,))
    assert_close(got, run(plain, wide((hidden, weight)), (upstream,)))
    assert got[0][0][1] == 0


# ---- listwise


def listwise_case(form: str, sizes: list[int], twin: list[int], seed: int = 0):
    lists = random_lists(sizes, twin, rows=sum(sizes), vocab=200, form=form, seed=seed)
    logits = torch.randn(*lists.slot_rows.shape[:2], lists.slot_rows.shape[1] if form == "ranking" else 5)
    return lists, logits


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
    assert_close(got, want)
    assert (got[0][2][lists.slot_rows < 0] == 0).all()


def test_listwise_of_128_candidates(backend):
    lists, logits = listwise_case("ranking", [128], [-1])
    mask = torch.ones(1, 128, dtype=torch.bool)

    def soft_lambda_of(module, **more):
        return lambda scores: module.soft_lambda(scores, lists.ratings, mask, gamma=2.0, sigma=1.0, **more)

    upstream = (torch.ones(1),)
    got = run(soft_lambda_of(ops, backend=backend), (logits,), upstream)
    assert_close(got, run(soft_lambda_of(reference), (logits.double(),), upstream))


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
    assert_close(((loss, expected), ()), (want, ()))


def test_soft_argmax_ranks_are_differentiable():
    scores, mask = torch.randn(2, 4, 4, dtype=F64), torch.tensor([[True] * 4, [True, True, True, False]])
    upstream = (torch.randn(2, 4),)
    ours = run(lambda s: ops.soft_argmax_ranks(s, mask, gamma=1.5), (scores,), upstream)
    assert_close(
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


# ---- float64, compile, custom op rules


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_gradcheck_in_float64(options):
    hidden, weight, bias = (t.double().requires_grad_() for t in make_head(4, 5, 23, bias=True))
    targets = torch.tensor([0, 22, -100, 7])
    assert torch.autograd.gradcheck(logprobs_of(ops, targets, **options), (hidden, weight, bias))
    ids = torch.tensor([[0, 5, 9], [22, 4, 1]])

    def kl(hidden, weight, bias):
        pairs = (ids, ids[:, [1, 2, 0]])
        return ops.linear_kl(hidden[:2], hidden[2:], weight, bias=bias, relabel=pairs, detach_p=False, **options)

    assert torch.autograd.gradcheck(kl, (hidden, weight, bias))


def test_compiles_without_a_graph_break(backend):
    hidden, weight, bias = make_head(7, 32, 101, bias=True)
    targets = torch.tensor([1, 2, -100, 4, 5, 6, 100])
    scores, mask = torch.randn(2, 4, 4), torch.ones(2, 4, dtype=torch.bool)
    ratings = torch.randint(0, 5, (2, 4)).float()
    upstream = torch.randn(7), torch.randn(7), torch.randn(2), torch.randn(2, 4)

    def everything(hidden, weight, bias, scores):
        logprobs, lse = ops.linear_logprobs(hidden, weight, targets, bias=bias, softcap=5.0, backend=backend)
        kl = ops.linear_kl(hidden[:2], hidden[2:4], weight, detach_p=False, backend=backend)
        loss, _ = ops.soft_lambda(scores, ratings, mask, gamma=1.0, sigma=1.0, backend=backend)
        return logprobs, lse, kl + loss, ops.soft_argmax_ranks(scores, mask, gamma=1.0)

    tensors = hidden, weight, bias, scores
    want = run(everything, tensors, upstream)
    got = run(torch.compile(everything, fullgraph=True, backend="aot_eager"), tensors, upstream)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_custom_ops_obey_the_rules():
    """Schema, fake shapes and autograd registration, as torch itself checks them."""
    hidden, weight, bias = (t.requires_grad_() for t in make_head(4, 8, 23, bias=True))
    empty = torch.zeros(0, dtype=torch.long)
    rows, ids = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[3, 4, 5], [6, 7, -1]])
    first, second = torch.tensor([0, -1]), torch.tensor([2, -1])
    flags = torch.tensor([False, True])
    for arguments in (
        (hidden, weight, bias, torch.tensor([[1], [2], [-1], [22]]), rows, ids, first, second, flags, flags,
         4.0, 0.5, True, True, True, 0.0, "eager"),
        (hidden, weight, None, empty.view(0, 0), empty.view(0, 0), empty.view(0, 0), empty, empty, empty.bool(),
         empty.bool(), None, 1.0, False, True, False, 0.0, "eager"),
    ):  # fmt: skip
        torch.library.opcheck(_head, arguments)
    lists, logits = listwise_case("ranking", [3, 3], [-1, 0])
    sizes = torch.tensor([3, 3])
    arguments = (logits.requires_grad_(), lists.ratings, lists.ranks, sizes, lists.twin, None, 1.0, 1.0, True, "kl")
    torch.library.opcheck(_listwise, (*arguments, False, False, "eager"))


# ---- memory and work


INSIDE = {"alro_fast::head": _head, "alro_fast::head_backward": _head_backward}


class Spy(TorchDispatchMode):
    """The largest tensor any operation makes, looking inside this project's custom ops."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in INSIDE:
            with self:
                return INSIDE[name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, tensor.numel())
        return result

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


class Products(TorchDispatchMode):
    """Floating-point operations of matrix products, looking inside this project's custom ops."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in INSIDE:
            with self:
                return INSIDE[name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if name.removesuffix("_") in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            left = [tensor for tensor in args if isinstance(tensor, torch.Tensor)][-2]
            self.flops += 2 * result.numel() * left.shape[-1]
        return result

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


# ---- dispatch


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
    with caplog.at_level(logging.INFO, logger="alro_fast.ops"):
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


# ---- bad input


def bad(**change):
    hidden, weight, bias = make_head(4, 8, 23, bias=True)
    arguments = {"hidden": hidden, "weight": weight, "targets": torch.tensor([0, 1, -100, 22]), "bias": bias, **change}
    return ops.linear_logprobs(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 23, 1, 1])}, r"targets holds 23 at \(1,\); expected values below 23 or ignored"),
        ({"targets": torch.tensor([0, 1, -1, 1])}, r"targets holds -1 at \(2,\)"),
        ({"targets": torch.tensor([0, 1, 2])}, r"targets has shape \(3,\); expected \[N\] or \[N, C\] with N = 4"),
        ({"targets": torch.zeros(4)}, "targets has dtype torch.float32; expected an integer dtype"),
        ({"targets": torch.zeros(4, dtype=torch.long, device="meta")}, "targets is on meta and hidden on cpu"),
        ({"hidden": torch.randn(4, 9)}, "hidden has 9 columns and weight 8; expected one hidden size H"),
        ({"hidden": torch.randn(4, 2, 8)}, "hidden has 3 dimensions; expected 2"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.long)}, "hidden has dtype torch.int64"),
        ({"hidden": torch.randn(4, 8).bfloat16()}, "hidden has dtype torch.bfloat16 and weight torch.float32"),
        ({"weight": torch.randn(23, 8, device="meta")}, "weight is on meta and hidden on cpu"),
        ({"weight": torch.randn(8)}, "weight has 1 dimensions; expected 2"),
        ({"bias": torch.randn(22)}, "bias has 22 entries; expected one per row of weight, 23"),
        ({"bias": torch.randn(23).double()}, "bias has dtype torch.float64 and weight torch.float32"),
        ({"weight": torch.randn(0, 8), "bias": None}, r"weight has shape \(0, 8\); expected at least one token"),
        ({"hidden": torch.randn(4, 0), "weight": torch.randn(23, 0)}, r"weight has shape \(23, 0\)"),
        *(({"softcap": x}, f"softcap is {x}; expected a positive finite") for x in (0.0, -1.0, INF, NAN)),
        *(({"scale": x}, f"scale is {x}; expected a finite number other than 0") for x in (0.0, -INF, INF, NAN)),
        *(({"mass_bound": x}, f"mass_bound is {x}; expected a number of at least 0") for x in (-0.1, 1.0, INF, NAN)),
        ({"backend": "cuda"}, "backend is 'cuda'; expected 'auto' or one of triton, cpp, eager"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(AlroFastError, match=message):
        bad(**change)
    bad()


@pytest.mark.parametrize("name", ["gamma", "sigma"])
@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
def test_sharpness_and_slope_are_positive(name, value):
    scores, mask = torch.randn(1, 3, 3), torch.ones(1, 3, dtype=torch.bool)
    numbers = {"gamma": 1.0, "sigma": 1.0, name: value}
    with pytest.raises(AlroFastError, match=f"{name} is {value}; expected a positive finite number"):
        ops.soft_lambda(scores, torch.ones(1, 3), mask, **numbers)
    if name == "gamma":
        with pytest.raises(AlroFastError, match=f"gamma is {value}"):
            ops.soft_argmax_ranks(scores, mask, gamma=value)


def test_an_infinite_bias_is_refused_where_distributions_are_compared(backend):
    hidden, weight, bias = make_head(4, 8, 23, bias=True)
    bias[5] = -INF
    logprobs, lse = ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]), bias=bias, backend=backend)
    want = reference.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]), bias=bias)
    torch.testing.assert_close((logprobs, lse), want)  # a token that cannot occur is no trouble here
    with pytest.raises(AlroFastError, match=r"bias holds -inf at \(5,\); expected values finite"):
        ops.linear_kl(hidden[:2], hidden[2:], weight, bias=bias, backend=backend)


@pytest.mark.parametrize(
    ("relabel", "message"),
    [
        (([[1, 2]], [[1, 2]]), r"relabel\[0\] has shape \(1, 2\)"),
        (([[1, 2], [3, 4]], [[2, 1], [3, 5]]), r"relabel pairs tokens \[3, 4\] with \[3, 5\] in row 1"),
        (([[1, 1], [3, 4]], [[1, 1], [3, 4]]), r"relabel pairs tokens \[1, 1\] with \[1, 1\] in row 0"),
        (([[1, 23], [3, 4]], [[1, 23], [3, 4]]), r"relabel\[0\] holds 23"),
        (([[1, -1], [3, 4]], [[-1, 1], [3, 4]]), r"relabel pairs tokens \[1, -1\] with \[-1, 1\]"),
    ],
)
def test_bad_relabelling(relabel, message):
    hidden, weight, _ = make_head(2, 8, 23)
    with pytest.raises(AlroFastError, match=message):
        ops.linear_kl(hidden, hidden, weight, relabel=tuple(map(torch.tensor, relabel)))


def test_kl_rows_must_match():
    hidden, weight, _ = make_head(3, 8, 23)
    with pytest.raises(AlroFastError, match=r"hidden_q has shape \(2, 8\); expected that of hidden_p, \(3, 8\)"):
        ops.linear_kl(hidden, hidden[:2], weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(2, 3, 4)}, r"scores has shape \(2, 3, 4\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\)"),
        ({"mask": torch.tensor([[True] * 3, [True, False, True]])}, "mask has a candidate after a pad"),
        ({"ratings": torch.zeros(2, 4)}, r"ratings has shape \(2, 4\)"),
        ({"ratings": torch.zeros(2, 3, device="meta")}, "ratings is on meta and scores on cpu"),
        ({"ranks": torch.tensor([1, 2, 3])}, r"ranks has shape \(3,\); expected that of mask, \(2, 3\)"),
        ({"ranks": torch.ones(2, 2, dtype=torch.long)}, r"ranks has shape \(2, 2\)"),
        ({"ranks": torch.tensor([[1.0, 2.0, 3.0]] * 2)}, "ranks has dtype torch.float32; expected an integer dtype"),
        ({"ratings": torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0]])}, r"ratings holds -2.0 at \(1, 1\)"),
        ({"ranks": torch.tensor([[1, 2, 3], [1, 1, 3]])}, r"ranks of list 1 are \[1, 1, 3\]; expected a permutation"),
    ],
)
def test_bad_lists_name_the_argument(change, message):
    arguments = {
        "scores": torch.randn(2, 3, 3),
        "ratings": torch.ones(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        **change,
    }
    with pytest.raises(AlroFastError, match=message):
        ops.soft_lambda(**arguments, gamma=1.0, sigma=1.0)
