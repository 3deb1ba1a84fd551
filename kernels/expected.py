"""Expected embedding U_n = sum_v p_nv w~_nv from the tiles that matter, w~ = scale * (1 - (z / cap)^2) * w.

Three steps, each a kernel:
    select       per block of rows, the tiles to keep: the lightest are dropped while the mass dropped so far stays
                 below mass_bound * (share of the vocabulary seen so far), mass of a tile = its largest row's
                 exp(tile_lse - lse). No row loses more than mass_bound, so |dU| <= mass_bound * max|w~|; 0 drops none
    probability  p~ = exp(z - row_max) * slope of kept tiles only, logits recomputed, into [N, slots * T] in half
    accumulate   sums[n] += sum_t p~_nt W_t over kept tiles, float32

`expected` runs all three after `vocab_stats`: 4 f N H V FLOP for a kept share f, which makes statistics and U
1 + 2 f products with the vocabulary per row; W is read 1 + f times. The tiled engine runs `select` and `accumulate` on
the tile of p~ it has at hand: 1 + f products. Bytes beyond W: 2 N slots T of p~ written and read, 8 N H of sums per
round. How many tiles each block of rows kept is returned on the device; reading it is up to the caller.
Deterministic: a program owns its rows and columns of the sums, tiles are added in ascending order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .head_tile import add_product, product_tile, register_limit, slope_of, to_logits

SELECT_WIDTH = 64  # tiles looked at together by select_kernel


class ExpectedConfig(NamedTuple):
    """Launch shapes. block_m rows and block_v columns of a tile; block_h of the logit product; block_u columns of U.

    `registers` that a thread may take, see `head_tile.register_limit`.
    """

    block_m: int
    block_v: int
    block_h: int
    block_u: int
    block_k: int
    num_warps: int
    num_stages: int
    slots: int = 32  # kept tiles per round of probability + accumulate
    registers: int = 255


@triton.jit(do_not_specialize=["rows"])
def select_kernel(
    tile_lse, lse, floor, kept, kept_count, spent, rows, tiles, first_tile, all_tiles, mass_bound,
    stride_tn, stride_kb,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """kept[b, :kept_count[b]] = tiles (of the `tiles` at hand) block b of rows keeps; spent[b]: mass dropped so far."""
    block = tl.program_id(0)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    norm = tl.load(lse + row, mask=row < rows, other=0.0)
    if HAS_FLOOR:
        norm = tl.maximum(norm, tl.load(floor + row, mask=row < rows, other=0.0))
    dropped_mass = tl.load(spent + block)
    count = 0
    lane = tl.arange(0, WIDTH)
    for start in range(0, tiles, WIDTH):
        tile = start + lane
        inside = tile < tiles
        value = tl.load(
            tile_lse + row[:, None] * stride_tn + tile[None, :],
            mask=(row < rows)[:, None] & inside[None, :],
            other=float("-inf"),
        )
        mass = tl.max(tl.exp(value - norm[:, None]), axis=0)
        # Lightest first, ties by position: total mass of what would be dropped up to and including each tile.
        tied = (mass[None, :] == mass[:, None]) & (lane[None, :] <= lane[:, None])
        lighter = ((mass[None, :] < mass[:, None]) | tied) & inside[None, :]
        upto = tl.sum(tl.where(lighter, mass[None, :], 0.0), axis=1)
        seen = first_tile + tl.minimum(start + WIDTH, tiles)
        budget = mass_bound * (seen.to(tl.float32) / all_tiles) - dropped_mass
        drop = (upto <= budget) & inside & (mass_bound > 0)
        keep = (inside & (drop == 0)).to(tl.int32)
        dropped_mass += tl.sum(tl.where(drop, mass, 0.0), axis=0)
        position = count + tl.cumsum(keep, axis=0) - keep
        tl.store(kept + block * stride_kb + position, tile, mask=keep > 0)
        count += tl.sum(keep, axis=0)
    tl.store(kept_count + block, count)
    tl.store(spent + block, dropped_mass)


@triton.jit(do_not_specialize=["rows"])
def probability_kernel(
    hidden, weight, bias, row_max, kept, kept_count, out, rows, size_v, size_h, first_slot,
    stride_hn, stride_hk, stride_wv, stride_wk, stride_kb, stride_on, scale, cap,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """out[n, s * T : (s + 1) * T] = exp(z - row_max) * slope of the block's kept tile number first_slot + s."""
    block = tl.program_id(0)
    slot = tl.program_id(1)
    if first_slot + slot >= tl.load(kept_count + block):
        return
    tile = tl.load(kept + block * stride_kb + first_slot + slot).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_n, inside_v = row < rows, column < size_v
    product = product_tile(
        hidden + row * stride_hn, inside_n, weight + column * stride_wv, inside_v, size_h, stride_hk, stride_wk,
        BLOCK_M, BLOCK_V, BLOCK_H, EVEN_H,
    )  # fmt: skip
    z = to_logits(product, bias, column, inside_v, scale, cap, HAS_BIAS, HAS_CAP)
    p = tl.exp(z - tl.load(row_max + row, mask=inside_n, other=0.0)[:, None])
    if HAS_CAP:
        p *= slope_of(z, cap)
    p = tl.where(inside_v[None, :], p, 0.0)
    target = out + row[:, None] * stride_on + slot * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    tl.store(target, p.to(out.dtype.element_ty), mask=inside_n[:, None])


