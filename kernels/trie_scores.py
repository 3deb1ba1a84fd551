"""Shared device code of attention over tries: rows of tensors, products between rows, scores, and who sees whom."""

import triton
import triton.language as tl

from .head_tile import add_product

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(at, count, stride, width, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
             WHOLE: tl.constexpr):  # fmt: skip
    """[BLOCK, BLOCK_D] from the row at `at` on; zeros from row `count` and element `width` on, unless WHOLE, EVEN_D."""
    row, element = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    place = at + row[:, None] * stride + element[None, :]
    if WHOLE and EVEN_D:
        return tl.load(place)
    inside = (row < count)[:, None] & (element < width)[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def keep_rows(at, values, count, stride, width, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    row, element = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (row < count)[:, None] & (element < width)[None, :]
    tl.store(at + row[:, None] * stride + element[None, :], values.to(at.dtype.element_ty), mask=inside)


@triton.jit
def row_products(
    a, b, a_at, b_at, a_count, b_count, stride_a, stride_b, width,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """a @ b.T; where BLOCK_K is less than BLOCK_D read once more, BLOCK_K elements at a time, which takes registers
    for as many only (products of float32 hold both operands whole)."""
    total = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    if BLOCK_K == BLOCK_D:
        total = add_product(a, tl.trans(b), total)
    else:
        for start in range(0, BLOCK_D, BLOCK_K):
            some_a = rows_of(a_at + start, a_count, stride_a, width - start, a.shape[0], BLOCK_K, EVEN_D, False)
            some_b = rows_of(b_at + start, b_count, stride_b, width - start, b.shape[0], BLOCK_K, EVEN_D, False)
            total = add_product(some_a, tl.trans(some_b), total)
    return total


@triton.jit
def scores(product, scale, cap, HAS_CAP: tl.constexpr):
    """In base 2, as `tl.exp2` and `lse` have it."""
    if HAS_CAP:
        score = (2.0 * tl.sigmoid(product * (2.0 * scale / cap)) - 1.0) * (cap * _LOG2E)  # tanh
    else:
        score = product * (scale * _LOG2E)
    return score


@triton.jit
def through_cap(grad, score, cap, HAS_CAP: tl.constexpr):
    """The gradient of a capped score, times the slope of the cap there: 1 - tanh^2."""
    if HAS_CAP:
        share = score * (1.0 / (cap * _LOG2E))
        grad *= 1.0 - share * share
    return grad


@triton.jit
def sees(row, position, key, until, key_position, window, HAS_WINDOW: tl.constexpr):
    """Which queries see which keys, one along each axis; a row of -1 sees none, a key until 0 is seen by none."""
    seen = (key <= row) & (row < until)
    if HAS_WINDOW:
        seen = seen & (position - key_position < window)
    return seen


@triton.jit
def seen_keys(score, row, position, first, until, positions, size_k, window, BLOCK_N: tl.constexpr,
               HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Scores of a block of queries and the keys from `first` on, -inf where they are not seen."""
    n = first + tl.arange(0, BLOCK_N)
    end = tl.load(until + n, mask=n < size_k, other=0)
    place = tl.load(positions + n, mask=n < size_k, other=0) if HAS_WINDOW else n
    seen = sees(row[:, None], position[:, None], n[None, :], end[None, :], place[None, :], window, HAS_WINDOW)
    return tl.where(seen, score, float("-inf"))
