"""Attention of one layer, forward and backward, packed trees beside the same branches unshared.

Run: `pytest bench/bench_attention.py`.

One group per shape of tree. Ours: `tree_attention` on the packed stream (whatever body it chooses for the device), the
two bodies that it chooses from on a GPU, and its dense definition. Unshared: scaled_dot_product_attention, causal, on the rectangle of all branches padded to the
longest on the right, which needs no mask: the fastest an ordinary batch can be.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from alro_fast.modeling.attention import tree_attention
from alro_fast.modeling.attention_bodies import dense_attention, trie_attention, varlen_attention
from alro_fast.modeling.packing import Branch, PackedBatch, Tree, collate
from alro_fast.ops import flash
from bench.common import CUDA, DRY, machine

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HEADS, KV_HEADS, WIDTH, TREES = (32, 8, 128, 16) if CUDA else (8, 4, 64, 4)
if DRY:
    HEADS, KV_HEADS, WIDTH, TREES = 2, 1, 16, 1
SCALE = WIDTH**-0.5

# name: (tokens of a prefix, branches, tokens a branch adds), ranges inclusive
SHAPES = {
    "ALRO pair": ((150, 400), 2, (130, 130)),
    "DMPO 1+10": ((150, 400), 11, (10, 30)),
    "pointwise 20": ((150, 400), 20, (20, 30)),
    "list, not shared": ((280, 530), 1, (1, 1)),
}
if DRY:
    SHAPES = {"ALRO pair": ((15, 20), 2, (5, 5))}


def make_batch(shape: str) -> PackedBatch:
    (low, high), branches, (shortest, longest) = SHAPES[shape]
    draw = np.random.default_rng(0)
    trees = []
    for number in range(TREES):
        prefix = [100 + number] * int(draw.integers(low, high + 1))
        tails = [[2 + b] * int(draw.integers(shortest, longest + 1)) for b in range(branches)]
        trees.append(Tree([Branch(prefix + tail, len(prefix)) for tail in tails]))
    return collate(trees, range(TREES)).to(DEVICE)


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


WAYS = [tree, dense, unshared, *([triton] if CUDA or DRY else []), *([varlen] if CUDA else [])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_attention(benchmark, shape, way):
    batch = make_batch(shape)
    forward, upstream = way(batch)

    def step() -> None:
        forward().backward(upstream)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{shape}: {TREES} trees, {HEADS}/{KV_HEADS} heads of {WIDTH}, {DEVICE} {DTYPE}"
    benchmark.extra_info = {
        "unique_tokens": batch.unique_tokens,
        "unshared_tokens": batch.unshared_tokens,
        "padded_tokens": batch.padded_tokens,
        "machine": machine(),
    }
    benchmark.pedantic(step, rounds=1 if DRY else 7, warmup_rounds=0 if DRY else 2)