@triton.jit(do_not_specialize=["rows"])
def accumulate_kernel(
    p, weight, kept, kept_count, sums, rows, size_v, size_h, first_slot, slots,
    stride_pn, stride_kb, stride_wv, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """sums [N, H] += p~ @ W over the kept tiles; PACKED: p~ of slot s lies in columns s * T, else where its tile is."""
    block = tl.program_id(1)  # units come first: programs side by side read the same p~, and W from L2
    last_slot = tl.minimum(tl.load(kept_count + block), first_slot + slots)
    if last_slot <= first_slot:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    inside_n, inside_u = row < rows, unit < size_h
    p_ptr = p + row[:, None] * stride_pn + k[None, :]
    w_ptr = weight + k[:, None] * stride_wv + unit.to(tl.int64)[None, :] * stride_wk
    steps: tl.constexpr = BLOCK_V // BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_U), tl.float32)
    for step in range(0, (last_slot - first_slot) * steps):
        slot = step // steps
        inner = (step % steps) * BLOCK_K
        tile = tl.load(kept + block * stride_kb + first_slot + slot).to(tl.int64)
        place = slot if PACKED else tile
        inside_v = tile * BLOCK_V + inner + k < size_v
        a = tl.load(p_ptr + place * BLOCK_V + inner, mask=inside_n[:, None] & inside_v[None, :], other=0.0)
        w = tl.load(w_ptr + (tile * BLOCK_V + inner) * stride_wv, mask=inside_v[:, None] & inside_u[None, :], other=0.0)
        total = add_product(a, w, total)
    target = sums + row[:, None] * size_h + unit[None, :]
    inside = inside_n[:, None] & inside_u[None, :]
    tl.store(target, total + tl.load(target, mask=inside, other=0.0), mask=inside)


class Selection(NamedTuple):
    """Kept tiles of each block of `block_m` rows: kept [B, tiles] int32, kept_count [B] int32, spent [B] float32."""

    kept: torch.Tensor
    kept_count: torch.Tensor
    spent: torch.Tensor


def new_selection(rows: int, tiles: int, block_m: int, device: torch.device) -> Selection:
    blocks = triton.cdiv(rows, block_m)
    return Selection(
        torch.empty(blocks, tiles, dtype=torch.int32, device=device),
        torch.zeros(blocks, dtype=torch.int32, device=device),
        torch.zeros(blocks, dtype=torch.float32, device=device),
    )


def select(
    selection: Selection,
    tile_lse: torch.Tensor,
    lse: torch.Tensor,
    floor: torch.Tensor | None,
    mass_bound: float,
    *,
    block_m: int,
    first_tile: int = 0,
    all_tiles: int | None = None,
) -> None:
    """Fills `selection` for tiles tile_lse [N, tiles] of a vocabulary of `all_tiles`, of which first_tile came before.

    lse [N]: log-sum-exp of the row as far as known, floor [N] or None: a lower bound of the final one. A mass measured
    against either is never too small.
    """
    rows, tiles = tile_lse.shape
    if selection.kept.shape[0] != triton.cdiv(rows, block_m) or selection.kept.shape[1] < tiles:
        raise ValueError(f"selection {tuple(selection.kept.shape)} does not fit {rows} rows and {tiles} tiles")
    if not 0 <= mass_bound < 1:
        raise ValueError(f"mass_bound is {mass_bound}; expected 0 <= mass_bound < 1")
    select_kernel[(len(selection.kept),)](
        tile_lse, lse, lse if floor is None else floor, selection.kept, selection.kept_count, selection.spent,
        rows, tiles, first_tile, tiles if all_tiles is None else all_tiles, mass_bound,
        tile_lse.stride(0), selection.kept.stride(0),
        BLOCK_M=block_m, WIDTH=SELECT_WIDTH, HAS_FLOOR=floor is not None, num_warps=8,
    )  # fmt: skip


def accumulate(
    p: torch.Tensor,
    weight: torch.Tensor,
    selection: Selection,
    sums: torch.Tensor,
    config: ExpectedConfig,
    *,
    packed: bool,
    first_slot: int = 0,
    slots: int | None = None,
) -> None:
    """sums [N, H] float32 += p~ [N, columns] @ weight [V, H] over kept tiles first_slot ... first_slot + slots."""
    rows, size_h = sums.shape
    if not sums.is_contiguous() or p.stride(1) != 1:
        raise ValueError("sums must be contiguous, p contiguous along its columns")
    if p.dtype != weight.dtype:
        raise ValueError(f"p is {p.dtype} and weight {weight.dtype}; expected one dtype")
    accumulate_kernel[(triton.cdiv(size_h, config.block_u), triton.cdiv(rows, config.block_m))](
        p, weight, selection.kept, selection.kept_count, sums, rows, weight.shape[0], size_h,
        first_slot, selection.kept.shape[1] if slots is None else slots,
        p.stride(0), selection.kept.stride(0), weight.stride(0), weight.stride(1),
        BLOCK_M=config.block_m, BLOCK_V=config.block_v, BLOCK_U=config.block_u, BLOCK_K=config.block_k, PACKED=packed,
        num_warps=config.num_warps, num_stages=config.num_stages, **register_limit(config.registers),
    )  # fmt: skip


def expected(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    lse: torch.Tensor,
    row_max: torch.Tensor,
    tile_lse: torch.Tensor,
    mass_bound: float,
    config: ExpectedConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """U [N, H] float32 and how many tiles each block of rows kept [B] int32, after `vocab_stats(tile_stats=True)`.

    config.block_v must be the tile width of tile_lse [N, tiles].
    """
    rows, size_h = hidden.shape
    size_v = weight.shape[0]
    tiles = triton.cdiv(size_v, config.block_v)
    if tile_lse.shape != (rows, tiles):
        raise ValueError(f"tile_lse is {tuple(tile_lse.shape)}; expected {(rows, tiles)} for tiles of {config.block_v}")
    sums = torch.zeros(rows, size_h, dtype=torch.float32, device=hidden.device)
    selection = new_selection(rows, tiles, config.block_m, hidden.device)
    if rows == 0:
        return sums, selection.kept_count
    select(selection, tile_lse, lse, None, mass_bound, block_m=config.block_m)
    slots = min(config.slots, tiles)
    p = torch.empty(rows, slots * config.block_v, dtype=hidden.dtype, device=hidden.device)
    for first_slot in range(0, tiles, slots):
        probability_kernel[(len(selection.kept), slots)](
            hidden, weight, weight if bias is None else bias, row_max, selection.kept, selection.kept_count, p,
            rows, size_v, size_h, first_slot, hidden.stride(0), hidden.stride(1), weight.stride(0), weight.stride(1),
            selection.kept.stride(0), p.stride(0), scale, softcap or 1.0,
            BLOCK_M=config.block_m, BLOCK_V=config.block_v, BLOCK_H=config.block_h,
            EVEN_H=size_h % config.block_h == 0, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None,
            num_warps=config.num_warps, num_stages=config.num_stages, **register_limit(config.registers),
        )  # fmt: skip
        accumulate(p, weight, selection, sums, config, packed=True, first_slot=first_slot, slots=slots)
    return sums.mul_((scale * torch.exp(row_max - lse))[:, None]), selection.kept_count
