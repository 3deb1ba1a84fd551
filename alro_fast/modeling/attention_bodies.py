"""The sums of tree attention where the CPU's own kernels (`modeling.cpp_attention`) do not serve.

- *cascade* (CPU, where those kernels do not serve): every run of the trie in one causal call; then, level by level, the
  rows behind a run against the part of it that stands above them (no mask), merged by their log-sum-exps. With O and L
  the merged output and log-sum-exp, P_ij = exp(s_ij - L_i) and D_i = dO_i . O_i hold for all parts, so each part's
  backward runs on (O, L) and the gradients add up. No mask is read and no score of a pair that may not see each other
  is computed.
- *varlen* (CUDA, half precision): keys and values gathered by one index, one FlashAttention call for all runs of the
  trie, len_q <= len_k, causal and aligned at the end.
- *Triton* (CUDA, any dtype but float64, heads up to 256): `alro_fast.kernels.trie_attention`, on the rows as they lie.
  Where varlen serves too, the cheaper of the two by what a model of both expects of the batch at hand.
- *dense* (anything else: windows and soft caps on the CPU where the kernels do not serve, heads of keys and values that
  differ on CUDA): one masked SDPA call per unit.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import AlroFastError
from ..ops import flash as flash_kernels
from ..ops import trie_attention as trie_kernels
from .packing import Segments, Varlen
from .trie import Trie

logger = logging.getLogger("alro_fast.modeling.attention")


MOST_MASKED = 1 << 31  # entries of the masks of one batch: 8 GB in float32, more while they are made


# --- dense: the definition -------------------------------------------------------------------------------------------


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    answers: bool = False,
) -> Tensor:
    """One masked call per unit of the layout over plain differentiable operations.

    Args:
        query: [1, heads, T, D], or with `answers` [1, heads, U, D]: the distinct answer rows alone.
        key, value: [1, kv_heads, T, D].

    Returns:
        [1, T or U, heads, D].
    """
    masks = _masks(layout, window, query, answers)
    queries = query.split([len(mask) for _, mask in masks], dim=2)
    parts = [
        _dense_call(part, _seen(key, keys), _seen(value, keys), mask, scale, softcap)
        for part, (keys, mask) in zip(queries, masks)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _seen(tensor: Tensor, keys: Tensor | slice) -> Tensor:
    """[1, kv_heads, T, D] -> the rows `keys` of it."""
    if isinstance(keys, slice):
        return tensor[:, :, keys]
    return gather_rows(tensor[0].transpose(0, 1), keys).transpose(0, 1).unsqueeze(0)


def _dense_call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap)) + mask
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


def _masks(layout: Segments, window: int | None, like: Tensor, answers: bool) -> list[tuple[Tensor | slice, Tensor]]:
    """Per unit that has queries: the rows of its keys, and an additive mask [queries, keys]: 0 where the query may see
    the key, else -inf."""
    where = (window, like.dtype, like.device, answers)
    if where not in layout.cache:
        units = list(itertools.pairwise(layout.trie.units.tolist()))
        counts = layout.unit_answers if answers else tuple(end - start for start, end in units)
        above = [layout.trie.chains(np.array([start]))[0][:-1] for start, _ in units]
        cells = sum(count * (end - start + len(rows)) for count, (start, end), rows in zip(counts, units, above))
        if cells > MOST_MASKED:
            raise AlroFastError(
                f"a batch with masks of {cells:,} entries ({layout.num_rows:,} rows, {layout.longest:,} tokens in its "
                f"longest branch) is over the {MOST_MASKED:,} that attention by masks serves (heads of keys and "
                "values that differ, or over 256 wide on CUDA; windows or soft caps in float64, or without the C++ "
                "kernels, on the CPU): lower --max_length or --tokens_per_batch"
            )
        rows = layout.distinct_rows if answers else torch.arange(layout.num_rows, device=like.device)
        masks: list[tuple[Tensor | slice, Tensor]] = []
        for (start, end), before, own in zip(units, above, rows.int().split(counts)):
            if len(own):
                keys = torch.cat([torch.from_numpy(before), torch.arange(start, end)]).to(like.device)
                visible = _visible(layout, window, own, keys)
                mask = like.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
                masks.append((keys if len(before) else slice(start, end), mask))
        layout.cache[where] = masks
    return layout.cache[where]


def _visible(layout: Segments, window: int | None, rows: Tensor, keys: Tensor) -> Tensor:
    """[rows, keys] bool, by the rule of `Segments`; int32 positions, the widest intermediate."""
    visible = (keys.int() <= rows[:, None]) & (rows[:, None] < layout.until[keys])
    if window is not None:
        positions = layout.positions.int()
        visible &= positions[rows][:, None] - positions[keys] < window
    return visible


# --- cascade: the CPU ------------------------------------------------------------------------------------------------

# Query rows of a causal call: torch's CPU kernel skips no key of a block of 512, smaller calls waste fewer.
CHUNK = 192

# Both take fewer key than query heads as they are (torch >= 2.9).
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Rows(NamedTuple):
    """Rows `low:high` of each of `count` runs of `length` rows, the first run at row `start` of the stream."""

    start: int
    count: int  # type: ignore[assignment]  # a tuple has a method of that name
    length: int
    low: int
    high: int

    def of(self, tensor: Tensor) -> Tensor:
        """[1, heads, T, D] -> the view [count, heads, high - low, D]."""
        if self.count == 1:
            return tensor[:, :, self.start + self.low : self.start + self.high]
        runs = tensor[0, :, self.start : self.start + self.count * self.length].unflatten(1, (self.count, self.length))
        return runs[:, :, self.low : self.high].transpose(0, 1)


class _Call(NamedTuple):
    """One kernel call: which queries on which keys, in which order."""

    queries: _Rows
    keys: _Rows
    causal: bool
    mask: Tensor | None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The output of `queries` over `keys` alone, and its log-sum-exp with a last axis of 1."""
        out, lse = _flash(
            self.queries.of(query),
            self.keys.of(key),
            self.keys.of(value),
            is_causal=self.causal,
            attn_mask=self.mask,
            scale=scale,
        )
        return out, lse.unsqueeze(-1)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What this call adds to the gradients of its queries, keys and values; out, lse: over all keys of a query."""
        return _flash_backward(
            self.queries.of(grad),
            self.queries.of(query),
            self.keys.of(key),
            self.keys.of(value),
            self.queries.of(out),
            self.queries.of(lse).squeeze(-1),
            0.0,
            self.causal,
            attn_mask=self.mask,
            scale=scale,
        )


def _calls(layout: Segments, dtype: torch.dtype) -> tuple[list[_Call], list[_Call]]:
    """The calls that write a row's output first, and the calls that are merged into what a row already has."""
    where = ("cascade", dtype)
    if where not in layout.cache:
        trie = layout.trie
        cuts = trie.node_start[trie.runs]  # of the runs
        corner = torch.full((CHUNK, layout.longest), -torch.inf, dtype=dtype).triu(layout.longest - CHUNK + 1)
        first: list[_Call] = []
        row = 0
        for count, length in _alike(np.diff(cuts).tolist()):
            first += _causal_calls(row, count, length, corner)
            row += count * length
        layout.cache[where] = first, [_below(*where) for where in _parts_seen_below(trie, cuts)]
    return layout.cache[where]


