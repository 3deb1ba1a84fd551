"""The compiled kernels on a CUDA device: float64 parity, sizes beyond 2^31, memory, no synchronisation."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import head
from list_tensors import random_list_tensors

from alro_fast import ops
from alro_fast.losses import alro as losses
from alro_fast.losses import reference
from alro_fast.ops.backends import eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from alro_fast.kernels import listwise as listwise_kernel
    from alro_fast.ops.backends import triton as backend

HALF = torch.bfloat16
PAIRED = {"entropy": True, "want_expected": True, "want_spread": False, "mass_bound": 0.0}


@pytest.mark.parametrize("engine", ["tiled", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "size_h", "vocab"), [(1, 64, 123), (129, 123, 1000), (300, 896, 50257)])
def test_vocab_pass_equals_float64(rows: int, size_h: int, vocab: int, dtype: torch.dtype, engine: str) -> None:
    softcap = 10.0 if rows == 129 else None
    case = head(rows, size_h, vocab, dtype, bias=rows > 1, softcap=softcap, pairs=rows // 3, seed=rows)

    def passed():
        if case.first is None:
            return backend.vocab_pass(*case.arguments, want_expected=True, mass_bound=0.0, engine=engine)
        return backend.paired_vocab_pass(*case.arguments, case.first, case.second, engine=engine, **PAIRED)

    got = passed()
    assert torch.allclose(got.lse.double(), case.logits().logsumexp(1), atol=1e-5, rtol=1e-5)
    assert ((got.expected - case.expected()).abs() <= case.expected_error(dtype)).all()
    if case.first is not None:
        size = float(case.logits().abs().max())
        assert torch.allclose(got.cross.double(), case.cross(True), atol=2e-5 * size)
    assert all(one is two is None or torch.equal(one, two) for one, two in zip(got, passed()))


@pytest.mark.parametrize("mass_bound", [0.0, 1e-3])
def test_gradients_through_the_op_equal_float64(mass_bound: float) -> None:
    case = head(200, 256, 32000, torch.float32, spread=4.0)
    targets = torch.randint(0, 32000, (200,), device="cuda")
    targets[::5] = -100
    upstream = torch.randn(200, device="cuda")
    grads = []
    for function, dtype in ((ops.linear_logprobs, torch.float32), (reference.linear_logprobs, torch.float64)):
        hidden, weight = (tensor.to(dtype).requires_grad_() for tensor in (case.hidden.detach(), case.weight.detach()))
        logprobs, _ = function(hidden, weight, targets, mass_bound=mass_bound)
        (logprobs * upstream).sum().backward()
        grads.append((hidden.grad.double(), weight.grad.double()))
    (d_hidden, d_weight), (exact_hidden, exact_weight) = grads
    bound = mass_bound * float(case.weight.norm(dim=1).max() * upstream.abs().max())
    assert (d_hidden - exact_hidden).abs().max() <= 1e-4 * exact_hidden.abs().max() + bound
    assert (d_weight - exact_weight).abs().max() <= 1e-4 * exact_weight.abs().max()


def test_half_precision_error_is_at_most_twice_that_of_eager() -> None:
    case = head(256, 896, 50257, HALF, spread=4.0)
    targets = torch.randint(0, 50257, (256,), device="cuda")
    exact = case.hidden.double().requires_grad_()
    reference.linear_logprobs(exact, case.weight.double(), targets)[0].sum().backward()

    plain = case.hidden.clone().requires_grad_()
    torch.nn.functional.linear(plain, case.weight).float().log_softmax(1).gather(1, targets[:, None]).sum().backward()
    ours = case.hidden.clone().requires_grad_()
    ops.linear_logprobs(ours, case.weight, targets, backend="triton")[0].sum().backward()
    error = [(grad.double() - exact.grad).norm() for grad in (ours.grad, plain.grad)]
    assert error[0] <= 2 * error[1]


@pytest.mark.parametrize("size", [10, 128])
def test_listwise_equals_float64(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    ratings = torch.randint(0, 6, (8, size), generator=generator).float()
    ranks = torch.stack([torch.randperm(size, generator=generator) + 1 for _ in range(8)])
    logits = 3 * torch.randn(8, size, size, generator=generator)
    rest = (ranks, torch.full((8,), size), torch.tensor([-1, 0, -1, 2, -1, 4, -1, 6]), None)
    options = {
        "gamma": 1.0, "sigma": 1.0, "normalise": True, "divergence": "symmetric", "detach": False,
        "mask_emitted": False,
    }  # fmt: skip
    got = listwise_kernel.listwise(
        *(None if tensor is None else tensor.cuda() for tensor in (logits, ratings, *rest)), **options
    )
    wanted = eager.listwise(logits.double(), ratings.double(), *rest, **options)
    for mine, exact in zip(got, wanted):
        assert torch.allclose(mine.cpu().double(), exact, atol=1e-5 * max(float(exact.abs().max()), 1.0), rtol=0)


@pytest.mark.parametrize("engine", ["tiled", "fused"])
def test_more_than_two_to_the_31_logits(engine: str) -> None:
    rows, vocab = 17_000, 130_000
    assert rows * vocab > 2**31
    case = head(rows, 64, vocab, HALF)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = backend.vocab_pass(*case.arguments, want_expected=True, mass_bound=1e-3, engine=engine)
    assert torch.cuda.max_memory_allocated() - held < 0.05 * 4 * rows * vocab
    for part in (slice(0, 8), slice(rows - 8, rows)):
        z = case.hidden[part].double() @ case.weight.double().T
        assert torch.allclose(got.lse[part].double(), z.logsumexp(1), atol=1e-5, rtol=1e-5)
        exact = z.softmax(1) @ case.weight.double()
        assert torch.allclose(got.expected[part].double(), exact, atol=1e-2)


def test_a_weight_of_more_than_two_to_the_31_elements() -> None:
    size_h, vocab = 16_384, 140_000
    weight = torch.empty(vocab, size_h, dtype=HALF, device="cuda")
    for part in weight.split(10_000):
        part.normal_().mul_(2.0 / size_h**0.5)
    assert weight.numel() > 2**31
    hidden = torch.randn(4, size_h, dtype=HALF, device="cuda")
    stats = [
        backend.vocab_pass(hidden, weight, None, None, 1.0, want_expected=False, mass_bound=0.0, engine=engine).lse
        for engine in ("tiled", "fused")
    ]
    z = torch.cat([hidden.double() @ part.double().T for part in weight.split(10_000)], dim=1)
    for lse in stats:
        assert torch.allclose(lse.double(), z.logsumexp(1), atol=1e-4)


def alro_case(psl_space: str) -> tuple[dict, dict]:
    """Arguments and options of alro_loss: 16 lists of 10 and their twins, answers of 12 tokens."""
    rows, vocab = 32 * 12, 4000
    lists = random_list_tensors([10] * 32, [-1] * 16 + list(range(16)), rows=rows, vocab=vocab)
    case = head(rows, 256, vocab)
    arguments = {
        "hidden": case.hidden,
        "weight": case.weight,
        "labels": torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(0)).cuda(),
        "lists": type(lists)(*(None if value is None else value.cuda() for value in lists)),
    }
    return arguments, {"alpha": 0.5, "beta": 0.5, "gamma": 1.0, "sigma": 1.0, "psl_space": psl_space}


@pytest.mark.parametrize("psl_space", ["candidates", "vocab"])
def test_alro_loss_and_gradient_equal_float64_without_synchronisation(psl_space: str) -> None:
    arguments, options = alro_case(psl_space)
    hidden = arguments.pop("hidden")
    exact = hidden.double().requires_grad_()
    weight = arguments["weight"].double()
    wanted = reference.alro_loss(exact, **{**arguments, "weight": weight}, **options)
    wanted.loss.backward()
    for mode in ("default", "error"):  # the first round compiles
        mine = hidden.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            got = losses.alro_loss(mine, **arguments, **options)
            got.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(got.loss.double(), wanted.loss, rtol=1e-5)
    assert (mine.grad.double() - exact.grad).abs().max() <= 1e-4 * exact.grad.abs().max()


def joint_step(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    """Cross-entropy of both orders and KL between them, forward and backward."""
    half = len(hidden) // 2
    first = torch.arange(half, device="cuda")
    stats = ops.head(
        hidden, weight, targets=labels[:, None], first=first, second=first + half, detach_first=True, backend="triton"
    )
    divergence = stats.cross - stats.lse[:half].detach() + stats.lse[half:]
    ((stats.lse - stats.target_logits[:, 0]).mean() + divergence.mean()).backward()


def test_frozen_head_makes_neither_logits_nor_a_weight_gradient() -> None:
    case = head(4096, 896, 151_936, HALF)
    labels = torch.randint(0, 151_936, (4096,), device="cuda")
    hidden = case.hidden.requires_grad_()
    joint_step(hidden, case.weight, labels)
    hidden.grad = None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    joint_step(hidden, case.weight, labels)
    assert torch.cuda.max_memory_allocated() - held < 0.08 * 4 * 4096 * 151_936


def test_no_synchronisation_in_forward_or_backward() -> None:
    case = head(512, 896, 50_257, HALF)
    labels = torch.randint(0, 50_257, (512,), device="cuda")
    hidden = case.hidden.requires_grad_()
    joint_step(hidden, case.weight, labels)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        joint_step(hidden, case.weight, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ops_compile_without_graph_breaks() -> None:
    case = head(64, 128, 1000, HALF)
    targets = torch.randint(0, 1000, (64,), device="cuda")

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return -ops.linear_logprobs(hidden, case.weight, targets)[0].mean()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        hidden = case.hidden.clone().requires_grad_()
        function(hidden).backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)
