from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, Head, head
from kernel_strategies import examples, heads

from alro_fast.ops.backends import triton as backend

configs = pytest.importorskip("alro_fast.kernels.configs")
from alro_fast.kernels import vocab_stats  # noqa: E402


def run(case: Head, *, entropy: bool = True, tile_stats: bool = True, **changes) -> vocab_stats.VocabStats:
    config = backend._config(case.hidden)
    return vocab_stats.vocab_stats(
        *case.arguments, case.first, case.second, entropy=entropy, tile_stats=tile_stats,
        single=config.single._replace(**changes), paired=config.paired._replace(**changes),
    )  # fmt: skip


def close(actual: torch.Tensor, wanted: torch.Tensor, size: float | torch.Tensor = 1.0) -> None:
    assert actual.dtype == torch.float32
    assert ((actual - wanted).abs() <= 1e-5 * torch.clamp(wanted.abs(), min=size)).all()


@examples(25)
@given(case=heads(), entropy=st.booleans(), tile_stats=st.booleans())
def test_statistics_equal_their_definition(case: Head, entropy: bool, tile_stats: bool) -> None:
    stats = run(case, entropy=entropy, tile_stats=tile_stats)
    z = case.logits()
    close(stats.lse, z.logsumexp(1))
    assert torch.allclose(stats.row_max.double(), z.amax(1), atol=1e-4)
    if case.first is not None:
        close(stats.cross, case.cross(entropy), size=z.abs().max())
    if tile_stats:
        width = backend._config(case.hidden).single.block_v
        close(stats.tile_lse, torch.stack([tile.logsumexp(1) for tile in z.split(width, dim=1)], dim=1))


def test_split_count_does_not_change_the_value() -> None:
    case = head(20, 32, 400, pairs=6)
    few, many = run(case, programs=1), run(case, programs=64)
    assert torch.allclose(few.lse, many.lse, atol=1e-6)
    assert torch.allclose(few.cross, many.cross, atol=1e-5)


def test_equal_bits_on_rerun_and_from_either_side_of_a_pair() -> None:
    case = head(12, 32, 300, torch.bfloat16, pairs=8)
    one, two = run(case), run(case)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    case.first, case.second = case.second, case.first
    assert torch.equal(run(case).lse, one.lse)


def test_rows_in_no_pair_are_independent_of_the_pairs() -> None:
    case = head(9, 32, 100, bias=True)
    alone = run(case).lse
    case.first = torch.tensor([3, -1], device=DEVICE)
    case.second = torch.tensor([5, -1], device=DEVICE)
    assert torch.allclose(run(case).lse, alone, atol=1e-6)


def test_masked_columns_and_large_logits_stay_finite() -> None:
    case = head(5, 16, 100, bias=True, pairs=3, spread=60.0)
    case.bias[30:70] = float("-inf")
    stats = run(case)
    assert stats.lse.isfinite().all()
    close(stats.lse, case.logits().logsumexp(1))


def test_bad_arguments_are_named() -> None:
    case = head(4, 16, 50)
    config = backend._config(case.hidden)
    with pytest.raises(ValueError, match="hidden size"):
        vocab_stats.vocab_stats(
            case.hidden[:, :8], case.weight, None, None, 1.0, None, None, entropy=True, tile_stats=False,
            single=config.single, paired=config.paired,
        )  # fmt: skip
    with pytest.raises(ValueError, match="dtype"):
        vocab_stats.vocab_stats(
            case.hidden.half(), case.weight, None, None, 1.0, None, None, entropy=True, tile_stats=False,
            single=config.single, paired=config.paired,
        )  # fmt: skip
