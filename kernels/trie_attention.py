"""Attention over a packed trie, forward and backward, by tiles of scores in on-chip memory (FlashAttention's way).

    s_rk = scale q_r . k_k, soft-capped, where k <= r < until[k] (and position[r] - position[k] < window)
    o_r = sum_k p_rk v_k, p_rk = exp(s_rk - L_r), L_r = log sum_k exp s_rk
    dv_k = sum_r p_rk do_r, ds_rk = p_rk (do_r . v_k - do_r . o_r), dq_r = scale sum_k ds_rk k_k, dk_k likewise

Which tiles there are is decided on the host (`trie_tiles`); in whole ones no mask is read. Queries are blocks of rows
of the stream, whatever branches they are of, so short branches fill a tile together, and a key that several see is read
once for all of them, in place.
Per tile and head 4 B_M B_N D FLOPs forward, 14 backward (scores are computed twice: once for the gradients of queries,
once for those of keys). Sums are float32, float32 inputs are multiplied as such (no TF32); probabilities and their
gradients are rounded to the inputs' dtype before the second product. No atomics: every run gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .head_tile import add_product, register_limit
from .trie_scores import keep_rows, row_products, rows_of, scores, seen_keys, sees, through_cap
from .trie_tiles import TrieTiles

WIDEST = 256  # elements of a head
ADD_ROWS = 16  # that a program of trie_add_up_kernel takes


class Launch(NamedTuple):
    """Tiles of block_m queries by block_n keys, products over block_k elements at a time (0: over all).

    `registers` that a thread may take, see `head_tile.register_limit`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_k: int = 0
    registers: int = 255

    @property
    def tile(self) -> int:
        """Pairs of queries and keys in a tile."""
        return self.block_m * self.block_n

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **register_limit(self.registers)}


class TrieConfig(NamedTuple):
    """How the three kernels are launched for one width and dtype."""

    forward: Launch
    query_grad: Launch
    key_grad: Launch


