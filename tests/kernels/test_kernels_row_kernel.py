from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, head

pytest.importorskip("alro_fast.kernels.row_kernel")
from alro_fast.kernels import row_kernel


def state(rows: int, size_h: int, pairs: int | None = None, **wanted: bool) -> row_kernel.Running:
    flags = {"expected": False, "tile_stats": False, "mixed": False, "spread": False} | wanted
    return row_kernel.new_running(rows, size_h, pairs, torch.device(DEVICE), **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tiles_in_place_add_up_to_the_whole(dtype: torch.dtype, softcap: float | None) -> None:
    case = head(9, 32, 200, dtype, bias=True, softcap=softcap, scale=0.5)
    running = state(9, 32, expected=True)
    products = torch.full((9, 64), float("nan"), device=DEVICE)  # stale columns must not be read
    p = products.view(dtype)[:, :64]
    for start in range(0, 200, 64):
        width = min(64, 200 - start)
        w = case.weight[start : start + width].float()
        products[:, :width] = case.hidden.float() @ w.T
        row_kernel.advance(
            products[:, :width], p[:, :width], running, case.bias, softcap, 0.5, start, pairs=None, entropy=True
        )
        running.sums.addmm_(p[:, :width].float(), w)
    lse = running.row_max + running.row_sum.log()
    assert torch.allclose(lse.double(), case.logits().logsumexp(1), atol=1e-5)
    embedding = 0.5 * running.sums / running.row_sum[:, None]
    assert ((embedding - case.expected()).abs() <= case.expected_error(dtype)).all()


def test_the_maximum_is_exactly_one_and_sums_are_rescaled_only_when_it_moves() -> None:
    running = state(2, 4, expected=True)
    running.sums.fill_(8.0)
    running.row_sum.fill_(1.0)
    running.row_max.copy_(torch.tensor([5.0, 1.0]))
    products = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], device=DEVICE)
    row_kernel.advance(products, products, running, None, None, 1.0, 0, pairs=None, entropy=True)
    assert products[1, 2] == 1.0
    assert (running.sums[0] == 8.0).all()
    assert torch.allclose(running.sums[1], torch.full((4,), 8.0, device=DEVICE) * torch.exp(torch.tensor(-2.0)))
    assert torch.allclose(running.row_max.cpu(), torch.tensor([5.0, 3.0]))


def test_pair_table_groups_pairs_by_row() -> None:
    row = torch.tensor([2, -1, 0, 2], device=DEVICE)
    table = row_kernel.pair_table(row, torch.arange(4, device=DEVICE), 4)
    held = [table.order[table.bounds[n] : table.bounds[n + 1]].tolist() for n in range(4)]
    assert held == [[2], [], [0, 3], []]


def test_bad_arguments_are_named() -> None:
    running = state(2, 4, pairs=1)
    wide = torch.zeros(2, row_kernel.MAX_COLUMNS + 1, device=DEVICE)
    with pytest.raises(ValueError, match="at most 8192"):
        row_kernel.advance(wide, None, running, None, None, 1.0, 0, pairs=None, entropy=True)
    tile = torch.zeros(2, 16, device=DEVICE)
    table = row_kernel.pair_table(torch.tensor([0], device=DEVICE), torch.tensor([1], device=DEVICE), 2)
    with pytest.raises(ValueError, match="share memory"):
        row_kernel.advance(tile, tile, running, None, None, 1.0, 0, pairs=table, entropy=True)
