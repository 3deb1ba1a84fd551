"""Log-probs and divergences over the vocabulary, on every backend that can serve CPU tensors here, against the float64
reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from head_runs import HEADS, SHAPES, affordable, assert_agree, logprobs_of, make_head, run, wide

from alro_fast import ops
from alro_fast.errors import AlroFastError
from alro_fast.losses import reference
from alro_fast.ops import checks

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
    assert_agree(got, want)


def test_several_targets_per_row_some_ignored(backend):
    tensors = make_head(9, 32, 101, bias=True)
    targets = torch.randint(0, 101, (9, 5))
    targets[2] = -1
    targets[4, 1:3] = -1
    upstream = torch.randn(9, 5), torch.zeros(9)
    got = run(logprobs_of(ops, targets, backend=backend, ignore_index=-1), tensors, upstream)
    want = run(logprobs_of(reference, targets, ignore_index=-1), wide(tensors), upstream)
    assert_agree(got, want)
    assert (got[0][0][targets == -1] == 0).all()


def test_ignored_rows_get_no_gradient(backend):
    tensors = make_head(100, 16, 61)
    targets = torch.full((100,), -100)
    targets[17] = 3  # 1 % supervised
    upstream = torch.randn(100), torch.zeros(100)
    got = run(logprobs_of(ops, targets, backend=backend), tensors, upstream)
    assert_agree(got, run(logprobs_of(reference, targets), wide(tensors), upstream))
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
    assert_agree((outputs, grads), want)


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
        assert_agree(got, run(logprobs_of(reference, targets), wide(tensors), (torch.ones(5), torch.zeros(5))))


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
    assert_agree(mixed, rounded, grads=5e-3)
    with pytest.raises(AlroFastError, match=r"hidden has dtype torch.bfloat16 and weight torch.float32"):
        ops.linear_logprobs(hidden.bfloat16(), weight, targets, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_in_the_dtype_of_the_weight_and_no_tf32(backend, dtype, monkeypatch, caplog):
    """What the backend sees, forward and backward, under autocast and with TF32 allowed; float32 is said once."""
    seen = []
    module = ops.resolve_backend(backend, torch.device("cpu"), dtype)
    for name in ("vocab_pass", "weight_grad"):
        plain = getattr(module, name)

        def spied(hidden, weight, *rest, plain=plain, **options):
            precision = torch.backends.cuda.matmul.fp32_precision
            seen.append((hidden.dtype, weight.dtype, torch.is_autocast_enabled("cpu"), precision))
            return plain(hidden, weight, *rest, **options)

        monkeypatch.setattr(module, name, spied)
    hidden, weight, _ = make_head(5, 32, 101)
    hidden, weight = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))
    checks._say_once_wide.cache_clear()
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        with caplog.at_level("WARNING"):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = ops.linear_logprobs(hidden, weight, torch.arange(5), backend=backend)[0].sum()
                loss.backward()
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
    assert set(seen) == {(dtype, dtype, False, "ieee")}
    assert len(seen) == 4
    assert caplog.text.count("the LM head is float32") == (dtype == torch.float32)


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
    assert_agree(got, want)


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
    assert_agree(got, run(plain, wide((hidden, weight)), (upstream,)))
    assert got[0][0][1] == 0


def test_pads_of_pairs_are_spread_over_rows() -> None:
    """A pad adds zeros; all to one row, an accelerator would take them one after the other."""
    from alro_fast.ops.head import _pads_spread

    index = torch.tensor([-1, 2, -1, -1, 0, -1])
    assert _pads_spread(index, 4).tolist() == [0, 2, 2, 3, 0, 1]
