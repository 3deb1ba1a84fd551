"""Attention of one layer, forward and backward, packed tries beside the same branches unshared.

Run: `pytest bench/bench_attention.py`.

One group per shape. Ours: `tree_attention` on the packed stream (whatever body it chooses for the device), and its
dense definition. One prefix: the same with a stream that shares one prefix among the branches of an order, and nothing
above it. Unshared: scaled_dot_product_attention, causal, on the rectangle of all branches padded to the longest on the
right, which needs no mask: the fastest an ordinary batch can be.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from alro_fast.modeling.attention import tree_attention
from alro_fast.modeling.attention_bodies import dense_attention
from alro_fast.modeling.packing import Branch, PackedBatch, Tree, collate
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


def unshared(batch: PackedBatch):
    branches = sum(len(offsets) - 1 for offsets in batch.branch_rows)
    query, key, value, upstream = tensors(branches, batch.segments.longest)

    def run() -> torch.Tensor:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
        return out.transpose(1, 2)

    return run, upstream


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", [tree, one_prefix, dense, unshared], ids=lambda way: way.__name__)
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
