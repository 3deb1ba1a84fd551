"""Which tiles of scores a trie's attention needs: lists made on the host, once per batch, from the layout alone.

Row r of the stream sees key k if and only if k <= r < until[k] (and position[r] - position[k] < window). Keys with the
same `until` that lie side by side are one *run*: what a row sees are whole runs that begin before it, and the part of
its own run up to itself. A block of queries takes tiles of keys wherever its visible keys lie; a block of keys takes
tiles of queries. A tile in which every pair is visible is *whole*: kernels read no mask there. Neither list depends on
the device, and none of it waits for one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

MOST_QUERIES = 2048  # that a program takes for one block of keys; a block that more see is shared, and added up after


class QueryTiles(NamedTuple):
    """Per block of queries the tiles of keys it sees, the block of most tiles first.

    blocks: int32 [B, 5]: first query, past the last query, first tile, past the last whole tile, past the last tile.
    tiles: int32 [N]: the first key of each tile.
    """

    blocks: torch.Tensor
    tiles: torch.Tensor


class KeyTiles(NamedTuple):
    """Per block of keys the tiles of queries that see it, in programs of at most `MOST_QUERIES` queries, longest first.

    blocks: int32 [I, 6]: first key, past the last key, first tile, past the last whole tile, past the last tile, and
        the place of a program's sums where several share a block (-1: it is alone, and writes the gradients itself).
    tiles: int32 [N]: the first query of each tile.
    shared: int32 [S, 4]: of each shared block first key, past the last key, first place, past the last place.
    places: sums to keep.
    """

    blocks: torch.Tensor
    tiles: torch.Tensor
    shared: torch.Tensor
    places: int


class TrieTiles:
    """The layout of one packed stream and of its queries, and the tiles made of it so far.

    Args:
        until: int32 [T]: the row at which the subtree of the row's node ends.
        positions: int32 [T]: places in the branches.
        rows: int32 [U], ascending: the rows that are queries; None: all.
        device: of the tensors that kernels read.
    """

    def __init__(self, until: np.ndarray, positions: np.ndarray, rows: np.ndarray | None, device: torch.device) -> None:
        self.device = device
        self._until, self._positions = until.astype(np.int64), positions.astype(np.int64)
        self._rows = np.arange(len(until)) if rows is None else rows.astype(np.int64)
        self._starts = np.flatnonzero(np.diff(self._until, prepend=-1))  # of runs
        self._ends = np.append(self._starts[1:], len(until))
        self.until, self.positions, self.rows = map(self._tensor, (self._until, self._positions, self._rows))
        self._made: dict[Any, Any] = {}

    def query_tiles(self, queries: int, keys: int, window: int | None) -> QueryTiles:
        """For blocks of `queries` queries and tiles of `keys` keys."""
        where = "queries", queries, keys, window
        if where not in self._made:
            self._made[where] = self._query_tiles(queries, keys, window)
        return self._made[where]

    def key_tiles(self, keys: int, queries: int, window: int | None) -> KeyTiles:
        """For blocks of `keys` keys and tiles of `queries` queries."""
        where = "keys", keys, queries, window
        if where not in self._made:
            self._made[where] = self._key_tiles(keys, queries, window)
        return self._made[where]

    def visible_pairs(self, window: int | None) -> int:
        """Of queries and keys that they see."""
        seen = self._positions[self._rows] + 1
        return int((seen if window is None else np.minimum(seen, window)).sum())

    def pairs(self, config: Any, window: int | None) -> tuple[int, int, int]:
        """Of queries and keys in the tiles of the three kernels of a `trie_attention.TrieConfig`, masked ones too."""
        forward, query_grad, key_grad = config
        queries = (self.query_tiles(one.block_m, one.block_n, window) for one in (forward, query_grad))
        keys = self.key_tiles(key_grad.block_n, key_grad.block_m, window)
        return tuple(len(made.tiles) * one.tile for made, one in zip((*queries, keys), config))

    def _query_tiles(self, queries: int, keys: int, window: int | None) -> QueryTiles:
        least_until, positions = _sliding_least(self._until, keys), self._positions
        least_position = _sliding_least(positions, keys)
        begins = np.arange(0, len(self._rows), queries)
        listed = []
        for begin in begins:
            rows = self._rows[begin : begin + queries]
            tiles = _cover(*self._visible(rows, window), keys)
            whole = (tiles + keys - 1 <= rows[0]) & (least_until[tiles] > rows[-1])
            if window is not None:
                whole &= positions[rows].max() - least_position[tiles] < window
            listed.append((tiles[whole], tiles[~whole]))
        blocks = [(begin, min(begin + queries, len(self._rows))) for begin in begins]
        table, tiles, _ = _table(blocks, listed)
        return QueryTiles(self._tensor(table), self._tensor(tiles))

    def _visible(self, rows: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Begins and ends of the ranges of keys that any of these rows sees."""
        near = slice(None, np.searchsorted(self._starts, rows[-1], "right"))
        starts, ends, until = self._starts[near].copy(), self._ends[near], self._until[self._starts[near]]
        below = np.searchsorted(rows, until)  # past the last of the rows in a run and its subtree
        first = np.searchsorted(rows, starts)
        ends = np.where(below > first, np.minimum(ends, rows[below - 1] + 1), starts)
        if window is not None:  # positions count on within a run
            for run in np.flatnonzero(ends > starts):
                nearest = self._positions[rows[first[run] : below[run]]].min()
                starts[run] += max(0, nearest - window + 1 - self._positions[starts[run]])
        seen = ends > starts
        return starts[seen], ends[seen]

    def _key_tiles(self, keys: int, queries: int, window: int | None) -> KeyTiles:
        rows, until, positions = self._rows, self._until, self._positions
        begins = np.arange(0, len(until), keys)
        edges = np.append(begins[1:], len(until))
        least, most = (ufunc.reduceat(until, begins) for ufunc in (np.minimum, np.maximum))
        earliest = np.minimum.reduceat(positions, begins)
        first, past = np.searchsorted(rows, begins), np.searchsorted(rows, most)
        tile_first = _sliding_least(positions[rows], queries)
        tile_last = -_sliding_least(-positions[rows], queries)
        blocks, listed, places = [], [], []
        for block, (begin, edge) in enumerate(zip(begins, edges)):
            tiles = np.arange(first[block], past[block], queries)
            if window is not None:
                tiles = tiles[self._near(tiles, queries, tile_first[tiles] - window, begin, edge)]
            ends = np.minimum(tiles + queries, len(rows))
            whole = (rows[tiles] >= edge - 1) & (rows[ends - 1] < least[block]) & (tiles + queries <= len(rows))
            if window is not None:
                whole &= tile_last[tiles] - earliest[block] < window
            most_tiles = max(1, MOST_QUERIES // queries)
            for part in range(max(1, -(-len(tiles) // most_tiles))):
                own = slice(part * most_tiles, (part + 1) * most_tiles)
                blocks.append((begin, edge))
                listed.append((tiles[own][whole[own]], tiles[own][~whole[own]]))
                places.append(len(tiles) > most_tiles)
        place = np.where(places, np.cumsum(places) - 1, -1)
        table, tiles, order = _table(blocks, listed)
        shared: dict[int, tuple[int, int, int, int]] = {}
        for (begin, edge), at in zip(blocks, place):
            if at >= 0:
                shared[begin] = (begin, edge, shared[begin][2] if begin in shared else at, at + 1)
        table = np.concatenate([table, place[order, None]], axis=1)
        merged = np.array(list(shared.values()), dtype=np.int64).reshape(-1, 4)
        return KeyTiles(self._tensor(table), self._tensor(tiles), self._tensor(merged), int(sum(places)))

    def _near(self, tiles: np.ndarray, size: int, latest: np.ndarray, begin: int, edge: int) -> np.ndarray:
        """Which tiles of `size` queries a run of the keys begin:edge reaches that has a key later than `latest`."""
        runs = slice(np.searchsorted(self._starts, begin, "right") - 1, np.searchsorted(self._starts, edge))
        starts, ends = np.maximum(self._starts[runs], begin), np.minimum(self._ends[runs], edge)
        first, past = np.searchsorted(self._rows, starts), np.searchsorted(self._rows, self._until[starts])
        reached = (tiles[:, None] < past) & (tiles[:, None] + size > first)
        return (reached & (self._positions[ends - 1] > latest[:, None])).any(axis=1)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        made = torch.from_numpy(array.astype(np.int32))
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made


def _cover(starts: np.ndarray, ends: np.ndarray, size: int) -> np.ndarray:
    """Begins of the fewest tiles of `size` neighbours that cover ascending ranges."""
    parts, covered = [np.empty(0, np.int64)], -1
    for start, end in zip(starts, ends):
        if end > covered:
            parts.append(np.arange(max(start, covered), end, size))
            covered = parts[-1][-1] + size
    return np.concatenate(parts)


def _sliding_least(values: np.ndarray, size: int) -> np.ndarray:
    """The least of `size` neighbours from each place on; fewer at the end count as if their least were the lowest."""
    low, have = np.append(values, np.full(size, np.iinfo(np.int64).min // 2)), 1
    while have < size:
        step = min(have, size - have)
        low[: len(low) - step] = np.minimum(low[: len(low) - step], low[step:])
        have += step
    return low[: len(values)]


def _table(
    blocks: list[tuple[int, int]], listed: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(begin, end, tiles begin, whole ones end, tiles end) of each block, most tiles first; all tiles; the order."""
    whole = np.array([len(parts[0]) for parts in listed], dtype=np.int64)
    every = whole + np.array([len(parts[1]) for parts in listed], dtype=np.int64)
    begins = np.cumsum(every) - every
    table = np.column_stack([np.array(blocks, dtype=np.int64), begins, begins + whole, begins + every])
    order = np.argsort(-every, kind="stable")
    return table[order], np.concatenate([part for parts in listed for part in parts]), order
