"""The compiled kernels over tries on a CUDA device; `test_kernels_trie_attention.py` is their twin on a CPU."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import HALF_ROUNDING, TrieCase, trie_case

from alro_fast.ops import trie_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def step(case: TrieCase) -> list[torch.Tensor]:
    """Tiles, output and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    tiles = trie_attention.make_tiles(case.until, case.positions, case.rows, case.query.device)
    out = trie_attention.trie_attention(*leaves, tiles, case.scale, case.window, case.softcap)
    out.backward(case.upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    ("width", "dtype", "options"),
    [
        (64, torch.bfloat16, {}),
        (128, torch.float16, {"softcap": 5.0, "window": 200}),
        (80, torch.float32, {"answers": 0.3}),
        (256, torch.bfloat16, {}),
    ],
)
def test_thousands_of_rows_equal_float64_bit_for_bit_twice(width: int, dtype: torch.dtype, options: dict) -> None:
    case = trie_case(3000, width, dtype, heads=(8, 2), longest=300, **options)
    got, (out, grads) = step(case), case.exact()
    for mine, exact in zip(got, [out, *grads]):
        assert (mine.double() - exact).abs().max() <= (1e-5 + 4 * HALF_ROUNDING[dtype]) * exact.abs().max()
    assert all(map(torch.equal, got, step(case)))


def test_a_root_that_all_rows_see_is_shared_by_programs() -> None:
    """More rows than `trie_tiles.MOST_QUERIES` below one root."""
    case = trie_case(6000, 64, torch.bfloat16, heads=(2, 1), longest=400, roots=1)
    tiles = trie_attention.make_tiles(case.until, case.positions, case.rows, case.query.device)
    config = trie_attention.kernel_config(case.query).key_grad
    assert tiles.key_tiles(config.block_n, config.block_m, None).places > 0
    for mine, exact in zip(step(case)[1:], case.exact()[1]):
        assert (mine.double() - exact).abs().max() <= 4 * HALF_ROUNDING[torch.bfloat16] * exact.abs().max()


def test_no_synchronisation_from_layout_to_gradients() -> None:
    case = trie_case(2000, 64, torch.bfloat16, heads=(4, 2), longest=200)
    step(case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
