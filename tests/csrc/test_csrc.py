"""The C++ kernels under every instruction set of this machine, beside the eager backend in float64; and what is theirs
alone: dropped columns, threads, forks, refusals. The shared matrix of shapes and options is in tests/ops."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alro_fast import ops
from alro_fast.ops.backends import cpp, eager

_cpp = pytest.importorskip("alro_fast._cpp", reason="this install has no C++ kernels")
WIDEST = _cpp.instruction_set()
SETS = [name for name in ("generic", "avx2", "avx512", "avx512_bf16") if _cpp.select_instruction_set(name)]
_cpp.select_instruction_set(WIDEST)


@pytest.fixture(params=SETS)
def instruction_set(request):
    assert _cpp.select_instruction_set(request.param)
    yield request.param
    _cpp.select_instruction_set(WIDEST)


@pytest.fixture
def threads():
    """Sets torch's number of threads, which is that of the kernels."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def close(got: Tensor | None, wanted: Tensor | None, tolerance: float) -> None:
    """Largest error within `tolerance` of the largest wanted value (of 1, where all are below)."""
    if wanted is None or got is None:
        assert got is wanted
        return
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    if wanted.numel():
        error, size = (got.double() - wanted.double()).abs().max(), wanted.abs().max().clamp(min=1.0)
        assert error <= tolerance * size, f"error {error:.2e} of {size:.2e}"


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def random_pairs(n: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows in several pairs, in both directions, with themselves, and -1 for no pair."""
    first, second = torch.randint(0, n, (count,)), torch.randint(0, n, (count,))
    first[0] = second[0] = -1
    if count > 3:
        first[1], second[1] = second[2], first[2]
        second[3] = first[3]
    return first, second


# ---------------------------------------------------------------------------------------------------------------------
# Parity.


@pytest.mark.parametrize("n, h, v", [(1, 5, 7), (7, 32, 123), (40, 300, 1000), (70, 123, 611)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_pass_and_head_gradient(instruction_set, n, h, v, dtype):
    torch.manual_seed(n)
    for with_bias, softcap, with_pairs, entropy in product((False, True), (None, 5.0), (False, True), (False, True)):
        if entropy and not with_pairs:
            continue
        hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(v, h) * 3 / h**0.5).to(dtype)
        bias = torch.randn(v).to(dtype) if with_bias else None
        first, second = random_pairs(n, n + 3) if with_pairs else (None, None)
        head, exact = (hidden, weight, bias, softcap, 0.7), (double(hidden), double(weight), double(bias), softcap, 0.7)
        options = {"want_expected": True, "mass_bound": 0.0}
        if with_pairs:
            options |= {"entropy": entropy, "want_spread": True}
            wanted = eager.paired_vocab_pass(*exact, first, second, **options)
            got = cpp.paired_vocab_pass(*head, first, second, **options)
        else:
            wanted, got = eager.vocab_pass(*exact, **options), cpp.vocab_pass(*head, **options)
        if instruction_set == "avx512_bf16" and dtype == torch.bfloat16 and not softcap:
            alone = torch.ones(n, dtype=torch.bool)  # rows whose probabilities are rounded to bfloat16
            if with_pairs:
                alone[torch.cat([first, second]).unique()[1:]] = False
            close(got.expected[alone], wanted.expected[alone], 2e-3)
            got.expected[alone] = wanted.expected[alone].float()
        for a, b in zip(got, wanted):
            close(a, b, 1e-5)

        flags = {"want_weight": True, "want_bias": True}
        if with_pairs:
            upstream = [torch.randn(n), torch.randn(len(first)), torch.randn(len(first))]
            of_pairs = (first, second, got.lse, got.cross, *upstream)
            d_got = cpp.paired_weight_grad(*head, *of_pairs, entropy=entropy, **flags)
            of_pairs = (first, second, wanted.lse, wanted.cross, *map(double, upstream))
            d_exact = eager.paired_weight_grad(*exact, *of_pairs, entropy=entropy, **flags)
        else:
            upstream = torch.randn(n)
            d_got = cpp.weight_grad(*head, got.lse, upstream, **flags)
            d_exact = eager.weight_grad(*exact, wanted.lse, double(upstream), **flags)
        for a, b in zip(d_got, d_exact):
            close(a, b, 2e-5)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("loss", ["flat", "sure", "pairs", "near_pairs", "undetached"])
def test_bfloat16_gradient_is_at_most_twice_as_far_off_as_a_rounded_one(instruction_set, loss, softcap):
    """Beside logits and their gradient in float32, the latter rounded to bfloat16 for the product with W."""
    torch.manual_seed(0)
    n, h, v = 48, 130, 1501
    hidden, weight = torch.randn(n, h), torch.randn(v, h) / h**0.5
    labels = torch.randint(0, v, (n,))
    if loss == "sure":
        hidden = 12 * weight[labels] + 0.1 * hidden
    elif loss == "near_pairs":
        hidden[n // 2 :] = hidden[: n // 2] + 0.05 * torch.randn(n // 2, h)
    hidden, weight = (2 * hidden).bfloat16(), weight.bfloat16()

    def of_logits(z: Tensor) -> Tensor:
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        log_p = z.log_softmax(1)
        if loss in ("flat", "sure"):
            return -log_p.gather(1, labels[:, None]).sum()
        p, q = log_p.chunk(2)
        p = p if loss == "undetached" else p.detach()
        return (p.exp() * (p - q)).sum()

    def gradient(dtype: torch.dtype) -> Tensor:
        z = (hidden.to(dtype) @ weight.to(dtype).T).requires_grad_()
        return torch.autograd.grad(of_logits(z), z)[0]

    leaf = hidden.clone().requires_grad_()
    options = {"softcap": softcap, "mass_bound": 0.0, "backend": "cpp"}
    if loss in ("flat", "sure"):
        value = -ops.linear_logprobs(leaf, weight, labels, **options)[0].sum()
    else:
        value = ops.linear_kl(*leaf.chunk(2), weight, detach_p=loss != "undetached", **options).sum()
    value.backward()
    exact = gradient(torch.float64) @ weight.double()
    rounded = gradient(torch.float32).bfloat16() @ weight
    assert (leaf.grad.double() - exact).norm() <= 2 * (rounded.double() - exact).norm()


@pytest.mark.parametrize("lists, m", [(1, 1), (33, 10), (20, 25), (3, 130)])
@pytest.mark.parametrize("form", ["ranking", "ratings"])
def test_listwise(instruction_set, lists, m, form):
    torch.manual_seed(m)
    for normalise, divergence, detach, emitted in product(
        (False, True), ("none", "kl", "ce", "symmetric"), (False, True), (False, True)
    ):
        if form == "ratings" and (normalise or emitted):
            continue
        columns = m if form == "ranking" else 5
        twin = torch.randint(-1, lists, (lists,))
        sizes = torch.randint(1, m + 1, (lists,)).sort(descending=True).values
        sizes[0] = m
        ranks = torch.zeros(lists, m, dtype=torch.long)
        for row, size in zip(ranks, sizes.tolist()):
            row[:size] = torch.randperm(size) + 1
        ratings = torch.randint(-2, 11, (lists, m)) / 2.0
        ratings[torch.rand(lists, m) < 0.2] = float("nan")
        logits = 2 * torch.randn(lists, m, columns)
        values = torch.linspace(1, 5, columns) if form == "ratings" else None
        options = {
            "gamma": 1.3,
            "sigma": 0.9,
            "normalise": normalise,
            "divergence": divergence,
            "detach": detach,
            "mask_emitted": emitted,
        }
        wanted = eager.listwise(logits.double(), ratings.double(), ranks, sizes, twin, double(values), **options)
        got = cpp.listwise(logits, ratings, ranks, sizes, twin, values, **options)
        for a, b in zip(got, wanted):
            close(a, b, 1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers(instruction_set, softcap, dtype):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((20, 137), (50, 137), (50,)))
    rows, ids = torch.randint(-1, 20, (6, 4)), torch.randint(-1, 50, (6, 7))
    wanted = eager.gather_logits(double(hidden), double(weight), double(bias), softcap, 0.7, rows, ids)
    got = cpp.gather_logits(hidden, weight, bias, softcap, 0.7, rows, ids)
    close(got, wanted, 1e-5)
    grad = torch.randn_like(got)
    sums = [torch.randn(20, 137), torch.randn(50, 137), torch.randn(50)]
    exact = [part.double() for part in sums]
    eager.gather_backward(double(hidden), double(weight), softcap, 0.7, rows, ids, wanted, double(grad), *exact)
    cpp.gather_backward(hidden, weight, softcap, 0.7, rows, ids, got, grad, *sums)
    for a, b in zip(sums, exact):
        close(a, b, 1e-5)


def test_any_strides(instruction_set):
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 21), torch.randn(200, 64)
    options = {"want_expected": True, "mass_bound": 0.0}
    wanted = cpp.vocab_pass(hidden.T[:, ::2].contiguous(), weight[:, ::2].contiguous()[:, :32], *BARE, **options)
    strided = weight.T.contiguous().T[:, ::2]
    got = cpp.vocab_pass(hidden.T[:, ::2], strided, *BARE, **options)
    assert strided.stride(1) != 1
    close(got.lse, wanted.lse, 1e-6)
    close(got.expected, wanted.expected, 1e-6)


BARE = (None, None, 1.0)  # bias, softcap, scale


def test_extreme_logits_stay_numbers_and_nan_stays_nan(instruction_set):
    hidden = torch.tensor([[1.0], [-1.0], [0.0], [float("nan")]])
    weight = torch.tensor([[3e4], [2.5e4], [-3e4]])
    lse, expected = cpp.vocab_pass(hidden, weight, *BARE, want_expected=True, mass_bound=0.0)
    torch.testing.assert_close(lse[:3], torch.tensor([3e4, 3e4, 1.0986123]))
    torch.testing.assert_close(expected[:3, 0], torch.tensor([3e4, -3e4, 2.5e4 / 3]))
    assert lse[3].isnan()
    assert expected[3].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Dropped columns.


def counted_pass(hidden: Tensor, weight: Tensor, bound: float, threads: int = 1) -> tuple[float, Tensor, Tensor]:
    """-> second products done, in units of one N x V x H product; lse; expected."""
    lse, expected = torch.empty(len(hidden)), torch.empty(hidden.shape)
    done = _cpp.vocab_pass(
        hidden, weight, None, 0.0, 1.0, None, None, True, bound, lse, expected, None, None, None, threads
    )
    return done, lse, expected


def peaked_head(where: str) -> tuple[Tensor, Tensor]:
    """A head in which 99.99 % of every row's mass lies in 1 % of the columns."""
    generator = torch.Generator().manual_seed(3)
    n, h, v = 64, 16, 150_000
    special = {
        "last": torch.arange(v - v // 100, v),
        "middle": torch.arange(v // 3, v // 3 + v // 100),
        "scattered": torch.randperm(v, generator=generator)[: v // 100],
    }[where]
    direction = torch.zeros(h)
    direction[0] = 1.0
    hidden, weight = torch.randn(n, h, generator=generator), torch.randn(v, h, generator=generator) / 4
    hidden[:, 0], weight[:, 0] = 15.0, 0.0
    weight[special, 0] = 1.0
    mass = (hidden @ weight.T).softmax(dim=1)[:, special].sum(dim=1)
    assert mass.min() > 0.9999
    return hidden, weight


@pytest.mark.parametrize("where", ["last", "middle", "scattered"])
@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_rows_cost_little_more_than_one_product(where, count, dtype):
    hidden, weight = (tensor.to(dtype) for tensor in peaked_head(where))
    done, _, _ = counted_pass(hidden, weight, 2.0**-12, count)
    assert done <= 0.2, f"{1 + done:.2f} products"


@pytest.mark.parametrize("bound", [0.0, 1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mass_bound_is_honoured(instruction_set, bound, count, dtype):
    torch.manual_seed(1)
    hidden, weight = (4.5 * torch.randn(50, 64)).to(dtype), (torch.randn(5000, 64) / 8).to(dtype)
    p = (hidden.double() @ weight.double().T).softmax(dim=1)
    exact = p @ weight.double()
    done, lse, expected = counted_pass(hidden, weight, bound, count)
    lost = (expected.double() - exact).norm(dim=1)
    rounded = instruction_set == "avx512_bf16" and dtype == torch.bfloat16
    assert (lost <= bound * weight.double().norm(dim=1).max() + (2.0**-10 if rounded else 1e-5)).all()
    assert lost.max() > 0 or bound == 0
    close(lse, torch.logsumexp(hidden.double() @ weight.double().T, dim=1), 1e-6)  # always whole
    width = {"generic": 4, "avx2": 8}.get(instruction_set, 16)
    whole = -(-50 // width) * width / 50  # empty lanes are multiplied too
    assert done < 0.96 * whole if bound >= 1e-3 else done <= whole


def test_zero_bound_drops_nothing_that_counts():
    hidden, weight = peaked_head("middle")
    _, _, expected = counted_pass(hidden, weight, 0.0)
    exact = (hidden.double() @ weight.double().T).softmax(dim=1) @ weight.double()
    close(expected, exact, 5e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Threads and processes.


def every_op() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(100, 48, generator=generator), torch.randn(3000, 48, generator=generator)
    first, second = torch.arange(40), torch.arange(40) + 50
    options = {"want_expected": True, "mass_bound": 1e-3}
    passed = cpp.paired_vocab_pass(hidden, weight, *BARE, first, second, entropy=True, want_spread=True, **options)
    halves = cpp.vocab_pass(hidden.bfloat16(), weight.bfloat16(), *BARE, **options)
    upstream = torch.linspace(-1, 1, 100), torch.linspace(0, 1, 40), torch.linspace(1, 2, 40)
    grads = cpp.paired_weight_grad(
        hidden, weight, *BARE, first, second, passed.lse, passed.cross, *upstream,
        entropy=True, want_weight=True, want_bias=True,
    )  # fmt: skip
    rows, ids = torch.arange(90).view(9, 10), torch.arange(9 * 12).view(9, 12)
    z = cpp.gather_logits(hidden, weight, None, None, 1.0, rows, ids)
    d_hidden = torch.zeros(100, 48)
    cpp.gather_backward(hidden, weight, None, 1.0, rows, ids, z, z, d_hidden, None, None)
    lists = cpp.listwise(
        torch.randn(200, 10, 10, generator=generator), torch.rand(200, 10, generator=generator),
        torch.arange(1, 11).repeat(200, 1), torch.full((200,), 10), torch.arange(200).roll(1), None,
        gamma=1.0, sigma=1.0, normalise=True, divergence="kl", detach=False, mask_emitted=False,
    )  # fmt: skip
    return [tensor for tensor in (*passed, *halves, *grads, z, d_hidden, *lists) if tensor is not None]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_equal_bits_for_equal_threads(threads, count):
    alone = every_op()
    threads(count)
    once, again = every_op(), every_op()
    for a, b, c in zip(once, again, alone):
        assert torch.equal(a, b)
        close(a, c, 2e-3 if a.shape == (100, 48) else 1e-4)  # dropped columns differ with the share of each thread


def _child(queue) -> None:
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    torch.get_num_threads = lambda: 3
    queue.put([tensor.numpy().tobytes() for tensor in every_op()])


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_forked_children_compute_the_same(threads):
    threads(3)
    wanted = [tensor.numpy().tobytes() for tensor in every_op()]  # the parent has used its threads
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == wanted
    finally:
        child.join(timeout=10)
        if child.is_alive():
            child.kill()
            child.join()


class _Ops(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return every_op()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_data_loader_workers(threads):
    wanted = every_op()[0]
    threads(2)
    loader = torch.utils.data.DataLoader(_Ops(), num_workers=1, timeout=60, multiprocessing_context="fork")
    for got in loader:
        torch.testing.assert_close(got[0], wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals.


def test_what_it_serves(monkeypatch, caplog):
    cpu = torch.device("cpu")
    assert cpp.unavailable(cpu, torch.float32) is None
    assert cpp.unavailable(cpu, torch.bfloat16) is None
    assert "float32" in cpp.unavailable(cpu, torch.float64)
    assert "not on cuda" in cpp.unavailable(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(cpp, "_cpp", None)
    monkeypatch.setattr(cpp, "_import_error", ImportError("no compiler"), raising=False)
    cpp._say_once_not_built.cache_clear()
    with caplog.at_level(logging.WARNING, logger="alro_fast"):
        for _ in range(2):
            assert "not installed" in cpp.unavailable(cpu, torch.float32)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "eager" in caplog.text
    cpp._say_once_not_built.cache_clear()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden": torch.zeros(4, 7)}, "hidden, weight"),
        ({"hidden": torch.zeros(4)}, "hidden"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.float16)}, "hidden"),
        ({"weight": torch.zeros(9, 8, dtype=torch.int32)}, "weight"),
        ({"bias": torch.zeros(8)}, "bias"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": float("nan")}, "softcap"),
        ({"scale": float("inf")}, "scale"),
        ({"first": torch.tensor([4]), "second": torch.tensor([0])}, "first, second"),
        ({"first": torch.tensor([-1]), "second": torch.tensor([0])}, "first, second"),
        ({"first": torch.tensor([0]), "second": torch.tensor([0, 1])}, "second"),
        ({"first": torch.tensor([0])}, "first, second"),
        ({"first": torch.tensor([0.5]), "second": torch.tensor([0.5])}, "first"),
        ({"mass_bound": -0.1}, "mass_bound"),
        ({"mass_bound": float("nan")}, "mass_bound"),
        ({"lse": torch.zeros(3)}, "lse"),
        ({"expected": torch.zeros(8, 4).T}, "expected"),
        ({"expected": torch.zeros(4, 8, dtype=torch.float64)}, "expected"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {
        "hidden": torch.zeros(4, 8), "weight": torch.zeros(9, 8), "bias": None, "softcap": 0.0, "scale": 1.0,
        "first": None, "second": None, "entropy": True, "mass_bound": 0.0, "lse": torch.zeros(4),
        "expected": torch.zeros(4, 8), "cross": torch.zeros(1), "mixed": None, "spread": None, "threads": 1,
    }  # fmt: skip
    _cpp.vocab_pass(**{**arguments, "cross": None})
    if "first" not in change:
        arguments["cross"] = None
    with pytest.raises(ValueError, match=f"^{named}:"):
        _cpp.vocab_pass(**{**arguments, **change})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"ranks": torch.full((2, 3), 4)}, "ranks"),
        ({"ranks": torch.zeros(2, 3, dtype=torch.long)}, "ranks"),
        ({"sizes": torch.tensor([3, 4])}, "sizes"),
        ({"sizes": torch.tensor([3, -1])}, "sizes"),
        ({"twin": torch.tensor([0, 2])}, "twin"),
        ({"ratings": torch.zeros(2, 4)}, "ratings"),
        ({"logits": torch.zeros(2, 3, 4)}, "logits"),
        ({"divergence": "js"}, "divergence"),
        ({"gamma": float("nan")}, "gamma"),
    ],
)
def test_bad_listwise_arguments_are_named(change, named):
    arguments = {
        "logits": torch.zeros(2, 3, 3), "ratings": torch.zeros(2, 3), "ranks": torch.ones(2, 3, dtype=torch.long),
        "sizes": torch.tensor([3, 2]), "twin": torch.tensor([-1, 0]), "values": None, "gamma": 1.0, "sigma": 1.0,
        "normalise": True, "divergence": "kl", "mask_emitted": False, "soft_lambda": torch.zeros(2),
        "permutation": torch.zeros(2), "expected": torch.zeros(2, 3), "d_soft_lambda": torch.zeros(2, 3, 3),
        "d_student": torch.zeros(2, 3, 3), "d_teacher": None, "threads": 1,
    }  # fmt: skip
    _cpp.listwise(**arguments)
    with pytest.raises(ValueError, match=f"^{named}:"):
        _cpp.listwise(**{**arguments, **change})


def test_random_arguments_end_in_results_or_exceptions():
    """In a process of its own, since what is looked for is a crash. ALRO_FAST_FUZZ_SECONDS sets how long."""
    seconds = os.environ.get("ALRO_FAST_FUZZ_SECONDS", "3")
    script = Path(__file__).with_name("fuzz_csrc.py")
    done = subprocess.run(
        [sys.executable, script, "--seconds", seconds], capture_output=True, text=True, timeout=60 + 2 * float(seconds)
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
