"""Attention over tries by its kernels, beside float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, HALF_ROUNDING, TrieCase, trie_case, with_changed
from torch import Tensor

kernel = pytest.importorskip("alro_fast.kernels.trie_attention")
from alro_fast.kernels.trie_tiles import TrieTiles  # noqa: E402

from alro_fast.kernels import trie_tiles  # noqa: E402

SMALL = kernel.TrieConfig(kernel.Launch(16, 32, 1, 1), kernel.Launch(32, 16, 1, 1), kernel.Launch(32, 16, 1, 1))


def tiles_of(case: TrieCase) -> TrieTiles:
    return TrieTiles(case.until, case.positions, case.rows, torch.device(DEVICE))


def run(case: TrieCase, config=SMALL) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    out = kernel.trie_attention(*leaves, tiles_of(case), case.scale, case.window, case.softcap, config)
    out.backward(case.upstream)
    return out.detach(), [leaf.grad for leaf in leaves]


def assert_exact(case: TrieCase, config=SMALL) -> None:
    """Within what float32 sums, and roundings of probabilities to half, of inputs' size 1 to 10, may change."""
    (out, grads), (wanted, wanted_grads) = run(case, config), case.exact()
    rounding = HALF_ROUNDING[case.query.dtype]
    for got, exact in zip([out, *grads], [wanted, *wanted_grads]):
        assert got.dtype == case.query.dtype
        error = (got.double() - exact).abs().max()
        assert error <= (2e-6 + 4 * rounding) * max(1.0, exact.abs().max()), (got.shape, error)


CASES = {
    "rows": {},
    "answers": {"answers": 0.3},
    "one answer": {"answers": 0.01},
    "window": {"window": 9, "seed": 1},
    "window, answers": {"window": 25, "answers": 0.4, "seed": 2},
    "soft-cap": {"softcap": 2.0, "seed": 3},
    "all": {"softcap": 3.0, "window": 30, "answers": 0.5, "seed": 4},
    "short nodes": {"longest": 3, "seed": 5},
    "one row": {"rows": 1, "longest": 1},
    "one head": {"heads": (1, 1), "seed": 6},
    "two groups of two heads": {"heads": (4, 2), "rows": 20, "seed": 7},
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_float64(name: str) -> None:
    assert_exact(trie_case(**CASES[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 80])
def test_half_precision_and_widths_between_powers_of_two(dtype: torch.dtype, width: int) -> None:
    assert_exact(trie_case(30, width, dtype, softcap=4.0))


def test_parts_of_keys_that_many_rows_see_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trie_tiles, "MOST_QUERIES", 32)
    case = trie_case(70, seed=8, heads=(1, 1))
    tiles = tiles_of(case).key_tiles(SMALL.key_grad.block_n, SMALL.key_grad.block_m, None)
    assert tiles.places > len(tiles.shared) > 0
    assert_exact(case)


def test_two_runs_give_the_same_bits_and_branches_do_not_touch_each_other() -> None:
    case = trie_case(50, seed=9, heads=(1, 1))
    out, grads = run(case)
    again, same = run(case)
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, same))
    changed = np.arange(len(case.until) // 2, len(case.until) // 2 + 5)
    seen = case.visible()[:, changed].any(axis=1)
    assert 0 < seen.sum() < len(seen)
    other, _ = run(with_changed(case, changed))
    assert torch.equal(out[~seen], other[~seen])
    assert not torch.equal(out[seen], other[seen])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_key_that_overflowed_spoils_only_the_rows_that_see_it(softcap: float | None) -> None:
    case = trie_case(40, seed=10, softcap=softcap, heads=(1, 1))
    row = len(case.until) - 1
    case.key[row] = torch.inf
    out, _ = run(case)
    seen = torch.from_numpy(case.visible()[:, row])
    assert out[~seen].isfinite().all()
    assert not out[seen].isfinite().all() or softcap is not None


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = trie_case(30, heads=(4, 2))
    tiles = tiles_of(case)
    rest = (1.0, None, None, SMALL)
    for query, key, value, said in (
        (case.query[:-1], case.key, case.value, "queries"),
        (case.query[:, :3], case.key, case.value, "multiple"),
        (case.query, case.key, case.value[..., :8], "expected"),
        (case.query.half(), case.key, case.value, "one dtype"),
    ):
        with pytest.raises(ValueError, match=said):
            kernel.trie_attention(query, key, value, tiles, *rest)
