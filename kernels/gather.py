"""Logits of a few columns per row (labels, candidates, relabelled tokens), and their gradients.

    z[g, s, c] = softcap(scale * (hidden[rows[g, s]] . weight[ids[g, c]] + bias[ids[g, c]]))       float32 products
    d_hidden[rows[g, s]] += sum_c q_gsc weight[ids[g, c]],   d_weight[ids[g, c]] += sum_s q_gsc hidden[rows[g, s]],
    q = upstream * scale * (1 - (z / cap)^2)

FLOPs: 2 G S C H each. Bytes: (1 + C) H per (g, s), mostly from L2; no [G, C, H] copy of the columns is made.
Deterministic without atomics: the targets of a scatter are sorted; a row's entries are added up in their order, SEGMENT
at a time by programs side by side, then the segments by one.
"""

import torch
import triton
import triton.language as tl

from .head_tile import register_limit, slope_of, to_logits

REGISTERS = 128  # that a thread of a scatter may take
SEGMENT = 128  # entries of one row that a program adds up; a frequent token has thousands


@triton.jit(do_not_specialize=["size_s", "size_c"])
def gather_logits_kernel(
    hidden, weight, bias, rows, ids, out, size_s, size_c, size_h,
    stride_hn, stride_hk, stride_wv, stride_wk, scale, cap,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One program per row (g, s) and block of columns."""
    place = tl.program_id(0).to(tl.int64)
    group = place // size_s
    lane = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(rows + place)
    token = tl.load(ids + group * size_c + lane, mask=lane < size_c, other=-1)
    token = tl.where(row >= 0, token, -1)
    valid = token >= 0
    row = tl.maximum(row, 0)
    product = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
    for start in range(0, size_h, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H).to(tl.int64)
        h = tl.load(hidden + row * stride_hn + k * stride_hk, mask=k < size_h, other=0.0)
        w = tl.load(
            weight + token[:, None] * stride_wv + k[None, :] * stride_wk,
            mask=valid[:, None] & (k < size_h)[None, :],
            other=0.0,
        )
        product += w.to(tl.float32) * h.to(tl.float32)[None, :]
    z = to_logits(tl.sum(product, axis=1), bias, token, valid, scale, cap, HAS_BIAS, HAS_CAP)
    tl.store(out + place * size_c + lane, tl.where(valid, z, 0.0), mask=lane < size_c)


@triton.jit(do_not_specialize=["size_inner", "stride_place", "stride_inner", "stride_group", "per_group"])
def scatter_kernel(
    source, target, parts, order, keys, begins, ends, places, grad, logits, size_inner, size_h,
    stride_place, stride_inner, stride_group, stride_sn, stride_sk, scale, cap,
    per_group,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, HAS_CAP: tl.constexpr, SEGMENT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """target[key] += sum over entries e of that key, sum_j q[e, j] source[places[group(e), j]].

    Entries are sorted by key, and a key's are cut into segments. PARTS: the program of a segment's first entry adds it
    up into parts[entry // SEGMENT], but for each key's last segment; whole segments never share that place. Without:
    the program of a key's first entry adds up its parts and its last segment. The others leave at once.
    """
    entry = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + entry)
    begin = tl.load(begins + entry)
    end = tl.load(ends + entry)
    if PARTS:
        if (key < 0) | ((entry - begin) % SEGMENT != 0) | (entry + SEGMENT >= end):
            return
        start = entry
        end = entry + SEGMENT
    else:
        if (key < 0) | (entry != begin):
            return
        start = begin + (end - begin - 1) // SEGMENT * SEGMENT
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    total = tl.zeros((BLOCK_E, BLOCK_H), tl.float32)
    for first in range(start, end, BLOCK_E):
        lane = first + tl.arange(0, BLOCK_E)
        held = lane < end
        item = tl.load(order + lane, mask=held, other=0)
        group = item // per_group
        at = group * stride_group + (item % per_group) * stride_place
        for inner in range(0, size_inner):
            place = tl.load(places + group * size_inner + inner, mask=held, other=-1)
            valid = held & (place >= 0)
            q = tl.load(grad + at + inner * stride_inner, mask=valid, other=0.0) * scale
            if HAS_CAP:
                q *= slope_of(tl.load(logits + at + inner * stride_inner, mask=valid, other=0.0), cap)
            x = tl.load(
                source + place[:, None] * stride_sn + k[None, :] * stride_sk,
                mask=valid[:, None] & (k < size_h)[None, :],
                other=0.0,
            )
            total += q[:, None] * x.to(tl.float32)
    added = tl.sum(total, axis=0)
    if PARTS:
        tl.store(parts + entry // SEGMENT * size_h + k, added, mask=k < size_h)
    else:
        for segment in range(begin // SEGMENT, begin // SEGMENT + (start - begin) // SEGMENT):
            added += tl.load(parts + segment * size_h + k, mask=k < size_h, other=0.0)
        at = target + key * size_h + k
        tl.store(at, tl.load(at, mask=k < size_h, other=0.0) + added, mask=k < size_h)


def gather_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    rows: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """z [G, S, C] float32 at rows [G, S] and ids [G, C], int64, negative = pad (0 in the result)."""
    _check(rows, ids)
    groups, size_s = rows.shape
    size_c = ids.shape[1]
    out = torch.empty(groups, size_s, size_c, dtype=torch.float32, device=hidden.device)
    if out.numel() == 0:
        return out
    rows, ids = rows.contiguous(), ids.contiguous()
    block_c = min(triton.next_power_of_2(size_c), 16)
    gather_logits_kernel[(groups * size_s, triton.cdiv(size_c, block_c))](
        hidden, weight, weight if bias is None else bias, rows, ids, out, size_s, size_c, hidden.shape[1],
        hidden.stride(0), hidden.stride(1), weight.stride(0), weight.stride(1), scale, softcap or 1.0,
        BLOCK_C=block_c, BLOCK_H=256, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, num_warps=4,
    )  # fmt: skip
    return out


def gather_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    softcap: float | None,
    scale: float,
    rows: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    grad: torch.Tensor,
    d_hidden: torch.Tensor | None,
    d_weight: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """Adds the gradients of `gather_logits` to d_hidden [N, H], d_weight [V, H], d_bias [V]: float32, each may be None.

    logits, grad [G, S, C] float32: the forward's result and its upstream gradient.
    """
    _check(rows, ids)
    rows, ids = rows.contiguous(), ids.contiguous()
    logits, grad = logits.contiguous(), grad.contiguous()
    if d_hidden is not None:
        _scatter(weight, d_hidden, rows, ids, grad, logits, (ids.shape[1], 1), softcap, scale)
    if d_weight is not None:
        _scatter(hidden, d_weight, ids, rows, grad, logits, (1, ids.shape[1]), softcap, scale)
    if d_bias is not None:
        ones = torch.ones(1, 1, dtype=torch.float32, device=hidden.device).expand(len(hidden), 1)
        _scatter(ones, d_bias[:, None], ids, rows, grad, logits, (1, ids.shape[1]), softcap, scale)


def _scatter(source, target, keys, places, grad, logits, strides, softcap, scale) -> None:
    """target[keys[g, i]] += sum_j q[g, i, j] source[places[g, j]]; strides: of i and j in grad."""
    if grad.numel() == 0:
        return
    if not target.is_contiguous() or target.dtype != torch.float32:
        raise ValueError("gradients must be contiguous float32 tensors")
    per_group, size_inner = keys.shape[1], places.shape[1]
    ordered, order = torch.sort(keys.flatten(), stable=True)
    begins, ends = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
    size_h = target.shape[1]
    block_h = min(triton.next_power_of_2(size_h), 256)
    whole = len(ordered) > SEGMENT  # else no row has a segment and more
    parts = target.new_empty(len(ordered) // SEGMENT, size_h) if whole else target
    for to_parts in (True, False) if whole else (False,):
        scatter_kernel[(len(ordered), triton.cdiv(size_h, block_h))](
            source, target, parts, order, ordered, begins, ends, places, grad, logits, size_inner, size_h,
            *strides, per_group * size_inner, source.stride(0), source.stride(1), scale, softcap or 1.0, per_group,
            BLOCK_E=4, BLOCK_H=block_h, HAS_CAP=softcap is not None, SEGMENT=SEGMENT, PARTS=to_parts, num_warps=4,
            **register_limit(REGISTERS),
        )  # fmt: skip


def _check(rows: torch.Tensor, ids: torch.Tensor) -> None:
    if rows.dim() != 2 or ids.dim() != 2 or len(rows) != len(ids):
        raise ValueError(f"rows {tuple(rows.shape)} and ids {tuple(ids.shape)}; expected [G, S] and [G, C]")
    if rows.dtype != torch.int64 or ids.dtype != torch.int64:
        raise ValueError(f"rows are {rows.dtype} and ids {ids.dtype}; expected int64")
