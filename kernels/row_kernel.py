"""Row kernels of the tiled engine: what happens to one vocabulary tile of products between two library GEMMs.

The tile `products` [N, T] float32 = hidden @ W_t.T lies in one buffer that every tile of the vocabulary reuses.
`advance` (one program per row, all T columns in registers):

    z = logits(products),  m' = max(m, max z),  s' = s exp(m - m') + sum exp(z - m')           running statistics
    U_n *= exp(m - m')                                                only where the maximum moved
    cross_p = cross_p exp(m - m') + sum_v p~_av (z_av - z_bv) or p~_av (-z_bv)              for pairs with first = n
    p~ = exp(z - m') * slope          in half, over the tile's own bytes where no pair needs it again
    optional per pair: p~_a slope_b and p~_a (z_a - z_b) slope_a, the columns of `mixed` and `spread`
    optional: log-sum-exp of each SUB columns, for skipping

`differentiate` recomputes a tile for a trainable head: dL/d(product) from the final statistics, in half.
p~ at a row's maximum is exactly 1 and is not rounded: U - w_c keeps float32 accuracy where p_c is close to 1.

FLOPs: ~10 N T. Bytes per tile: 4 N T read, 2 N T written (+ 4 P T read per pair), from L2 while the tile fits there.
Deterministic: one program per row, its pairs in ascending order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .head_tile import LOWEST, slope_of, to_logits

MAX_COLUMNS = 8192  # of a tile: one row of it, and its pair's, must fit into a program's registers
GRAD_COLUMNS = 2048  # of a tile in `differentiate`, which holds three rows


class PairTable(NamedTuple):
    """Pairs by row: those of row n are order[bounds[n] : bounds[n + 1]]; other [P] is the row at the other end."""

    order: torch.Tensor
    bounds: torch.Tensor
    other: torch.Tensor


def pair_table(row: torch.Tensor, other: torch.Tensor, rows: int) -> PairTable:
    """Groups pairs by `row` [P] (negative: no pair), without synchronisation."""
    ordered, order = torch.sort(row, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(rows + 1, device=row.device, dtype=row.dtype))
    return PairTable(order, bounds, other)


@triton.jit
def _rescale(sums, row, size, factor, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = sums + row * size + column
        tl.store(at, tl.load(at, mask=column < size, other=0.0) * factor, mask=column < size)


@triton.jit
def advance_kernel(
    products, p_out, bias, run_max, run_sum, run_lse, sums, tile_lse, order, bounds, second, cross, mixed, spread,
    mixed_out, spread_out, first_column, columns, size_h,
    stride_zn, stride_pn, stride_qn, stride_tn, scale, cap,
    BLOCK: tl.constexpr, BLOCK_U: tl.constexpr, SUB: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    EXPECTED: tl.constexpr, TILE_STATS: tl.constexpr, PAIRS: tl.constexpr, ENTROPY: tl.constexpr,
    MIXED: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """One row of the tile: its statistics, the pairs it is the first of, and p~ where its products were."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < columns
    z = tl.load(products + row * stride_zn + lane, mask=inside, other=0.0)
    z = to_logits(z, bias, first_column + lane, inside, scale, cap, HAS_BIAS, HAS_CAP)

    # Running statistics.
    old_max = tl.load(run_max + row)
    old_sum = tl.load(run_sum + row)
    new_max = tl.maximum(old_max, tl.max(tl.where(inside, z, float("-inf")), axis=0))
    decay = tl.exp(old_max - new_max)
    p = tl.where(inside, tl.exp(z - new_max), 0.0)
    new_sum = old_sum * decay + tl.sum(p, axis=0)
    tl.store(run_max + row, new_max)
    tl.store(run_sum + row, new_sum)
    if TILE_STATS:
        mass = tl.sum(tl.reshape(p, (BLOCK // SUB, SUB)), axis=1)
        part = tl.arange(0, BLOCK // SUB)
        tl.store(tile_lse + row * stride_tn + part, new_max + tl.log(mass), mask=part * SUB < columns)
        tl.store(run_lse + row, new_max + tl.log(new_sum))
    # Most rows meet their maximum early: rescaling H sums is skipped from then on, and in the first tile, where they
    # are zeros.
    moved = (decay != 1.0) & (old_sum > 0)
    if EXPECTED:  # noqa: SIM102  (a compile-time condition around a run-time one)
        if moved:
            _rescale(sums, row, size_h, decay, BLOCK_U)

    # Pairs this row is the first of. Sums of a pair are relative to this row's maximum, so they decay with its own; the
    # other row is needed for its logits alone, which are made again from its products.
    if PAIRS:
        for entry in range(tl.load(bounds + row), tl.load(bounds + row + 1)):
            pair = tl.load(order + entry)
            other = tl.load(second + pair)
            z_b = tl.load(products + other * stride_zn + lane, mask=inside, other=0.0)
            z_b = to_logits(z_b, bias, first_column + lane, inside, scale, cap, HAS_BIAS, HAS_CAP)
            difference = z - z_b if ENTROPY else -z_b
            moment = tl.where(p > 0, p * difference, 0.0)
            tl.store(cross + pair, tl.load(cross + pair) * decay + tl.sum(moment, axis=0))
            if MIXED:
                value = p * slope_of(z_b, cap)
                tl.store(mixed_out + pair * stride_qn + lane, value.to(mixed_out.dtype.element_ty), mask=inside)
                if moved:
                    _rescale(mixed, pair, size_h, decay, BLOCK_U)
            if SPREAD:
                value = moment * slope_of(z, cap) if HAS_CAP else moment
                tl.store(spread_out + pair * stride_qn + lane, value.to(spread_out.dtype.element_ty), mask=inside)
                if moved:
                    _rescale(spread, pair, size_h, decay, BLOCK_U)

    if EXPECTED:
        if HAS_CAP:
            p *= slope_of(z, cap)
        tl.debug_barrier()  # every column has been read: p~ may take the place of the products
        tl.store(p_out + row * stride_pn + lane, p.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def differentiate_kernel(
    products, grad_out, bias, lse, grad_lse, cross, grad_first, grad_second,
    order_first, bounds_first, second, order_second, bounds_second, first,
    first_column, columns, stride_zn, stride_gn, scale, cap, factor,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PAIRS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One row of the tile: its gradient from its own loss, as the first row of pairs, and as the second."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < columns
    z = tl.load(products + row * stride_zn + lane, mask=inside, other=0.0)
    z = to_logits(z, bias, first_column + lane, inside, scale, cap, HAS_BIAS, HAS_CAP)
    p = tl.exp(z - tl.load(lse + row))
    grad = p * tl.load(grad_lse + row)
    if PAIRS:
        for entry in range(tl.load(bounds_first + row), tl.load(bounds_first + row + 1)):
            pair = tl.load(order_first + entry)
            z_b = tl.load(products + tl.load(second + pair) * stride_zn + lane, mask=inside, other=0.0)
            z_b = to_logits(z_b, bias, first_column + lane, inside, scale, cap, HAS_BIAS, HAS_CAP)
            difference = 1.0 + z - z_b if ENTROPY else -z_b
            moment = p * (difference - tl.load(cross + pair))
            grad += tl.where(p > 0, moment, 0.0) * tl.load(grad_first + pair)
        for entry in range(tl.load(bounds_second + row), tl.load(bounds_second + row + 1)):
            pair = tl.load(order_second + entry)
            row_a = tl.load(first + pair)
            z_a = tl.load(products + row_a * stride_zn + lane, mask=inside, other=0.0)
            z_a = to_logits(z_a, bias, first_column + lane, inside, scale, cap, HAS_BIAS, HAS_CAP)
            grad -= tl.exp(z_a - tl.load(lse + row_a)) * tl.load(grad_second + pair)
    grad *= tl.load(factor)
    if HAS_CAP:
        grad *= slope_of(z, cap)
    tl.debug_barrier()  # every column has been read: the gradient may take the place of the products
    tl.store(grad_out + row * stride_gn + lane, grad.to(grad_out.dtype.element_ty), mask=inside)


class Running(NamedTuple):
    """State that `advance` carries from tile to tile. float32; tensors that are not wanted are None."""

    row_max: torch.Tensor  # [N]
    row_sum: torch.Tensor  # [N], relative to row_max
    row_lse: torch.Tensor | None  # [N], as far as seen (with tile statistics)
    sums: torch.Tensor | None  # [N, H] sum_v p~ W_v, filled by the caller's GEMM
    cross: torch.Tensor | None  # [P], relative to row_max of the first row
    mixed: torch.Tensor | None  # [P, H]
    spread: torch.Tensor | None  # [P, H]


def new_running(
    rows: int, size_h: int, pairs: int | None, device: torch.device, *,
    expected: bool, tile_stats: bool, mixed: bool, spread: bool,
) -> Running:  # fmt: skip
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    return Running(
        torch.full((rows,), LOWEST, dtype=torch.float32, device=device),
        zeros(rows),
        zeros(rows) if tile_stats else None,
        zeros(rows, size_h) if expected else None,
        None if pairs is None else zeros(pairs),
        zeros(pairs, size_h) if mixed else None,
        zeros(pairs, size_h) if spread else None,
    )


def advance(
    products: torch.Tensor,
    p_out: torch.Tensor | None,
    running: Running,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    first_column: int,
    *,
    pairs: PairTable | None,
    entropy: bool,
    tile_lse: torch.Tensor | None = None,
    sub: int = 128,
    mixed_out: torch.Tensor | None = None,
    spread_out: torch.Tensor | None = None,
) -> None:
    """Takes tile `products` [N, T] float32 (columns first_column ... of the vocabulary) into `running`.

    p_out [N, T] half: where p~ goes, the bytes of `products` or, with pairs, elsewhere; mixed_out, spread_out [P, T];
    tile_lse [N, cdiv(T, sub)]: log-sum-exp of each `sub` columns.
    """
    rows, columns = products.shape
    block = max(triton.next_power_of_2(columns), sub)
    if block > MAX_COLUMNS:
        raise ValueError(f"a tile of {columns} columns; expected at most {MAX_COLUMNS}")
    if pairs is not None and p_out is not None and p_out.data_ptr() == products.data_ptr():
        raise ValueError("p_out must not share memory with products when there are pairs")
    held = [out for out in (mixed_out, spread_out) if out is not None]
    unused = running.row_max
    advance_kernel[(rows,)](
        products, products if p_out is None else p_out, products if bias is None else bias,
        running.row_max, running.row_sum, _or(running.row_lse, unused), _or(running.sums, unused),
        _or(tile_lse, unused),
        *((unused, unused, unused) if pairs is None else pairs),
        _or(running.cross, unused), _or(running.mixed, unused), _or(running.spread, unused),
        _or(mixed_out, unused), _or(spread_out, unused),
        first_column, columns, 0 if running.sums is None else running.sums.shape[1],
        products.stride(0), 0 if p_out is None else p_out.stride(0), held[0].stride(0) if held else 0,
        0 if tile_lse is None else tile_lse.stride(0), scale, softcap or 1.0,
        BLOCK=block, BLOCK_U=1024, SUB=sub, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None,
        EXPECTED=p_out is not None, TILE_STATS=tile_lse is not None, PAIRS=pairs is not None, ENTROPY=entropy,
        MIXED=mixed_out is not None, SPREAD=spread_out is not None, num_warps=num_warps(block),
    )  # fmt: skip


def differentiate(
    products: torch.Tensor,
    grad_out: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    first_column: int,
    lse: torch.Tensor,
    grad_lse: torch.Tensor,
    factor: torch.Tensor,
    *,
    by_first: PairTable | None,
    by_second: PairTable | None,
    cross: torch.Tensor | None,
    grad_first: torch.Tensor | None,
    grad_second: torch.Tensor | None,
    entropy: bool,
) -> None:
    """grad_out [N, T] = factor * dL/d(scaled product) of the tile `products` [N, T]; factor: one float32 on the device.

    dL/dz_nv = grad_lse_n p_nv + sum_{pairs, a = n} grad_first p_av (1 + z_av - z_bv - cross)
               - sum_{pairs, b = n} grad_second p_av            (entropy=False: -z_bv - cross in the bracket)
    """
    rows, columns = products.shape
    block = triton.next_power_of_2(columns)
    if block > GRAD_COLUMNS:
        raise ValueError(f"a tile of {columns} columns; expected at most {GRAD_COLUMNS}")
    if by_first is not None and grad_out.data_ptr() == products.data_ptr():
        raise ValueError("grad_out must not share memory with products when there are pairs")
    unused = (lse, lse, lse)
    differentiate_kernel[(rows,)](
        products, grad_out, products if bias is None else bias, lse, grad_lse,
        _or(cross, lse), _or(grad_first, lse), _or(grad_second, lse),
        *(unused if by_first is None else by_first), *(unused if by_second is None else by_second),
        first_column, columns, products.stride(0), grad_out.stride(0), scale, softcap or 1.0, factor,
        BLOCK=block, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, PAIRS=by_first is not None,
        ENTROPY=entropy, num_warps=8,
    )  # fmt: skip


def num_warps(block: int) -> int:
    """Warps for a row of `block` columns: 16 columns per thread and matrix."""
    return max(block // 512, 4)


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if tensor is None else tensor
