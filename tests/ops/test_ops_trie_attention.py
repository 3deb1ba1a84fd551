"""What attention over a trie should take, by hand, and what is chosen for shapes of tries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from alro_fast.kernels.attention_costs import Heads, Rates

from alro_fast.kernels import attention_costs as costs
from alro_fast.modeling.packing import Branch, Tree, collate
from alro_fast.ops import trie_attention

RATES = Rates(flash_forward=4e12, flash_backward=2e12, forward=2e12, backward=1e12, bandwidth=1e12)


def test_pairs_of_a_variable_length_call_by_hand():
    """300 queries on 320 keys: blocks of 128 queries see 148, 276 and 320 keys, in tiles of 64; 5 queries on 65."""
    lengths = np.array([300, 5]), np.array([320, 65])
    assert costs.flash_pairs(*lengths, None) == 128 * 64 * (3 + 5 + 5 + 2)
    assert costs.flash_pairs(*lengths, 10) == 128 * 64 * (3 + 3 + 3 + 2)  # 138 keys at most


def test_seconds_by_hand():
    heads = Heads(heads=8, kv_heads=2, width=64, element_size=2)
    work = 1000 * 8 * 64
    assert costs.trie_seconds(RATES, heads, (1000, 2000, 3000)) == pytest.approx(
        work * (4 / 2e12 + (2 * 6 + 3 * 8) / 1e12)
    )
    alone = work * (4 / 4e12 + 10 / 2e12)
    assert costs.flash_seconds(RATES, heads, 1000, 0, 50) == pytest.approx(alone)
    copied = 2 * 2 * 64 * (100 * (6 + 16) + 50 * 10)  # keys and values, 2 heads
    assert costs.flash_seconds(RATES, heads, 1000, 100, 50) == pytest.approx(alone + copied / 1e12)


@pytest.mark.parametrize(
    ("prefix", "branches", "own", "ours"), [(250, 11, 20, True), (250, 20, 25, True), (2500, 2, 1000, False)]
)
def test_short_branches_take_the_kernels_and_long_ones_flash(prefix, branches, own, ours, monkeypatch):
    """By the assumed rates of an H200, 32 heads of 128 on 8."""
    monkeypatch.setattr(trie_attention, "architecture", lambda _: "sm90")
    trees = [
        Tree([Branch([t] * prefix + [10 + b] * own, prefix) for b in range(branches)]) for t in range(1, 5)
    ]  # fmt: skip
    layout = collate(trees, range(4)).segments
    tiles = trie_attention.make_tiles(layout.trie.until, layout.trie.positions, None, torch.device("cpu"))
    query, key = (torch.empty(layout.num_rows, n, 128, dtype=torch.bfloat16, device="meta") for n in (32, 8))
    sequences = layout.stream.q_lengths, layout.stream.k_lengths, len(layout.stream.kv_index)
    kernels, flash = trie_attention.expected_seconds(query, key, tiles, *sequences, None, False)
    assert (kernels < flash) == ours
    assert trie_attention.expected_seconds(query, key, tiles, *sequences, None, True)[1] < flash


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
def test_what_the_kernels_serve():
    for dtype, width, serves in (
        (torch.float32, 256, True), (torch.bfloat16, 80, True), (torch.float64, 64, False), (torch.float16, 264, False),
    ):  # fmt: skip
        assert trie_attention.trie_kernels_serve(torch.empty(1, 1, width, dtype=dtype)) == serves


def test_without_triton_they_serve_nothing(monkeypatch):
    monkeypatch.setattr(trie_attention.importlib.util, "find_spec", lambda _: None)
    assert trie_attention.architecture.__wrapped__(torch.device("cuda")) is None
