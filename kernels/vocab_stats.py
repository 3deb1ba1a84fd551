"""Vocabulary statistics of the head: every row's log-sum-exp and every pair's cross term, no logits stored.

    lse_n   = log sum_v exp z_nv                               online, per vocabulary split, then combined
    cross_p = sum_v p_av (z_av - z_bv)  or  sum_v p_av (-z_bv)   a = first[p], b = second[p], p = softmax(z)
    tile_lse[n, t] = log sum_{v in tile t} exp z_nv            significance of a tile: exp(tile_lse - lse)

Both rows of a pair are worked on in one program, so each tile of `weight` is read once for both and their logits meet
in registers. Rows in no pair go through the same kernel without its second half. A row in several pairs is computed in
each; all copies write the same bits.

FLOPs: 2 N H V (2 H V more per repetition of a row). Bytes: `weight` once per GROUP row blocks that run side by side
(V H w), `hidden` once per tile from cache, 8 N SPLITS of partial sums, 4 N V / BLOCK_V of tile statistics on request.
Deterministic: a program owns its split; `combine_kernel` adds splits in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .head_tile import LOWEST, add_product, product_tile, register_limit, to_logits

_LOWEST = tl.constexpr(LOWEST)


class StatsConfig(NamedTuple):
    """Launch shape: tile of rows (of pairs, when paired) x vocabulary x hidden; `programs` to aim for on the device.

    `registers` that a thread may take, see `head_tile.register_limit`.
    """

    block_m: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    programs: int
    group: int = 8
    registers: int = 255


@triton.jit(do_not_specialize=["slots", "tiles_per_split", "splits"])
def vocab_stats_kernel(
    hidden, weight, bias, rows_a, rows_b, live, part_max, part_sum, part_cross, tile_lse,
    slots, size_v, size_h, tiles, tiles_per_split, splits,
    stride_hn, stride_hk, stride_wv, stride_wk, scale, cap,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, EVEN_H: tl.constexpr,
    PAIRED: tl.constexpr, ENTROPY: tl.constexpr, HAS_LIVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, TILE_STATS: tl.constexpr,
):  # fmt: skip
    """A block of rows (PAIRED: of pairs, a and b) over one vocabulary split: its maximum, its sum, its cross terms."""
    # Row blocks of one group run side by side on the same vocabulary tiles, which then stay in L2.
    pid = tl.program_id(0)
    per_group = GROUP * splits
    block = (pid // per_group) * GROUP + pid % GROUP
    split = (pid % per_group) // GROUP
    if HAS_LIVE:
        slots = tl.load(live)
    if block * BLOCK_M >= slots:
        return

    slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_a = tl.load(rows_a + slot, mask=slot < slots, other=-1).to(tl.int64)
    mask = (slot < slots) & (row_a >= 0)
    a_rows = hidden + row_a * stride_hn
    max_a = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    sum_a = tl.zeros((BLOCK_M,), tl.float32)
    if PAIRED:
        row_b = tl.load(rows_b + slot, mask=slot < slots, other=-1).to(tl.int64)
        mask = mask & (row_b >= 0)
        b_rows = hidden + row_b * stride_hn
        max_b = tl.full((BLOCK_M,), _LOWEST, tl.float32)
        sum_b = tl.zeros((BLOCK_M,), tl.float32)
        cross = tl.zeros((BLOCK_M,), tl.float32)

    k = tl.arange(0, BLOCK_H).to(tl.int64)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tiles)):
        column = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        inside_v = column < size_v
        w_rows = weight + column * stride_wv
        if PAIRED:
            # One tile of weight serves both rows of the pair.
            product_a = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            product_b = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            w_ptr = w_rows[None, :] + k[:, None] * stride_wk
            a_ptr = a_rows[:, None] + k[None, :] * stride_hk
            b_ptr = b_rows[:, None] + k[None, :] * stride_hk
            for start in range(0, size_h, BLOCK_H):
                if EVEN_H:
                    w = tl.load(w_ptr, mask=inside_v[None, :], other=0.0)
                    a = tl.load(a_ptr, mask=mask[:, None], other=0.0)
                    b = tl.load(b_ptr, mask=mask[:, None], other=0.0)
                else:
                    inside_h = k < size_h - start
                    w = tl.load(w_ptr, mask=inside_v[None, :] & inside_h[:, None], other=0.0)
                    a = tl.load(a_ptr, mask=mask[:, None] & inside_h[None, :], other=0.0)
                    b = tl.load(b_ptr, mask=mask[:, None] & inside_h[None, :], other=0.0)
                product_a = add_product(a, w, product_a)
                product_b = add_product(b, w, product_b)
                w_ptr += BLOCK_H * stride_wk
                a_ptr += BLOCK_H * stride_hk
                b_ptr += BLOCK_H * stride_hk
        else:
            product_a = product_tile(
                a_rows, mask, w_rows, inside_v, size_h, stride_hk, stride_wk, BLOCK_M, BLOCK_V, BLOCK_H, EVEN_H
            )

        # Online statistics of row a.
        z_a = to_logits(product_a, bias, column, inside_v, scale, cap, HAS_BIAS, HAS_CAP)
        z_a = tl.where(inside_v[None, :], z_a, float("-inf"))
        top = tl.max(z_a, axis=1)
        new_max = tl.maximum(max_a, top)
        decay = tl.exp(max_a - new_max)
        p_a = tl.exp(z_a - new_max[:, None])
        mass = tl.sum(p_a, axis=1)
        if TILE_STATS:
            tl.store(tile_lse + row_a * tiles + tile, new_max + tl.log(mass), mask=mask)
        sum_a = sum_a * decay + mass
        max_a = new_max

        # The pair's cross term, relative to row a's maximum, and the statistics of row b.
        if PAIRED:
            z_b = to_logits(product_b, bias, column, inside_v, scale, cap, HAS_BIAS, HAS_CAP)
            difference = z_a - z_b if ENTROPY else -z_b
            moment = tl.where(p_a > 0, p_a * difference, 0.0)
            cross = cross * decay + tl.sum(moment, axis=1)
            z_b = tl.where(inside_v[None, :], z_b, float("-inf"))
            new_max = tl.maximum(max_b, tl.max(z_b, axis=1))
            mass = tl.sum(tl.exp(z_b - new_max[:, None]), axis=1)
            if TILE_STATS:
                tl.store(tile_lse + row_b * tiles + tile, new_max + tl.log(mass), mask=mask)
            sum_b = sum_b * tl.exp(max_b - new_max) + mass
            max_b = new_max

    tl.store(part_max + row_a * splits + split, max_a, mask=mask)
    tl.store(part_sum + row_a * splits + split, sum_a, mask=mask)
    if PAIRED:
        tl.store(part_max + row_b * splits + split, max_b, mask=mask)
        tl.store(part_sum + row_b * splits + split, sum_b, mask=mask)
        tl.store(part_cross + slot * splits + split, cross, mask=mask)


@triton.jit(do_not_specialize=["count", "splits"])
def combine_kernel(
    part_max, part_sum, part_cross, pair_rows, row_max, lse, cross, count, splits,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Adds up splits: lse and maximum per row or, with PAIRS, cross per pair from its sums and row a's maxima."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.arange(0, BLOCK_S)
    row = tl.load(pair_rows + index, mask=index < count, other=-1).to(tl.int64) if PAIRS else index
    mask = (index < count) & (row >= 0)
    inside = mask[:, None] & (split < splits)[None, :]
    highest = tl.load(part_max + row[:, None] * splits + split[None, :], mask=inside, other=_LOWEST)
    total = tl.load(part_sum + row[:, None] * splits + split[None, :], mask=inside, other=0.0)
    top = tl.max(highest, axis=1)
    decay = tl.exp(highest - top[:, None])
    total = tl.sum(total * decay, axis=1)
    if PAIRS:
        moment = tl.load(part_cross + index[:, None] * splits + split[None, :], mask=inside, other=0.0)
        value = tl.sum(moment * decay, axis=1) / tl.where(mask, total, 1.0)
        tl.store(cross + index, tl.where(mask, value, 0.0), mask=index < count)
    else:
        tl.store(row_max + index, top, mask=mask)
        tl.store(lse + index, top + tl.log(total), mask=mask)


class VocabStats(NamedTuple):
    """lse, row_max [N] float32; cross [P] float32 or None; tile_lse [N, tiles] float32 or None."""

    lse: torch.Tensor
    row_max: torch.Tensor
    cross: torch.Tensor | None
    tile_lse: torch.Tensor | None


def vocab_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    first: torch.Tensor | None,
    second: torch.Tensor | None,
    *,
    entropy: bool,
    tile_stats: bool,
    single: StatsConfig,
    paired: StatsConfig,
) -> VocabStats:
    """Statistics of hidden [N, H] against weight [V, H], any strides; first, second [P] int64, -1 pads, or None.

    `single` and `paired` are the launch shapes for rows in no pair and for pairs; with `tile_stats` their block_v,
    the width of a tile, must agree.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not share a hidden size")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; expected one dtype")
    if single.block_v != paired.block_v:
        raise ValueError(f"block_v of single ({single.block_v}) and paired ({paired.block_v}) differ")
    n, size_h = hidden.shape
    size_v = weight.shape[0]
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=hidden.device)  # noqa: E731
    pair_count = 0 if first is None else len(first)
    tiles = triton.cdiv(size_v, single.block_v)
    lse, row_max = new(n), new(n)
    cross = new(pair_count) if first is not None else None
    tile_lse = new(n, tiles) if tile_stats else None
    if n == 0:
        return VocabStats(lse, row_max, None if cross is None else cross.zero_(), tile_lse)

    alone, live = _rows_alone(n, first, second, hidden.device)
    blocks = max(triton.cdiv(n - 2 * pair_count, single.block_m), triton.cdiv(pair_count, paired.block_m), 1)
    tiles_per_split = triton.cdiv(tiles, min(triton.cdiv(single.programs, blocks), tiles))
    splits = triton.cdiv(tiles, tiles_per_split)
    part_max, part_sum = new(n, splits), new(n, splits)
    part_cross = new(pair_count, splits) if pair_count else part_sum

    def launch(config: StatsConfig, rows_a, rows_b, live, slots: int) -> None:
        row_blocks = triton.cdiv(triton.cdiv(slots, config.block_m), config.group) * config.group
        vocab_stats_kernel[(row_blocks * splits,)](
            hidden, weight, weight if bias is None else bias, rows_a, rows_a if rows_b is None else rows_b,
            rows_a if live is None else live, part_max, part_sum, part_cross,
            part_max if tile_lse is None else tile_lse,
            slots, size_v, size_h, tiles, tiles_per_split, splits,
            hidden.stride(0), hidden.stride(1), weight.stride(0), weight.stride(1), scale, softcap or 1.0,
            BLOCK_M=config.block_m, BLOCK_V=config.block_v, BLOCK_H=config.block_h, GROUP=config.group,
            EVEN_H=size_h % config.block_h == 0, PAIRED=rows_b is not None, ENTROPY=entropy,
            HAS_LIVE=live is not None, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, TILE_STATS=tile_stats,
            num_warps=config.num_warps, num_stages=config.num_stages, **register_limit(config.registers),
        )  # fmt: skip

    if pair_count:
        launch(paired, first, second, None, pair_count)
    launch(single, alone, None, live, n)

    block_s = triton.next_power_of_2(splits)
    block_n = max(1024 // block_s, 1)
    for pairs, count in ((False, n), (True, pair_count)):
        if count:
            combine_kernel[(triton.cdiv(count, block_n),)](
                part_max, part_sum, part_cross, first if pairs else alone, row_max, lse, cross if pairs else lse,
                count, splits, BLOCK_N=block_n, BLOCK_S=block_s, PAIRS=pairs, num_warps=4,
            )  # fmt: skip
    return VocabStats(lse, row_max, cross, tile_lse)


def _rows_alone(
    n: int, first: torch.Tensor | None, second: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows in no pair, packed at the front of [N], and how many there are (on the device: no synchronisation)."""
    if first is None or len(first) == 0:
        return torch.arange(n, device=device), None
    paired = torch.zeros(n + 1, dtype=torch.int8, device=device)
    held = (first >= 0) & (second >= 0)
    paired.scatter_(0, torch.where(held, first, n), 1)
    paired.scatter_(0, torch.where(held, second, n), 1)
    paired = paired[:n]
    return torch.argsort(paired, stable=True), (n - paired.sum(dtype=torch.int32)).to(torch.int32)
