"""What attention over a trie should take on a device: FlashAttention over gathered keys, or our kernels in place.

FlashAttention's variable-length call is faster per pair, but takes blocks of 128 queries of one sequence, however short
it is, and keys and values of everything above a sequence are copied for it and their gradients added up again. Our
kernels (`trie_attention`) copy nothing and fill a block with rows of whatever branches lie side by side.

    seconds = FLOPs of the pairs computed / FLOP/s reached + bytes copied / bandwidth        forward and backward

`RATES` are assumptions until `python -m bench.bench_attention` has been run on the device (it prints a line of the
table; `bash bench/device.sh` runs it): the vendors' dense bf16 peak and bandwidth, times the share that published
measurements reach of the peak on long sequences: forward, FlashAttention-2 .55 on Ampere and .35 on Hopper, Triton .4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FLASH_QUERIES, FLASH_KEYS = 128, 64  # a tile of FlashAttention-2 at widths up to 128
FLOPS_FORWARD, FLOPS_BACKWARD = 4, 10  # per pair, head and element: two products of 2, five of 2
OURS_QUERY_GRAD, OURS_KEY_GRAD = 6, 8  # our backward in two kernels; both compute the scores


class Rates(NamedTuple):
    """FLOP/s on tiles as they are computed, masked pairs included, and bytes/s of copies."""

    flash_forward: float
    flash_backward: float
    forward: float
    backward: float
    bandwidth: float


class Heads(NamedTuple):
    heads: int
    kv_heads: int
    width: int
    element_size: int


def _assumed(peak: float, bandwidth: float, shares: tuple[float, float, float, float]) -> Rates:
    """From TFLOP/s and TB/s."""
    return Rates(*(share * peak * 1e12 for share in shares), 0.8 * bandwidth * 1e12)


_AMPERE = (0.55, 0.5, 0.45, 0.35)  # shares of the peak: FlashAttention forward, backward; ours forward, backward
_HOPPER = (0.35, 0.3, 0.4, 0.3)  # FlashAttention-2, which uses no wgmma
RATES = {
    "sm80": _assumed(312, 2.0, _AMPERE),  # A100
    "sm86": _assumed(125, 0.6, _AMPERE),  # A10
    "sm89": _assumed(362, 0.86, _AMPERE),  # L40S
    "sm90": _assumed(989, 4.8, _HOPPER),  # H200
    "sm100": _assumed(2250, 8.0, _HOPPER),  # B200
    "sm120": _assumed(504, 1.8, _AMPERE),  # RTX PRO 6000
    "gfx942": _assumed(1307, 5.3, _HOPPER),  # MI300X
}
FLASH_3 = 2.0  # how many times FlashAttention-2's FLOP/s its successors reach on Hopper and Blackwell (published)


def flash_pairs(q_lengths: np.ndarray, k_lengths: np.ndarray, window: int | None) -> int:
    """Pairs of the tiles of a causal variable-length call, sequences aligned at their ends."""
    blocks = -(-q_lengths // FLASH_QUERIES)
    sequence = np.repeat(np.arange(len(q_lengths)), blocks)
    place = np.arange(len(sequence)) - np.repeat(blocks.cumsum() - blocks, blocks)
    last = np.minimum((place + 1) * FLASH_QUERIES, q_lengths[sequence])  # queries up to the block's end
    keys = (k_lengths - q_lengths)[sequence] + last
    if window is not None:
        keys = np.minimum(keys, window + FLASH_QUERIES)
    return int((-(-keys // FLASH_KEYS)).sum()) * FLASH_QUERIES * FLASH_KEYS


def flash_seconds(rates: Rates, heads: Heads, pairs: int, gathered: int, rows: int) -> float:
    """Forward and backward of one layer: `gathered` keys are copied out of `rows` (0: none are)."""
    work = pairs * heads.heads * heads.width
    seconds = work * (FLOPS_FORWARD / rates.flash_forward + FLOPS_BACKWARD / rates.flash_backward)
    return seconds + (copied_bytes(heads, gathered, rows) / rates.bandwidth if gathered else 0)


def copied_bytes(heads: Heads, gathered: int, rows: int) -> int:
    """That the gather of `gathered` keys and values out of `rows` moves, and its backward.

    Forward: read, written. Backward: read, widened to float32, read, added to a float32 sum of `rows`; which is set to
    zero, read and narrowed.
    """
    size = heads.element_size
    return 2 * heads.kv_heads * heads.width * (gathered * (2 * size + size + 4 + 4 + 8) + rows * (4 + 4 + size))


def trie_seconds(rates: Rates, heads: Heads, pairs: Sequence[int]) -> float:
    """Forward and backward of one layer; pairs: of the tiles of the forward, of query_grad and of key_grad."""
    forward, query_grad, key_grad = pairs
    backward = query_grad * OURS_QUERY_GRAD + key_grad * OURS_KEY_GRAD
    work = forward * FLOPS_FORWARD / rates.forward + backward / rates.backward
    return work * heads.heads * heads.width
