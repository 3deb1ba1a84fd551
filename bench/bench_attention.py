"""Attention of one layer, forward and backward, packed tries beside the same branches unshared.

Run: `pytest bench/bench_attention.py`.

One group per shape. Ours: `tree_attention` on the packed stream (whatever body it chooses for the device), the two
bodies that it chooses from on a GPU, and its dense definition. One prefix: the same with a stream that shares one
prefix among the branches of an order, and nothing above it. Unshared: scaled_dot_product_attention, causal, on the
rectangle of all branches padded to the longest on the right, which needs no mask: the fastest an ordinary batch can be.

`python -m bench.bench_attention` measures what `alro_fast.kernels.attention_costs.RATES` assumes of this device, and
prints it as a line of that table: FLOP/s of FlashAttention on one long causal sequence and of our kernels on a trie of
short branches, over the pairs of the tiles that they compute, and the bandwidth of the gather that the former needs.
Without a GPU (`BENCH_DRY=1`) the same on interpreted kernels and tiny shapes, which measures nothing.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from alro_fast.kernels import attention_costs as costs
from alro_fast.modeling.attention import tree_attention
from alro_fast.modeling.attention_bodies import dense_attention, gather_rows, trie_attention, varlen_attention
from alro_fast.modeling.packing import Branch, PackedBatch, Tree, Varlen, collate
from alro_fast.ops import flash
from alro_fast.ops import trie_attention as kernels
from bench.common import CUDA, DRY, machine

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HEADS, KV_HEADS, WIDTH, TREES = (32, 8, 128, 16) if CUDA else (8, 4, 64, 4)
if DRY:
    HEADS, KV_HEADS, WIDTH, TREES = 2, 1, 16, 1
SCALE = WIDTH**-0.5


class Shape(NamedTuple):
    """Lists of orders of branches; ranges are inclusive."""

    prefix: tuple[int, int]  # tokens that the branches of an order share, beside the next two
    branches: int
    tail: tuple[int, int]  # tokens a branch adds
    orders: int = 1
    of_list: int = 0  # tokens that the orders of a list share
    of_batch: int = 0  # tokens that all lists share
    lists: int = TREES


SHAPES = {
    "ALRO pair": Shape((150, 400), 2, (130, 130)),
    "DMPO 1+10": Shape((150, 400), 11, (10, 30)),
    "pointwise 20": Shape((150, 400), 20, (20, 30)),
    "list, not shared": Shape((280, 530), 1, (1, 1)),
    "10 grades in 2 orders": Shape((300, 300), 10, (12, 12), orders=2, of_list=300),
    "30 pairs, instructions of 80": Shape((220, 220), 2, (130, 130), of_batch=80, lists=30),
}
if DRY:
    SHAPES = {"ALRO pair": Shape((15, 20), 2, (5, 5)), "3 grades in 2 orders": Shape((9, 9), 3, (4, 4), 2, 8, 3)}


def make_batch(shape: str, one_prefix: bool = False) -> PackedBatch:
    made, draw, tokens = SHAPES[shape], np.random.default_rng(0), itertools.count(1)

    def new(low: int, high: int) -> list[int]:
        return list(itertools.islice(tokens, int(draw.integers(low, high + 1))))

    trees: list[Tree] = []
    instructions = new(made.of_batch, made.of_batch)
    for _ in range(made.lists):
        above = instructions + new(made.of_list, made.of_list)
        orders = []
        for _ in range(made.orders):
            prefix = above + new(*made.prefix)
            orders.append([Branch([*prefix, *new(*made.tail), 0], len(prefix)) for _ in range(made.branches)])
        trees += [Tree(order) for order in orders] if one_prefix else [Tree(list(itertools.chain(*orders)))]
    return collate(trees, range(len(trees)), share="list" if one_prefix else "batch").to(DEVICE)


def tensors(*leading: int) -> list[torch.Tensor]:
    """query, key, value as a layer lays them out, [B, heads, T, D] with rows heads x D apart, and a gradient."""
    torch.manual_seed(0)
    made = [torch.randn(*leading, n, WIDTH, device=DEVICE, dtype=DTYPE) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [*(tensor.transpose(1, 2).requires_grad_() for tensor in made[:3]), made[3]]


def tree(batch: PackedBatch):
    query, key, value, upstream = tensors(1, len(batch.input_ids))
    module = torch.nn.Module()
    return lambda: tree_attention(module, query, key, value, None, scaling=SCALE, alro_segments=batch.segments)[
        0
    ], upstream


def one_prefix(batch: PackedBatch):
    return tree(batch)


def dense(batch: PackedBatch):
    query, key, value, upstream = tensors(1, len(batch.input_ids))
    return lambda: dense_attention(query, key, value, batch.segments, SCALE, None, None), upstream


def triton(batch: PackedBatch):
    query, key, value, upstream = tensors(1, len(batch.input_ids))
    return lambda: trie_attention(query, key, value, batch.segments, SCALE, None, None), upstream


def varlen(batch: PackedBatch):
    query, key, value, upstream = tensors(1, len(batch.input_ids))
    kernel = flash.varlen_backend(False, torch.device(DEVICE)).run
    sequences = batch.segments.stream
    return lambda: varlen_attention(kernel, query, key, value, sequences, SCALE, None, None), upstream


def unshared(batch: PackedBatch):
    branches = sum(len(offsets) - 1 for offsets in batch.branch_rows)
    query, key, value, upstream = tensors(branches, batch.segments.longest)

    def run() -> torch.Tensor:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
        return out.transpose(1, 2)

    return run, upstream


WAYS = [tree, one_prefix, dense, unshared, *([triton] if CUDA or DRY else []), *([varlen] if CUDA else [])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_attention(benchmark, shape, way):
    batch = make_batch(shape, one_prefix=way is one_prefix)
    forward, upstream = way(batch)

    def step() -> None:
        forward().backward(upstream)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{shape}: {SHAPES[shape].lists} lists, {HEADS}/{KV_HEADS} heads of {WIDTH}, {DEVICE} {DTYPE}"
    benchmark.extra_info = {
        "unique_tokens": batch.unique_tokens,
        "unshared_tokens": batch.unshared_tokens,
        "padded_tokens": batch.padded_tokens,
        "machine": machine(),
    }
    benchmark.pedantic(step, rounds=1 if DRY else 7, warmup_rounds=0 if DRY else 2)


# --- the rates that the choice between varlen and our kernels assumes -------------------------------------------------

RATES_OF = costs.Heads(HEADS, KV_HEADS, WIDTH, DTYPE.itemsize)
LENGTH = 8192 if CUDA else 64  # of FlashAttention's sequence
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


def both_ways(forward: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    out = forward()
    upstream = torch.randn_like(out)
    return seconds(forward), seconds(lambda: out.backward(upstream, retain_graph=True))


def flash_rates() -> tuple[float, float]:
    """FLOP/s forward and backward."""
    backend = flash.varlen_backend(False, torch.device(DEVICE))
    print(f"FlashAttention: {backend.name}")
    lengths, cuts = np.array([LENGTH]), torch.tensor([0, LENGTH], dtype=torch.int32, device=DEVICE)
    sequences = Varlen(None, cuts, cuts, LENGTH, LENGTH, None, lengths, lengths)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in tensors(1, LENGTH)[:3])
    taken = both_ways(lambda: backend.run(query, key, value, sequences, SCALE, None, None))
    work = costs.flash_pairs(lengths, lengths, None) * HEADS * WIDTH
    return work * costs.FLOPS_FORWARD / taken[0], work * costs.FLOPS_BACKWARD / taken[1]


def our_rates(shape: str) -> tuple[float, float, float]:
    """FLOP/s forward and backward, bytes/s of the gather that FlashAttention would need for the same trie."""
    layout = make_batch(shape).segments
    query, key, value = (tensor[0].transpose(0, 1) for tensor in tensors(1, layout.num_rows)[:3])
    tiles = kernels.make_tiles(layout.trie.until, layout.trie.positions, None, query.device)
    taken = both_ways(lambda: kernels.trie_attention(query, key, value, tiles, SCALE, None, None))
    forward, query_grad, key_grad = (pairs * HEADS * WIDTH for pairs in kernels.computed_pairs(query, tiles, None))
    backward = query_grad * costs.OURS_QUERY_GRAD + key_grad * costs.OURS_KEY_GRAD
    index = layout.stream.kv_index
    copied = sum(both_ways(lambda: gather_rows(key, index)))
    size = costs.copied_bytes(RATES_OF, len(index), layout.num_rows) / 2  # of keys alone
    return forward * costs.FLOPS_FORWARD / taken[0], backward / taken[1], size / copied


def main() -> int:
    if not CUDA and not DRY:
        print("error: no CUDA device; BENCH_DRY=1 and TRITON_INTERPRET=1 run this without one", file=sys.stderr)
        return 2
    theirs = flash_rates() if CUDA else (float("nan"), float("nan"))
    numbers = ", ".join(f"{number:.3g}" for number in (*theirs, *our_rates("pointwise 20" if CUDA else "ALRO pair")))
    name = kernels.architecture(torch.device(DEVICE))
    print(f'"{name}": Rates({numbers}),{"" if CUDA else "  # not a measurement"}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
