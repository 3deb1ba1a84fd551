"""Shared device code of the head kernels: how products become logits, and how one tile of them is made.

z = softcap(scale * (hidden @ weight.T + bias)), softcap(x) = cap * tanh(x / cap); slope = dz / d(scale * product)
= 1 - (z / cap)^2. Products of half-precision inputs are exact in float32 accumulators; float32 inputs use "ieee"
products (no TF32). Offsets are int64: V * H and N * V exceed 2^31.
"""

import torch
import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = -3.0e38  # stands for "no logit yet"; finite, so that differences of two of them are 0 and not NaN


def register_limit(registers: int) -> dict[str, int]:
    """The launch option that lets a thread take up to `registers`.

    Without one, ptxas of CUDA 12.8 (Triton 3.6) spills a few bytes where that lets one more block run side by side.
    AMD's compiler has no such option.
    """
    return {} if torch.version.hip else {"maxnreg": registers}


@triton.jit
def to_logits(product, bias, columns, column_mask, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of a [.., T] tile of products; bias is read at `columns` [T]."""
    z = product
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)
    z *= scale
    if HAS_CAP:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
    return z


@triton.jit
def slope_of(z, cap):
    """1 - (z / cap)^2, the derivative of the soft-cap at logits z."""
    capped = z / cap
    return 1.0 - capped * capped


@triton.jit
def add_product(a, b, total):
    """total + a @ b in float32."""
    if _INTERPRETED:  # NumPy has no bfloat16; widening is exact
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def product_tile(
    hidden_rows, row_mask, weight_rows, column_mask, size_h, stride_hk, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """hidden[rows] @ weight[columns].T as float32 [BLOCK_M, BLOCK_V]; pointers to the first element of each row."""
    k = tl.arange(0, BLOCK_H).to(tl.int64)
    a_ptr = hidden_rows[:, None] + k[None, :] * stride_hk
    w_ptr = weight_rows[None, :] + k[:, None] * stride_wk
    product = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, size_h, BLOCK_H):
        if EVEN_H:
            a = tl.load(a_ptr, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptr, mask=column_mask[None, :], other=0.0)
        else:
            inside = k < size_h - start
            a = tl.load(a_ptr, mask=row_mask[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptr, mask=column_mask[None, :] & inside[:, None], other=0.0)
        product = add_product(a, w, product)
        a_ptr += BLOCK_H * stride_hk
        w_ptr += BLOCK_H * stride_wk
    return product
