from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, Head, head
from kernel_strategies import examples, heads

from alro_fast.ops.backends import triton as backend

pytest.importorskip("alro_fast.kernels.expected")
from alro_fast.kernels import expected, vocab_stats


def run(case: Head, mass_bound: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    config = backend._config(case.hidden)
    stats = vocab_stats.vocab_stats(
        *case.arguments, None, None, entropy=True, tile_stats=True, single=config.single, paired=config.paired
    )
    return expected.expected(
        *case.arguments, stats.lse, stats.row_max, stats.tile_lse, mass_bound, config.expected
    )  # fmt: skip


@examples(20)
@given(case=heads(with_pairs=False))
def test_expected_embedding_equals_its_definition(case: Head) -> None:
    embedding, kept = run(case)
    assert embedding.dtype == torch.float32
    assert ((embedding - case.expected()).abs() <= case.expected_error(case.hidden.dtype)).all()
    width = backend._config(case.hidden).expected.block_v
    assert (kept == -(-len(case.weight) // width)).all()  # a bound of 0 skips nothing


@examples(15)
@given(mass_bound=st.sampled_from([1e-4, 1e-2, 0.3]), spread=st.sampled_from([1.0, 4.0, 10.0]), seed=st.integers(0, 99))
def test_no_row_loses_more_than_the_mass_bound(mass_bound: float, spread: float, seed: int) -> None:
    case = head(20, 32, 640, spread=spread, seed=seed)
    embedding, kept = run(case, mass_bound)
    largest = case.weight.double().norm(dim=1).max()
    lost = (embedding - case.expected()).norm(dim=1)
    assert (lost <= mass_bound * largest * (1 + 1e-4) + 1e-5).all()
    assert (kept >= 1).all()


def test_dropped_tiles_are_those_without_mass() -> None:
    case = head(16, 32, 640, bias=True)
    case.bias[:] = -30.0
    case.bias[200:230] = 0.0
    width = backend._config(case.hidden).expected.block_v
    embedding, kept = run(case, 1e-6)
    assert kept.tolist() == [229 // width - 200 // width + 1] * len(kept)
    assert ((embedding - case.expected()).abs() <= case.expected_error(torch.float32)).all()
    _, kept = run(case, 0.0)
    assert (kept == -(-640 // width)).all()


def test_the_bound_is_spent_over_the_vocabulary_not_at_its_start() -> None:
    """Equal tiles and a bound of half the mass: about half of them go, spread out, and never more than half."""
    tiles, rows = 160, 16
    tile_lse = torch.zeros(rows, tiles, device=DEVICE)
    lse = torch.full((rows,), float(torch.tensor(float(tiles)).log()), device=DEVICE)
    chosen = expected.new_selection(rows, tiles, 16, torch.device(DEVICE))
    expected.select(chosen, tile_lse, lse, None, 0.5, block_m=16)
    count = int(chosen.kept_count[0])
    assert tiles // 2 <= count <= tiles // 2 + 3
    kept = chosen.kept[0, :count]
    assert torch.equal(kept, kept.sort().values)
    assert float(chosen.spent[0]) <= 0.5
    assert int((kept < tiles // 2).sum()) >= tiles // 5


def test_a_dominating_column_keeps_float32_accuracy_in_half_precision() -> None:
    """p_c = 1 - 1e-4: w_c - U must be right to 1 % of itself; bfloat16 would round p to 1 or to 0.996."""
    case = head(4, 32, 200, torch.bfloat16, bias=True)
    case.bias[77] = float(case.logits().logsumexp(1).max()) + 9.0
    embedding, _ = run(case)
    w = case.weight.double()
    exact = w[77] - case.expected()
    assert (exact.norm(dim=1) < 0.02).all()
    assert ((w[77] - embedding.double() - exact).norm(dim=1) < 0.01 * exact.norm(dim=1) + 4e-6).all()


def test_equal_bits_on_rerun() -> None:
    case = head(20, 32, 300, torch.bfloat16, spread=5.0)
    assert torch.equal(run(case, 1e-3)[0], run(case, 1e-3)[0])


def test_bad_arguments_are_named() -> None:
    case = head(4, 16, 50)
    config = backend._config(case.hidden).expected
    lse = torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match="tile_lse"):
        expected.expected(*case.arguments, lse, lse, torch.zeros(4, 99, device=DEVICE), 0.0, config)
    chosen = expected.new_selection(4, 2, config.block_m, torch.device(DEVICE))
    with pytest.raises(ValueError, match="mass_bound"):
        expected.select(chosen, torch.zeros(4, 2, device=DEVICE), lse, None, 1.5, block_m=config.block_m)
    with pytest.raises(ValueError, match="dtype"):
        expected.accumulate(
            case.hidden.half(), case.weight, chosen, torch.zeros(4, 16, device=DEVICE), config, packed=True
        )


def test_programs_side_by_side_read_the_same_probabilities(monkeypatch) -> None:
    """Blocks of H are the grid's fast axis: p~ [N, T] then goes through memory once, not once per block of H."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(expected, "accumulate_kernel", Kernel())
    config = expected.ExpectedConfig(16, 32, 32, 32, 32, 1, 1)
    selection = expected.new_selection(160, 2, 16, torch.device("cpu"))
    p, weight, sums = torch.zeros(160, 64), torch.zeros(64, 96), torch.zeros(160, 96)
    expected.accumulate(p, weight, selection, sums, config, packed=False)
    assert grids == [(3, 10)]
