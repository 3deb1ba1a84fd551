"""Embeddings of tokens that stand for neighbouring values."""

from __future__ import annotations

import torch
from tiny import tiny_llama

from alro_fast.modeling.loading import order_embeddings


def test_neighbours_are_alike_the_ends_are_not_and_other_rows_stay():
    model = tiny_llama(100, hidden_size=64, initializer_range=0.05)
    before = model.get_input_embeddings().weight.detach().clone()
    scales = [list(range(10, 42)), [50, 51, 52, 53], [60]]
    order_embeddings(model, scales, seed=3)
    rows = model.get_input_embeddings().weight.detach()
    touched = [token for scale in scales for token in scale]
    rest = [token for token in range(100) if token not in touched]
    torch.testing.assert_close(rows[rest], before[rest], rtol=0, atol=0)
    steps = (rows[11:42] - rows[10:41]).norm(dim=1)
    apart = (rows[10] - rows[41]).norm()
    assert steps.max() < 0.5 * apart
    spread = (rows[10:42] - rows[10:42].mean(dim=0)).std(dim=0)
    torch.testing.assert_close(spread, torch.full_like(spread, 0.05), rtol=1e-4, atol=1e-6)
    assert rows.isfinite().all()
    again = tiny_llama(100, hidden_size=64, initializer_range=0.05)
    order_embeddings(again, scales, seed=3)
    torch.testing.assert_close(again.get_input_embeddings().weight.detach(), rows, rtol=0, atol=0)
