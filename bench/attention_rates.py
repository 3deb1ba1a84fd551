"""`python -m bench.attention_rates`: what `alro_fast.kernels.attention_costs.RATES` assumes, measured on this device.

Prints one line of that table: FLOP/s of FlashAttention on one long causal sequence and of our kernels on a trie of
short branches, over the pairs of the tiles that they compute, and the bandwidth of the gather that the former needs.
Without a GPU (`BENCH_DRY=1`) the same on interpreted kernels and tiny shapes, which measures nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from alro_fast.kernels import attention_costs as costs
from alro_fast.modeling.attention_bodies import gather_rows
from alro_fast.modeling.packing import Branch, Tree, Varlen, collate
from alro_fast.ops import flash, trie_attention
from bench.common import CUDA, DEVICE, DRY

DTYPE = torch.bfloat16 if CUDA else torch.float32
HEADS = costs.Heads(32, 8, 128, 2) if CUDA else costs.Heads(2, 1, 16, 4)
LENGTH, TREES, PREFIX, BRANCHES, OWN = (8192, 16, 340, 20, 25) if CUDA else (64, 1, 20, 3, 5)
ROUNDS = 7 if CUDA else 1


def seconds(step: Callable[[], object]) -> float:
    """Median, after two rounds that compile."""
    taken = []
    for _ in range(ROUNDS + 2 * CUDA):
        began = time.perf_counter()
        step()
        if CUDA:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[2 * CUDA :]))


def tensors(rows: int) -> list[Tensor]:
    """query, key, value [rows, heads, width]."""
    heads = HEADS.heads, HEADS.kv_heads, HEADS.kv_heads
    return [torch.randn(rows, n, HEADS.width, device=DEVICE, dtype=DTYPE).requires_grad_() for n in heads]


def both_ways(forward: Callable[[], Tensor]) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    out = forward()
    upstream = torch.randn_like(out)
    return seconds(forward), seconds(lambda: out.backward(upstream, retain_graph=True))


def flash_rates() -> tuple[float, float]:
    """FLOP/s forward and backward."""
    backend = flash.varlen_backend(False, torch.device(DEVICE))
    assert backend is not None
    print(f"FlashAttention: {backend.name}")
    lengths, cuts = np.array([LENGTH]), torch.tensor([0, LENGTH], dtype=torch.int32, device=DEVICE)
    sequences = Varlen(None, cuts, cuts, LENGTH, LENGTH, None, lengths, lengths)
    query, key, value = tensors(LENGTH)
    taken = both_ways(lambda: backend.run(query, key, value, sequences, HEADS.width**-0.5, None, None))
    work = costs.flash_pairs(lengths, lengths, None) * HEADS.heads * HEADS.width
    return work * costs.FLOPS_FORWARD / taken[0], work * costs.FLOPS_BACKWARD / taken[1]


def our_rates() -> tuple[float, float, float]:
    """FLOP/s forward and backward, bytes/s of the gather that FlashAttention would need for the same trie."""
    trees = [
        Tree([Branch([100 + t] * PREFIX + [b] * OWN, PREFIX) for b in range(1, BRANCHES + 1)]) for t in range(TREES)
    ]  # fmt: skip
    layout = collate(trees, range(TREES)).to(DEVICE).segments
    query, key, value = tensors(layout.num_rows)
    tiles = trie_attention.make_tiles(layout.trie.until, layout.trie.positions, None, query.device)
    scale = HEADS.width**-0.5
    taken = both_ways(lambda: trie_attention.trie_attention(query, key, value, tiles, scale, None, None))
    forward, query_grad, key_grad = (
        pairs * HEADS.heads * HEADS.width for pairs in trie_attention.computed_pairs(query, tiles, None)
    )
    backward = query_grad * costs.OURS_QUERY_GRAD + key_grad * costs.OURS_KEY_GRAD
    index = layout.stream.kv_index
    copied = sum(both_ways(lambda: gather_rows(key, index)))
    size = costs.copied_bytes(HEADS, len(index), layout.num_rows) / 2  # of keys alone
    return forward * costs.FLOPS_FORWARD / taken[0], backward / taken[1], size / copied


def main() -> int:
    if not CUDA and not DRY:
        print("error: no CUDA device; BENCH_DRY=1 and TRITON_INTERPRET=1 run this without one", file=sys.stderr)
        return 2
    theirs = flash_rates() if CUDA else (float("nan"), float("nan"))
    ours = our_rates()
    name = trie_attention.architecture(torch.device(DEVICE))
    numbers = ", ".join(f"{number:.3g}" for number in (*theirs, *ours))
    print(f'"{name}": Rates({numbers}),{"" if CUDA else "  # not a measurement"}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
