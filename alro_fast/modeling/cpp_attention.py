"""Tree attention on the CPU by the kernels of csrc/attention: forward and backward, float32.

A row sees the prefix of its tree up to itself and its own branch up to itself. Lanes of a vector are queries, and the
query heads that share a key head; no score of a pair that may not see each other is kept, and no copy of keys or
values is made for a branch. Scores are recomputed in the backward pass from the saved log-sum-exps (FlashAttention).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .packing import Segments

try:
    from .. import _cpp
except ImportError:
    _cpp = None
TRIES = False  # the kernels know one level of sharing alone


def serves(query: Tensor, value: Tensor) -> bool:
    """float32 on the CPU, values as wide as keys, and the kernels are installed."""
    return (
        TRIES
        and _cpp is not None
        and query.device.type == "cpu"
        and query.dtype == value.dtype == torch.float32
        and query.shape[-1] == value.shape[-1]
    )


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Segments, scale: float, answers: bool = False
) -> Tensor:
    """Attention of every row, or with `answers` of the answer rows alone.

    query [1, heads, T, D], with `answers` [1, heads, N, D]; key, value [1, kv_heads, T, D] -> [1, T or N, heads, D].
    Padding rows give 0.
    """
    return _TreeAttention.apply(query, key, value, layout, scale, answers)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Segments, scale: float, answers: bool
    ) -> Tensor:
        rows = [_rows(tensor) for tensor in (query, key, value)]
        out = torch.zeros(rows[0].shape, dtype=torch.float32)
        lse = torch.zeros(rows[0].shape[:2], dtype=torch.float32)
        places = _places(layout, answers)
        _cpp.tree_attention(*rows, *places, scale, out, lse, None, None, None, None, torch.get_num_threads())
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.places, ctx.scale = places, scale
        return out.unsqueeze(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        rows = [_rows(tensor) for tensor in (query, key, value)]
        grads = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in rows]
        grad = grad[0] if grad.stride(-1) == 1 else grad[0].contiguous()
        _cpp.tree_attention(*rows, *ctx.places, ctx.scale, out, lse, grad, *grads, torch.get_num_threads())
        return *(tensor.transpose(0, 1).unsqueeze(0) for tensor in grads), None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, heads, D] with a dense last axis."""
    tensor = tensor.detach()[0].transpose(0, 1)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _places(layout: Segments, answers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """trees [trees, 5], the row each query stands at, the first row of each row's branch."""
    where = ("cpp", answers)
    if where not in layout.cache:
        branch_row = torch.zeros(layout.num_rows, dtype=torch.int32)
        trees, asked = [], 0
        for span, answer_count in zip(layout.spans, layout.answer_counts):
            start = prefix_end = span.start + span.prefix
            branch_row[span.start : prefix_end] = prefix_end
            for length in span.lengths:
                branch_row[start : start + length] = start
                start += length
            count = answer_count if answers else span.end - span.start
            trees.append((span.start, prefix_end, span.end, asked, asked + count))
            asked += count
        rows = layout.answer_rows.int() if answers else torch.arange(layout.num_rows, dtype=torch.int32)
        layout.cache[where] = torch.tensor(trees, dtype=torch.int64).view(-1, 5), rows, branch_row
    return layout.cache[where]
