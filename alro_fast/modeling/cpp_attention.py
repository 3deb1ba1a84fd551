"""Attention over packed tries on the CPU by the kernels of csrc/attention: forward and backward, in float32. What comes
in half precision is widened on the way in and rounded on the way out.

A row sees the rows of its own node up to itself and all rows of its node's ancestors, or the last `window` of them.
Lanes of a vector are queries, and the query heads that share a key head; a panel of them walks the trie once, over keys
and values where they lie: the ancestors of its first row, then what its other rows have beside them. Scores are
recomputed in the backward pass from the saved log-sum-exps (FlashAttention).
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

DTYPES = torch.float32, torch.bfloat16, torch.float16


def serves(query: Tensor, value: Tensor) -> bool:
    """float32 or half precision on the CPU, values as wide as keys, and the kernels are installed."""
    return (
        _cpp is not None
        and query.device.type == "cpu"
        and query.dtype == value.dtype
        and query.dtype in DTYPES
        and query.shape[-1] == value.shape[-1]
    )


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Segments,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    answers: bool = False,
) -> Tensor:
    """Attention of every row, or with `answers` of the rows `layout.distinct_rows` alone.

    query [1, heads, T, D], with `answers` [1, heads, U, D]; key, value [1, kv_heads, T, D] -> [1, T or U, heads, D].
    A query sees keys at positions above its own - window (None: all); scores become softcap * tanh(score / softcap).
    Results are bitwise the same for any number of threads.
    """
    return _TreeAttention.apply(query, key, value, layout, scale, window, softcap, answers)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Segments,
        scale: float,
        window: int | None,
        softcap: float | None,
        answers: bool,
    ) -> Tensor:
        rows = [_rows(tensor) for tensor in (query, key, value)]
        out = torch.empty(rows[0].shape)
        lse = torch.empty(rows[0].shape[:2])
        asked = layout.distinct_rows if answers else torch.arange(len(rows[0]))
        how = layout.node_start, layout.node_parent, asked.int(), scale, window or 0, softcap or 0.0
        _cpp.tree_attention(*rows, *how, out, lse, None, None, None, None, torch.get_num_threads())
        out = out.to(query.dtype).unsqueeze(0)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.how = how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        rows = [_rows(tensor) for tensor in (query, key, value)]
        grads = [torch.empty(tensor.shape) for tensor in rows]
        grad = (grad if grad.stride(-1) == 1 else grad.contiguous())[0].float()
        _cpp.tree_attention(*rows, *ctx.how, out[0].float(), lse, grad, *grads, torch.get_num_threads())
        return *(each.to(query.dtype).transpose(0, 1).unsqueeze(0) for each in grads), None, None, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, heads, D] float32 with a dense last axis."""
    tensor = tensor.detach()[0].transpose(0, 1).float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
