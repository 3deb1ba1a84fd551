"""Attention over a packed trie by our Triton kernels, and which of them and FlashAttention a batch should take."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..kernels import attention_costs as costs

if TYPE_CHECKING:
    from ..kernels.trie_attention import TrieConfig
    from ..kernels.trie_tiles import TrieTiles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # elements of a head


def trie_kernels_serve(query: Tensor) -> bool:
    """Whether the kernels take heads of this dtype, width and device: CUDA or ROCm, or any if they are interpreted."""
    return query.dtype in DTYPES and query.shape[-1] <= WIDEST and architecture(query.device) is not None


@functools.cache
def architecture(device: torch.device) -> str | None:
    """The name of the device in the kernels' tables; None: the kernels cannot run there."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .backends import triton

    return None if triton.unavailable(device, torch.float32) else triton.architecture(device)


def kernel_config(query: Tensor) -> TrieConfig:
    """How the kernels are launched for heads [..., D] of this dtype on this device."""
    from ..kernels import configs

    return configs.trie_config(str(architecture(query.device)), query.shape[-1], query.element_size())


def make_tiles(until: np.ndarray, positions: np.ndarray, rows: np.ndarray | None, device: torch.device) -> TrieTiles:
    """The layout as the kernels read it; see `alro_fast.kernels.trie_tiles.TrieTiles`."""
    from ..kernels.trie_tiles import TrieTiles

    return TrieTiles(until, positions, rows, device)


def trie_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: TrieTiles,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of the tiles' queries, differentiable; where `trie_kernels_serve` holds.

    Args:
        query: [U, heads, D], a row for each of the tiles' queries.
        key, value: [T, kv_heads, D].
        scale: factor of the scores.
        window: a row sees positions p with 0 <= its own - p < window.
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        [U, heads, D] in the dtype of `query`.
    """
    from ..kernels import trie_attention as kernels

    made: Tensor = kernels.trie_attention(query, key, value, tiles, scale, window, softcap, kernel_config(query))
    return made


def computed_pairs(query: Tensor, tiles: TrieTiles, window: int | None) -> tuple[int, int, int]:
    """Pairs in the tiles of the forward, of the gradients of queries and of those of keys, masked ones too."""
    pairs: tuple[int, int, int] = tiles.pairs(kernel_config(query), window)
    return pairs


def expected_seconds(
    query: Tensor,
    key: Tensor,
    tiles: TrieTiles,
    q_lengths: np.ndarray,
    k_lengths: np.ndarray,
    gathered: int,
    window: int | None,
    newest_flash: bool,
) -> tuple[float, float]:
    """What forward and backward of a layer should take: by the kernels over tries, by FlashAttention.

    Where the pairs that are visible alone would take the kernels longer, no tiles are made: the first number is theirs.

    Args:
        query: [U, heads, D]; key: [T, kv_heads, D].
        q_lengths, k_lengths: of FlashAttention's sequences.
        gathered: keys that are copied for it.
        newest_flash: it is FlashAttention-3 or later.
    """
    rates = costs.RATES[str(architecture(query.device))]
    if newest_flash:
        faster = costs.FLASH_3
        rates = rates._replace(flash_forward=faster * rates.flash_forward, flash_backward=faster * rates.flash_backward)
    heads = costs.Heads(query.shape[1], key.shape[1], query.shape[2], query.element_size())
    pairs = costs.flash_pairs(q_lengths, k_lengths, window)
    by_flash = costs.flash_seconds(rates, heads, pairs, gathered, len(key))
    least = costs.trie_seconds(rates, heads, 3 * (tiles.visible_pairs(window),))
    if least >= by_flash:
        return least, by_flash
    return costs.trie_seconds(rates, heads, computed_pairs(query, tiles, window)), by_flash
