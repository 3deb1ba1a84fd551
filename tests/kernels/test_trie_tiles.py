"""The tiles of scores that attention over a trie computes, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from alro_fast.kernels.trie_tiles import TrieTiles
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import grow_trie

from alro_fast.kernels import trie_tiles

SIZES = st.sampled_from([1, 4, 16, 64])


@st.composite
def tries(draw):
    """(tiles, visible [U, T], window): forests of 1 to 250 rows, all rows or some of them queries."""
    until, positions = grow_trie(draw(st.sampled_from([1, 30, 120])), draw(st.integers(0, 10**6)), longest=30)
    rows = np.arange(len(until))
    if draw(st.booleans()):
        chosen = draw(st.sets(st.integers(0, len(until) - 1), min_size=1, max_size=40))
        rows = np.sort(np.array(list(chosen)))
    window = draw(st.sampled_from([None, 1, 5, 40]))
    visible = (np.arange(len(until)) <= rows[:, None]) & (rows[:, None] < until)
    if window is not None:
        visible &= positions[rows][:, None] - positions < window
    return TrieTiles(until, positions, rows, torch.device("cpu")), visible, window


def assert_tiles(visible, block, tiles, whole, size, window):
    """visible [block's, all]: tiles do not overlap, cover what is visible, none for nothing; whole ones are whole."""
    covered = np.zeros(visible.shape[1], int)
    for place, first in enumerate(tiles):
        part = visible[block, first : first + size]
        assert part.any() or window is not None
        assert (place < whole) <= (part.all() and part.shape[1] == size)
        covered[first : first + size] += 1
    assert covered.max(initial=0) <= 1
    assert not visible[block][:, covered == 0].any()


@settings(max_examples=150, deadline=None)
@given(case=tries(), queries=SIZES, keys=SIZES)
def test_blocks_of_queries_take_every_pair_they_see(case, queries, keys):
    tiles, visible, window = case
    assert tiles.visible_pairs(window) == visible.sum()
    blocks, starts = tiles.query_tiles(queries, keys, window)
    counts = (blocks[:, 4] - blocks[:, 2]).tolist()
    assert counts == sorted(counts, reverse=True)
    taken = []
    for low, past, begin, middle, end in blocks.tolist():
        assert_tiles(visible, slice(low, past), starts[begin:end].tolist(), middle - begin, keys, window)
        taken += range(low, past)
    assert sorted(taken) == list(range(len(visible)))


@pytest.mark.parametrize("most", [16, 2048])
@settings(max_examples=100, deadline=None)
@given(case=tries(), queries=SIZES, keys=SIZES)
def test_blocks_of_keys_take_every_pair_that_sees_them(most, case, queries, keys):
    (tiles, visible, window), usual = case, trie_tiles.MOST_QUERIES
    trie_tiles.MOST_QUERIES = most
    try:
        blocks, starts, shared, places = tiles.key_tiles(keys, queries, window)
    finally:
        trie_tiles.MOST_QUERIES = usual
    of_block, kept = {}, {}
    for low, past, begin, middle, end, place in blocks.tolist():
        assert (end - begin) * queries <= max(most, queries)
        of_block.setdefault((low, past), []).append((starts[begin:middle].tolist(), starts[middle:end].tolist()))
        kept.setdefault((low, past), []).append(place)
    for (low, past), parts in of_block.items():
        whole = [first for part in parts for first in part[0]]
        every = whole + [first for part in parts for first in part[1]]
        assert_tiles(visible.T, slice(low, past), every, len(whole), queries, window)
    assert sorted(row for low, past in of_block for row in range(low, past)) == list(range(visible.shape[1]))
    # a block alone writes its gradients itself; the places of one that is shared follow each other
    assert {tuple(row[:2]): list(range(*row[2:])) for row in shared.tolist()} == {
        block: sorted(found) for block, found in kept.items() if found != [-1]
    }
    assert sorted(place for found in kept.values() for place in found if place >= 0) == list(range(places))


def test_whole_tiles_are_found():
    """A root of 64 rows and 32 leaves of 8: of every block of 16 queries behind the root, all keys of it are whole."""
    until = np.concatenate([np.full(64, 320), np.repeat(64 + 8 * np.arange(1, 33), 8)])
    positions = np.concatenate([np.arange(64), np.tile(64 + np.arange(8), 32)])
    tiles = TrieTiles(until, positions, None, torch.device("cpu"))
    blocks, _ = tiles.query_tiles(16, 16, None)
    behind = blocks[blocks[:, 0] >= 64]
    assert (behind[:, 3] - behind[:, 2]).tolist() == [4] * 16
    assert (behind[:, 4] - behind[:, 3]).tolist() == [1] * 16
    blocks, *_ = tiles.key_tiles(16, 16, None)
    root = blocks[blocks[:, 0] < 64]
    assert sorted((root[:, 3] - root[:, 2]).tolist()) == [16, 17, 18, 19]


@pytest.mark.parametrize("size", [16, 64])
def test_a_window_leaves_the_tiles_near_the_diagonal(size):
    """Two chains of 400 rows: the second begins within a block, and the first's window does not open for that."""
    until, positions = np.repeat([400, 800], 400), np.tile(np.arange(400), 2)
    tiles = TrieTiles(until, positions, None, torch.device("cpu"))
    for blocks in (tiles.query_tiles(size, size, size).blocks, tiles.key_tiles(size, size, size).blocks):
        counts = blocks[:, 4] - blocks[:, 2]
        assert 2 <= counts.max() <= 3
