from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, Head, head
from kernel_strategies import examples, heads

kernel = pytest.importorskip("alro_fast.kernels.gather")


def groups(case: Head, count: int, rows: int, ids: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups [G, S], [G, C] with pads and with repeated rows and tokens."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(-1, len(case.hidden), (count, rows), generator=generator)
    token = torch.randint(-1, len(case.weight), (count, ids), generator=generator)
    return row.to(DEVICE), token.to(DEVICE)


def by_definition(case: Head, rows: torch.Tensor, ids: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
    """z [G, S, C] float64 from the leaves hidden, weight, bias."""
    hidden, weight, bias = leaves
    z = hidden[rows.clamp(min=0)] @ weight[ids.clamp(min=0)].transpose(1, 2) + bias[ids.clamp(min=0)][:, None]
    z = z * case.scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    return z.masked_fill((rows < 0)[:, :, None] | (ids < 0)[:, None, :], 0.0)


@examples(10)
@given(
    case=heads(with_pairs=False),
    shape=st.sampled_from([(1, 1, 1), (5, 1, 3), (3, 4, 4), (2, 3, 20)]),
    seed=st.integers(0, 99),
)
def test_logits_and_gradients_equal_float64(case: Head, shape: tuple[int, int, int], seed: int) -> None:
    rows, ids = groups(case, *shape, seed)
    bias = case.bias if case.bias is not None else case.weight.new_zeros(len(case.weight))
    leaves = [tensor.detach().double().requires_grad_() for tensor in (case.hidden, case.weight, bias)]
    wanted = by_definition(case, rows, ids, leaves)
    logits = kernel.gather_logits(*case.arguments, rows, ids)
    assert torch.allclose(logits.double(), wanted, atol=2e-5, rtol=1e-5)

    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    wanted.backward(upstream.double())
    sums = [torch.ones(leaf.shape, device=DEVICE) for leaf in leaves]
    kernel.gather_backward(
        case.hidden, case.weight, case.softcap, case.scale, rows, ids, logits, upstream, *sums
    )  # fmt: skip
    for leaf, total in zip(leaves, sums):
        assert torch.allclose(total.double() - 1, leaf.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("to", ["hidden", "weight"])
def test_one_row_adds_up_200_entries(to: str) -> None:
    case = head(5, 32, 9)
    count, spread = 200, torch.arange(200, device=DEVICE)[:, None]
    one = torch.full_like(spread, 3)
    rows, ids = (one, spread % 9) if to == "hidden" else (spread % 5, one)
    upstream = torch.randn(count, 1, 1, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits = kernel.gather_logits(*case.arguments, rows, ids)
    d_hidden, d_weight = torch.zeros(5, 32, device=DEVICE), torch.zeros(9, 32, device=DEVICE)
    kernel.gather_backward(case.hidden, case.weight, None, 1.0, rows, ids, logits, upstream, d_hidden, d_weight, None)
    got, source, place = (d_hidden, case.weight, ids) if to == "hidden" else (d_weight, case.hidden, rows)
    wanted = (upstream[:, 0].double() * source[place[:, 0]].double()).sum(0)
    assert torch.allclose(got[3].double(), wanted, atol=1e-4)


@pytest.mark.parametrize(("vocab", "dtype"), [(1, torch.float32), (5, torch.bfloat16), (30, torch.float16)])
def test_segments_of_frequent_and_of_rare_tokens_add_up(
    vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of 8: keys of none, of a few and of many entries beside each other, pads, ends on a segment's edge."""
    monkeypatch.setattr(kernel, "SEGMENT", 8)
    case = head(7, 19, vocab, dtype, softcap=4.0, seed=vocab)
    generator = torch.Generator().manual_seed(vocab)
    for count in (8, 9, 41):
        rows = torch.randint(-1, 7, (count, 2), generator=generator).to(DEVICE)
        ids = torch.randint(-1, vocab, (count, 1), generator=generator).to(DEVICE)
        upstream = torch.randn(count, 2, 1, generator=generator).to(DEVICE)
        leaves = [tensor.double().requires_grad_() for tensor in (case.hidden, case.weight)]
        zeros = case.weight.new_zeros(vocab, dtype=torch.float64)
        by_definition(case, rows, ids, [*leaves, zeros]).backward(upstream.double())
        logits = kernel.gather_logits(*case.arguments, rows, ids)
        made = []
        for _ in range(2):
            sums = [torch.zeros(leaf.shape, device=DEVICE) for leaf in leaves]
            kernel.gather_backward(case.hidden, case.weight, 4.0, 1.0, rows, ids, logits, upstream, *sums, None)
            made.append(sums)
        for total, again, leaf in zip(*made, leaves):
            assert torch.equal(total, again)
            assert torch.allclose(total.double(), leaf.grad, atol=1e-4, rtol=1e-4)


def test_no_program_adds_up_all_entries_of_a_frequent_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 entries of one row: a program adds up a segment, or the segments."""
    launches = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append((arguments[2].shape, options["PARTS"]))

    monkeypatch.setattr(kernel, "scatter_kernel", Spy())
    case, count = head(5, 32, 9), 2000
    zeros = torch.zeros(count, 1, dtype=torch.int64, device=DEVICE)
    grad = torch.zeros(count, 1, 1, device=DEVICE)
    d_weight = torch.zeros(9, 32, device=DEVICE)
    kernel.gather_backward(case.hidden, case.weight, None, 1.0, zeros, zeros, grad, grad, None, d_weight, None)
    assert launches == [((count // kernel.SEGMENT, 32), True), ((count // kernel.SEGMENT, 32), False)]


def test_gradients_that_are_not_wanted_are_left_out_and_bits_repeat() -> None:
    case = head(6, 32, 40)
    rows = torch.zeros(8, 2, dtype=torch.int64, device=DEVICE)  # everything goes to one row
    ids = torch.arange(24, device=DEVICE).view(8, 3) % 5
    logits = kernel.gather_logits(*case.arguments, rows, ids)
    results = []
    for _ in range(2):
        d_hidden = torch.zeros(6, 32, device=DEVICE)
        kernel.gather_backward(case.hidden, case.weight, None, 1.0, rows, ids, logits, logits, d_hidden, None, None)
        results.append(d_hidden)
    assert torch.equal(*results)
    assert results[0][0].abs().min() > 0
    assert results[0][1:].abs().max() == 0


def test_bad_arguments_are_named() -> None:
    case = head(3, 16, 20)
    rows, ids = groups(case, 2, 2, 2, 0)
    with pytest.raises(ValueError, match=r"\[G, S\] and \[G, C\]"):
        kernel.gather_logits(*case.arguments, rows[:1], ids)
    with pytest.raises(ValueError, match="int64"):
        kernel.gather_logits(*case.arguments, rows.int(), ids)