def _parts_seen_below(trie: Trie, cuts: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, low, high): rows start:end of a run are seen whole by rows low:high, which are behind the run."""
    starts, until = trie.node_start[:-1], trie.node_until.astype(np.int64)
    run = np.searchsorted(cuts, starts, side="right") - 1
    low = cuts[run + 1]
    seen = np.flatnonzero(until > low)
    for _, nodes in itertools.groupby(seen.tolist(), key=lambda node: (run[node], until[node])):
        one, *more = nodes
        yield int(starts[one]), int(trie.node_start[(more or [one])[-1] + 1]), int(low[one]), int(until[one])


def _below(start: int, end: int, low: int, high: int) -> _Call:
    queries, keys = _Rows(low, 1, high - low, 0, high - low), _Rows(start, 1, end - start, 0, end - start)
    return _Call(queries, keys, False, None)


def _causal_calls(start: int, count: int, length: int, corner: Tensor) -> Iterator[_Call]:
    """Each of `count` runs attends to itself: chunk by chunk, to the keys up to the chunk's end."""
    chunks = -(-length // CHUNK)
    edges = [length * chunk // chunks for chunk in range(chunks + 1)]
    for low, high in itertools.pairwise(edges):
        queries, keys = _Rows(start, count, length, low, high), _Rows(start, count, length, 0, high)
        mask = corner[CHUNK - (high - low) :, corner.shape[1] - high :] if low else None
        yield _Call(queries, keys, not low, mask)


def _alike(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours of equal length as (how many, length)."""
    for length, run in itertools.groupby(lengths):
        yield len(list(run)), length


def cascade_attention(query: Tensor, key: Tensor, value: Tensor, layout: Segments, scale: float) -> Tensor:
    """[1, heads or kv_heads, T, D] on the CPU -> [1, T, heads, D]; all rows, no window, no soft-capping."""
    return _Cascade.apply(query, key, value, layout, scale)


class _Cascade(torch.autograd.Function):
    """Attention of a packed stream without scores of pairs that may not see each other; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Segments, scale: float) -> Tensor:
        first, second = _calls(layout, query.dtype)
        _, heads, rows, width = query.shape
        out = query.new_zeros(1, rows, heads, width).transpose(1, 2)
        lse = query.new_zeros(1, rows, heads, 1, dtype=torch.promote_types(query.dtype, torch.float32)).transpose(1, 2)
        for call in first:
            part, part_lse = call.forward(query, key, value, scale)
            call.queries.of(out).copy_(part)
            call.queries.of(lse).copy_(part_lse)
        for call in second:
            part, part_lse = call.forward(query, key, value, scale)
            own, own_lse = call.queries.of(out), call.queries.of(lse)
            share = torch.sigmoid(part_lse - own_lse)  # of the part's keys in the softmax over both
            own.lerp_(part, share.to(part.dtype))
            own_lse.copy_(torch.logaddexp(own_lse, part_lse))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for call in itertools.chain(*_calls(ctx.layout, query.dtype)):
            parts = call.backward(grad.transpose(1, 2), query, key, value, out, lse, ctx.scale)
            call.queries.of(grad_query).add_(parts[0])
            call.keys.of(grad_key).add_(parts[1])
            call.keys.of(grad_value).add_(parts[2])
        return grad_query, grad_key, grad_value, None, None


# --- varlen: CUDA ----------------------------------------------------------------------------------------------------


def varlen_attention(
    backend: flash_kernels.VarlenBackend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Varlen,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """All rows of the trie in one call of a variable-length kernel.

    A sequence has the last len_q positions of a path as queries and the path up to there as keys; aligned at the end,
    causal (and windowed) order is that of a branch alone.

    Args:
        query: [1, heads, Tq, D]; key, value: [1, kv_heads, T, D], the rows `sequences.kv_index` counts.

    Returns:
        [1, Tq, heads, D].
    """
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if sequences.kv_index is not None:
        key, value = gather_rows(key, sequences.kv_index), gather_rows(value, sequences.kv_index)
    return backend(query, key, value, sequences, scale, window, softcap).unsqueeze(0)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows.index_select(0, index) whose backward adds in float32: the gradient of a row taken many times is a sum.

    On CUDA the sum is by atomic additions, in an order of the device's choice: two runs may differ in the last bits of
    float32, before rounding to the dtype of `rows`. `torch.use_deterministic_algorithms(True)` makes them equal.
    """
    return _Gather.apply(rows, index)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.num_rows, *grad.shape[1:], dtype=wide)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


# --- CUDA: the kernels over tries, or varlen -------------------------------------------------------------------------


def trie_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    answers: bool = False,
) -> Tensor:
    """All rows in one call of the kernels over tries; arguments and result as `dense_attention`."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    tiles = _tiles(layout, answers, query.device)
    return trie_kernels.trie_attention(query, key, value, tiles, scale, window, softcap).unsqueeze(0)


def _tiles(layout: Segments, answers: bool, device: torch.device) -> Any:
    where = ("tiles", answers, device)
    if where not in layout.cache:
        rows = layout.answers.rows if answers else layout.stream.rows
        layout.cache[where] = trie_kernels.make_tiles(layout.trie.until, layout.trie.positions, rows, device)
    return layout.cache[where]


def cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    answers: bool = False,
) -> Tensor:
    """By the body that serves and should take least; arguments and result as `dense_attention`."""
    flash = flash_kernels.varlen_backend(softcap is not None, query.device) if flash_kernels.serves(query) else None
    ours = trie_kernels.trie_kernels_serve(query)
    sequences = layout.answers if answers else layout.stream
    if flash is not None and not (ours and _ours_is_faster(flash, query, key, layout, window, softcap, answers)):
        _log_once(f"{flash.name}, keys gathered")
        return varlen_attention(flash.run, query, key, value, sequences, scale, window, softcap)
    if ours:
        _log_once("Triton kernels over tries")
        return trie_attention(query, key, value, layout, scale, window, softcap, answers)
    _log_once("dense SDPA, a mask for each unit")
    return dense_attention(query, key, value, layout, scale, window, softcap, answers)


def _ours_is_faster(
    flash: flash_kernels.Flash,
    query: Tensor,
    key: Tensor,
    layout: Segments,
    window: int | None,
    softcap: float | None,
    answers: bool,
) -> bool:
    """By the cost model (`alro_fast.kernels.attention_costs`), once a batch, forward and backward together."""
    where = ("faster", answers, window, softcap, query.shape, query.dtype)
    if where not in layout.cache:
        sequences = layout.answers if answers else layout.stream
        gathered = 0 if sequences.kv_index is None else len(sequences.kv_index)
        ours, theirs = trie_kernels.expected_seconds(
            query[0].transpose(0, 1), key[0].transpose(0, 1), _tiles(layout, answers, query.device),
            sequences.q_lengths, sequences.k_lengths, gathered, window, flash.newest,
        )  # fmt: skip
        layout.cache[where] = ours < theirs
        if not answers:
            _log_costs(ours, theirs, flash.name, query.shape[2], gathered)
    return layout.cache[where]


_costs_logged: list[bool] = []


def _log_costs(ours: float, theirs: float, name: str, rows: int, gathered: int) -> None:
    """Of the first batch; another one may choose otherwise."""
    if not _costs_logged:
        _costs_logged.append(True)
        logger.info(
            "tree attention: a layer of %d rows should take %.2f ms by Triton kernels over tries, %.2f ms by %s "
            "with %d keys gathered: %s",
            rows, 1e3 * ours, 1e3 * theirs, name, gathered, "Triton" if ours < theirs else "varlen",
        )  # fmt: skip


@functools.cache
def _log_once(body: str) -> None:
    logger.info("tree attention: %s", body)