@triton.jit
def _forward_tile(
    q, q_at, q_count, stride_qn, row, position, highest, total, acc, first, key, value, until, positions, stride_kn,
    stride_vn, size_k, width, scale, cap, window,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and output of a block of queries after one tile of keys more."""
    k_at, v_at = key + first.to(tl.int64) * stride_kn, value + first.to(tl.int64) * stride_vn
    count = size_k - first
    k = rows_of(k_at, count, stride_kn, width, BLOCK_N, BLOCK_D, EVEN_D, WHOLE)
    product = row_products(q, k, q_at, k_at, q_count, count, stride_qn, stride_kn, width, BLOCK_D, BLOCK_K, EVEN_D)
    score = scores(product, scale, cap, HAS_CAP)
    if not WHOLE:
        score = seen_keys(score, row, position, first, until, positions, size_k, window, BLOCK_N, HAS_WINDOW)
    higher = tl.maximum(highest, tl.max(score, axis=1))
    base = higher
    if not WHOLE:
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
    probability = tl.exp2(score - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(probability, axis=1)
    v = rows_of(v_at, count, stride_vn, width, BLOCK_N, BLOCK_D, EVEN_D, WHOLE)
    acc = add_product(probability.to(v.dtype), v, acc * shrink[:, None])
    return higher, total, acc


@triton.jit
def trie_forward_kernel(
    query, key, value, out, lse, rows, positions, until, blocks, tiles,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_oh, stride_on,
    size_q, size_k, width, groups, scale, cap, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """out [size_q, heads, width] and lse [heads, size_q] (base 2); one program per head and block of queries."""
    head = tl.program_id(0).to(tl.int64)
    blocks += tl.program_id(1) * 5
    low = tl.load(blocks)
    count = tl.load(blocks + 1) - low
    m = tl.arange(0, BLOCK_M)
    row = tl.load(rows + low + m, mask=m < count, other=-1)
    position = tl.load(positions + row, mask=row >= 0, other=0) if HAS_WINDOW else row
    q_at = query + head * stride_qh + low.to(tl.int64) * stride_qn
    q = rows_of(q_at, count, stride_qn, width, BLOCK_M, BLOCK_D, EVEN_D, False)
    key += head // groups * stride_kh
    value += head // groups * stride_vh
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, middle, end = tl.load(blocks + 2), tl.load(blocks + 3), tl.load(blocks + 4)
    for tile in range(begin, middle):
        highest, total, acc = _forward_tile(
            q, q_at, count, stride_qn, row, position, highest, total, acc, tl.load(tiles + tile), key, value, until,
            positions, stride_kn, stride_vn, size_k, width, scale, cap, window,
            BLOCK_N, BLOCK_D, BLOCK_K, EVEN_D, HAS_CAP, HAS_WINDOW, True,
        )  # fmt: skip
    for tile in range(middle, end):
        highest, total, acc = _forward_tile(
            q, q_at, count, stride_qn, row, position, highest, total, acc, tl.load(tiles + tile), key, value, until,
            positions, stride_kn, stride_vn, size_k, width, scale, cap, window,
            BLOCK_N, BLOCK_D, BLOCK_K, EVEN_D, HAS_CAP, HAS_WINDOW, False,
        )  # fmt: skip
    total = tl.where(row >= 0, total, 1.0)
    out += head * stride_oh + low.to(tl.int64) * stride_on
    keep_rows(out, acc / total[:, None], count, stride_on, width, BLOCK_M, BLOCK_D)
    tl.store(lse + head * size_q + low + m, highest + tl.log2(total), mask=m < count)


@triton.jit
def _query_grad_tile(
    q, q_at, upstream, g_at, q_count, stride_qn, stride_gn, row, position, lse, delta, acc, first, key, value, until,
    positions, stride_kn, stride_vn, size_k, width, scale, cap, window,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    k_at, v_at = key + first.to(tl.int64) * stride_kn, value + first.to(tl.int64) * stride_vn
    count = size_k - first
    k = rows_of(k_at, count, stride_kn, width, BLOCK_N, BLOCK_D, EVEN_D, WHOLE)
    v = rows_of(v_at, count, stride_vn, width, BLOCK_N, BLOCK_D, EVEN_D, WHOLE)
    product = row_products(q, k, q_at, k_at, q_count, count, stride_qn, stride_kn, width, BLOCK_D, BLOCK_K, EVEN_D)
    capped = scores(product, scale, cap, HAS_CAP)
    score = capped
    if not WHOLE:
        score = seen_keys(score, row, position, first, until, positions, size_k, window, BLOCK_N, HAS_WINDOW)
    probability = tl.exp2(score - lse[:, None])
    product = row_products(
        upstream, v, g_at, v_at, q_count, count, stride_gn, stride_vn, width, BLOCK_D, BLOCK_K, EVEN_D
    )
    grad = through_cap(probability * (product - delta[:, None]), capped, cap, HAS_CAP)
    return add_product(grad.to(k.dtype), k, acc)


@triton.jit
def trie_query_grad_kernel(
    query, key, value, out, grad_out, lse, delta, query_grad, rows, positions, until, blocks, tiles,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_oh, stride_on, stride_gh, stride_gn,
    stride_dh, stride_dn, size_q, size_k, width, groups, scale, cap, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """query_grad, and delta [heads, size_q] = do . o, which the gradients of keys need; programs as in the forward."""
    head = tl.program_id(0).to(tl.int64)
    blocks += tl.program_id(1) * 5
    low = tl.load(blocks)
    count = tl.load(blocks + 1) - low
    m = tl.arange(0, BLOCK_M)
    row = tl.load(rows + low + m, mask=m < count, other=-1)
    position = tl.load(positions + row, mask=row >= 0, other=0) if HAS_WINDOW else row
    g_at = grad_out + head * stride_gh + low.to(tl.int64) * stride_gn
    upstream = rows_of(g_at, count, stride_gn, width, BLOCK_M, BLOCK_D, EVEN_D, False)
    o_at = out + head * stride_oh + low.to(tl.int64) * stride_on
    o = rows_of(o_at, count, stride_on, width, BLOCK_M, BLOCK_D, EVEN_D, False)
    own = tl.sum(upstream.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta + head * size_q + low + m, own, mask=m < count)
    log_sum = tl.load(lse + head * size_q + low + m, mask=m < count, other=0.0)
    q_at = query + head * stride_qh + low.to(tl.int64) * stride_qn
    q = rows_of(q_at, count, stride_qn, width, BLOCK_M, BLOCK_D, EVEN_D, False)
    key += head // groups * stride_kh
    value += head // groups * stride_vh
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, middle, end = tl.load(blocks + 2), tl.load(blocks + 3), tl.load(blocks + 4)
    for tile in range(begin, middle):
        acc = _query_grad_tile(
            q, q_at, upstream, g_at, count, stride_qn, stride_gn, row, position, log_sum, own, acc,
            tl.load(tiles + tile), key, value, until, positions, stride_kn, stride_vn, size_k, width, scale, cap,
            window, BLOCK_N, BLOCK_D, BLOCK_K, EVEN_D, HAS_CAP, HAS_WINDOW, True,
        )  # fmt: skip
    for tile in range(middle, end):
        acc = _query_grad_tile(
            q, q_at, upstream, g_at, count, stride_qn, stride_gn, row, position, log_sum, own, acc,
            tl.load(tiles + tile), key, value, until, positions, stride_kn, stride_vn, size_k, width, scale, cap,
            window, BLOCK_N, BLOCK_D, BLOCK_K, EVEN_D, HAS_CAP, HAS_WINDOW, False,
        )  # fmt: skip
    query_grad += head * stride_dh + low.to(tl.int64) * stride_dn
    keep_rows(query_grad, acc * scale, count, stride_dn, width, BLOCK_M, BLOCK_D)


@triton.jit
def _key_grad_tile(
    k, k_at, v, v_at, k_count, stride_kn, stride_vn, n, end, place, key_acc, value_acc, first, query, grad_out, lse,
    delta, rows, positions, stride_qn, stride_gn, size_q, width, scale, cap, window,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores with keys along the first axis."""
    q_at, g_at = query + first.to(tl.int64) * stride_qn, grad_out + first.to(tl.int64) * stride_gn
    count = size_q - first
    q = rows_of(q_at, count, stride_qn, width, BLOCK_M, BLOCK_D, EVEN_D, WHOLE)
    upstream = rows_of(g_at, count, stride_gn, width, BLOCK_M, BLOCK_D, EVEN_D, WHOLE)
    m = tl.arange(0, BLOCK_M)
    if WHOLE:
        log_sum, own = tl.load(lse + first + m), tl.load(delta + first + m)
    else:
        log_sum = tl.load(lse + first + m, mask=m < count, other=0.0)
        own = tl.load(delta + first + m, mask=m < count, other=0.0)
    product = row_products(k, q, k_at, q_at, k_count, count, stride_kn, stride_qn, width, BLOCK_D, BLOCK_K, EVEN_D)
    capped = scores(product, scale, cap, HAS_CAP)
    score = capped
    if not WHOLE:
        row = tl.load(rows + first + m, mask=m < count, other=-1)
        position = tl.load(positions + row, mask=row >= 0, other=0) if HAS_WINDOW else row
        seen = sees(row[None, :], position[None, :], n[:, None], end[:, None], place[:, None], window, HAS_WINDOW)
        score = tl.where(seen, score, float("-inf"))
    probability = tl.exp2(score - log_sum[None, :])
    value_acc = add_product(probability.to(upstream.dtype), upstream, value_acc)
    product = row_products(
        v, upstream, v_at, g_at, k_count, count, stride_vn, stride_gn, width, BLOCK_D, BLOCK_K, EVEN_D
    )
    grad = through_cap(probability * (product - own[None, :]), capped, cap, HAS_CAP)
    key_acc = add_product(grad.to(q.dtype), q, key_acc)
    return key_acc, value_acc


@triton.jit
def trie_key_grad_kernel(
    query, key, value, grad_out, lse, delta, key_grad, value_grad, sums, rows, positions, until, blocks, tiles,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_gh, stride_gn, stride_dh, stride_dn,
    size_q, size_k, width, groups, scale, cap, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """key_grad and value_grad (same strides), or their parts in sums [places, kv_heads, 2, BLOCK_N, BLOCK_D].

    One program per head of keys and part of a block of keys; it takes its tiles for all query heads of the group.
    """
    head = tl.program_id(0).to(tl.int64)
    blocks += tl.program_id(1) * 6
    low = tl.load(blocks)
    k_count = tl.load(blocks + 1) - low
    n = low + tl.arange(0, BLOCK_N)
    inside = tl.arange(0, BLOCK_N) < k_count
    end = tl.load(until + n, mask=inside, other=0)
    place = tl.load(positions + n, mask=inside, other=0) if HAS_WINDOW else n
    k_at = key + head * stride_kh + low.to(tl.int64) * stride_kn
    v_at = value + head * stride_vh + low.to(tl.int64) * stride_vn
    k = rows_of(k_at, k_count, stride_kn, width, BLOCK_N, BLOCK_D, EVEN_D, False)
    v = rows_of(v_at, k_count, stride_vn, width, BLOCK_N, BLOCK_D, EVEN_D, False)
    key_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin, middle, stop = tl.load(blocks + 2), tl.load(blocks + 3), tl.load(blocks + 4)
    count = middle - begin
    for step in range(0, count * groups):
        h = head * groups + step // count
        key_acc, value_acc = _key_grad_tile(
            k, k_at, v, v_at, k_count, stride_kn, stride_vn, n, end, place, key_acc, value_acc,
            tl.load(tiles + begin + step % count), query + h * stride_qh, grad_out + h * stride_gh, lse + h * size_q,
            delta + h * size_q, rows, positions, stride_qn, stride_gn, size_q, width, scale, cap, window,
            BLOCK_M, BLOCK_D, BLOCK_K, EVEN_D, HAS_CAP, HAS_WINDOW, True,
        )  # fmt: skip
    count = stop - middle
    for step in range(0, count * groups):
        h = head * groups + step // count
        key_acc, value_acc = _key_grad_tile(
            k, k_at, v, v_at, k_count, stride_kn, stride_vn, n, end, place, key_acc, value_acc,
            tl.load(tiles + middle + step % count), query + h * stride_qh, grad_out + h * stride_gh, lse + h * size_q,
            delta + h * size_q, rows, positions, stride_qn, stride_gn, size_q, width, scale, cap, window,
            BLOCK_M, BLOCK_D, BLOCK_K, EVEN_D, HAS_CAP, HAS_WINDOW, False,
        )  # fmt: skip
    key_acc *= scale
    kept = tl.load(blocks + 5)
    if kept < 0:
        at = head * stride_dh + low.to(tl.int64) * stride_dn
        keep_rows(key_grad + at, key_acc, k_count, stride_dn, width, BLOCK_N, BLOCK_D)
        keep_rows(value_grad + at, value_acc, k_count, stride_dn, width, BLOCK_N, BLOCK_D)
    else:
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        sums += (head + kept * tl.num_programs(0)) * (2 * BLOCK_N * BLOCK_D)
        tl.store(sums + cell, key_acc)
        tl.store(sums + BLOCK_N * BLOCK_D + cell, value_acc)


@triton.jit
def trie_add_up_kernel(
    sums, key_grad, value_grad, shared, stride_dh, stride_dn, width,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the blocks of keys that several programs shared: their parts, in order. Programs take ROWS rows."""
    head = tl.program_id(0).to(tl.int64)
    shared += tl.program_id(1) * 4
    begin = tl.program_id(2) * ROWS
    low = tl.load(shared) + begin
    count = tl.load(shared + 1) - low
    cell = (begin + tl.arange(0, ROWS))[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    key_acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    value_acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for kept in range(tl.load(shared + 2), tl.load(shared + 3)):
        part = sums + (head + kept * tl.num_programs(0)) * (2 * BLOCK_N * BLOCK_D)
        key_acc += tl.load(part + cell)
        value_acc += tl.load(part + BLOCK_N * BLOCK_D + cell)
    at = head * stride_dh + low.to(tl.int64) * stride_dn
    keep_rows(key_grad + at, key_acc, count, stride_dn, width, ROWS, BLOCK_D)
    keep_rows(value_grad + at, value_acc, count, stride_dn, width, ROWS, BLOCK_D)


def trie_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trie: TrieTiles,
    scale: float,
    window: int | None,
    softcap: float | None,
    config: TrieConfig,
) -> torch.Tensor:
    """Attention of the trie's queries, differentiable in query, key and value.

    Args:
        query: [U, heads, D] float16, bfloat16 or float32, one row for each query of the trie; D <= 256.
        key, value: [T, kv_heads, D] of the same dtype; heads are a multiple of kv_heads.
        scale: factor of the scores.
        window: a row sees positions p with 0 <= its own - p < window; None: all.
        softcap: scores become softcap * tanh(score / softcap); None: they do not.
        config: from `configs.trie_config`.

    Returns:
        [U, heads, D], contiguous.
    """
    _check(query, key, value, trie)
    return _TrieAttention.apply(query, key, value, trie, scale, window, softcap, config)


class _TrieAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        trie: TrieTiles,
        scale: float,
        window: int | None,
        softcap: float | None,
        config: TrieConfig,
    ) -> torch.Tensor:
        query, key, value = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key, value))
        rows, heads, _ = query.shape
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(heads, rows, dtype=torch.float32, device=query.device)
        ctx.trie, ctx.config, ctx.numbers = trie, config, (scale, window, softcap)
        ctx.save_for_backward(query, key, value, out, lse)
        launch = config.forward
        blocks, tiles = trie.query_tiles(launch.block_m, launch.block_n, window)
        trie_forward_kernel[(heads, len(blocks))](
            query, key, value, out, lse, trie.rows, trie.positions, trie.until, blocks, tiles,
            *_strides(query, key, value, out), *_sizes(query, key), scale, softcap or 1.0, window or 0,
            **constants(launch, query.shape[2], window is not None, softcap is not None),
        )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        trie, (scale, window, softcap) = ctx.trie, ctx.numbers
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        query_grad, key_grad, value_grad = (
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value)
        )
        delta = torch.empty_like(lse)
        numbers = *_sizes(query, key), scale, softcap or 1.0, window or 0
        launch = ctx.config.query_grad
        blocks, tiles = trie.query_tiles(launch.block_m, launch.block_n, window)
        trie_query_grad_kernel[(query.shape[1], len(blocks))](
            query, key, value, out, grad, lse, delta, query_grad, trie.rows, trie.positions, trie.until, blocks, tiles,
            *_strides(query, key, value, out, grad, query_grad), *numbers,
            **constants(launch, query.shape[2], window is not None, softcap is not None),
        )  # fmt: skip
        launch = ctx.config.key_grad
        compiled = constants(launch, query.shape[2], window is not None, softcap is not None)
        blocks, tiles, shared, places = trie.key_tiles(launch.block_n, launch.block_m, window)
        kv_heads, block_d = key.shape[1], compiled["BLOCK_D"]
        sums = lse.new_empty(max(places, 1), kv_heads, 2, launch.block_n, block_d)
        trie_key_grad_kernel[(kv_heads, len(blocks))](
            query, key, value, grad, lse, delta, key_grad, value_grad, sums, trie.rows, trie.positions, trie.until,
            blocks, tiles, *_strides(query, key, value, grad, key_grad), *numbers, **compiled,
        )  # fmt: skip
        if places:
            trie_add_up_kernel[(kv_heads, len(shared), launch.block_n // ADD_ROWS)](
                sums, key_grad, value_grad, shared, *_strides(key_grad), key.shape[2],
                BLOCK_N=launch.block_n, BLOCK_D=block_d, ROWS=ADD_ROWS, num_warps=4,
            )  # fmt: skip
        return query_grad, key_grad, value_grad, None, None, None, None, None


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of heads and rows."""
    return [stride for tensor in tensors for stride in (tensor.stride(1), tensor.stride(0))]


def _sizes(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int, int]:
    """size_q, size_k, width, groups."""
    return len(query), len(key), query.shape[2], query.shape[1] // key.shape[1]


def constants(launch: Launch, width: int, windowed: bool, capped: bool) -> dict[str, Any]:
    """What a kernel is compiled for, and how it is launched."""
    block_d = max(16, triton.next_power_of_2(width))
    return {
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_D": block_d,
        "BLOCK_K": min(launch.block_k or block_d, block_d), "EVEN_D": block_d == width, "HAS_CAP": capped,
        "HAS_WINDOW": windowed, **launch.options,
    }  # fmt: skip


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, trie: TrieTiles) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not (query.dim() == key.dim() == 3 and key.shape == value.shape and query.shape[2] == key.shape[2]):
        raise ValueError(f"{shapes}; expected [U, heads, D] and twice [T, kv_heads, D]")
    if query.shape[1] % key.shape[1] or query.shape[2] > WIDEST:
        raise ValueError(f"{shapes}; expected a multiple of the heads of keys, and heads of {WIDEST} at most")
    if (len(query), len(key)) != (len(trie.rows), len(trie.until)):
        raise ValueError(f"{shapes}, of a trie of {len(trie.rows)} queries and {len(trie.until)} rows")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query {query.dtype}, key {key.dtype}, value {value.dtype}; expected one dtype")
