"""Radix tries over token ids: every distinct (prefix, token) of a set of branches is one row, depth first.

A trie lies in its rows: a node's rows are neighbours, its descendants follow it, and so row r sees key k, that is, k's
token stands before r's in some branch or is r's own, exactly where k <= r < until[k].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

UNIT_ROWS = 1024  # the most rows of a unit


@dataclass(frozen=True, eq=False)
class Trie:
    """Nodes in depth-first preorder, children in the order of their first branch; G nodes tile T rows.

    Attributes:
        ids: int64 [T], the tokens.
        positions: int64 [T], each token's place in its branches.
        node_start: int64 [G + 1], node g has rows node_start[g] : node_start[g + 1].
        node_parent: int32 [G], -1 for a root.
        node_until: int32 [G], the row at which a node's subtree ends.
        leaves: int64 [branches], the node that holds a branch's last token, or one below it.
    """

    ids: np.ndarray
    positions: np.ndarray
    node_start: np.ndarray
    node_parent: np.ndarray
    node_until: np.ndarray
    leaves: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    @cached_property
    def node_rows(self) -> np.ndarray:
        """int64 [G]: rows of each node."""
        return np.diff(self.node_start)

    @cached_property
    def node_depth(self) -> np.ndarray:
        """int64 [G]: the position of each node's first token."""
        return self.positions[self.node_start[:-1]]

    @cached_property
    def row_node(self) -> np.ndarray:
        """int32 [T]: the node of each row."""
        return np.repeat(np.arange(len(self.node_parent), dtype=np.int32), self.node_rows)

    @cached_property
    def until(self) -> np.ndarray:
        """int32 [T]: row r sees key k exactly where k <= r < until[k]."""
        return np.repeat(self.node_until, self.node_rows)

    @cached_property
    def runs(self) -> np.ndarray:
        """int64 [R + 1]: nodes at which runs begin, and G. A run is a path: each node of it the first child of the one
        before, so that its rows are neighbours and see each other in causal order."""
        nodes = len(self.node_parent)
        begins = np.flatnonzero(self.node_parent[1:] != np.arange(nodes - 1)) + 1
        return np.concatenate([[0], begins, [nodes]])

    def paths(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nodes from the root to each of `nodes`: (place in `nodes`, node), flat and in this order."""
        levels = [np.asarray(nodes, dtype=np.int64)]
        parents = np.append(self.node_parent, -1)  # of -1: itself
        while (above := parents[levels[-1]]).max(initial=-1) >= 0:
            levels.append(above)
        table = np.stack(levels[::-1], axis=1)
        owner, level = np.nonzero(table >= 0)
        return owner, table[owner, level]

    def chains(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each of `rows` sees, itself included: stream rows, flat, one row's after the other's; and how many."""
        owner, node = self.paths(self.row_node[rows])
        counts = np.minimum(self.node_rows[node], rows[owner] + 1 - self.node_start[node])
        return ranges(self.node_start[node], counts), self.positions[rows] + 1

    @cached_property
    def units(self) -> np.ndarray:
        """int64 [S + 1]: contiguous cuts of the stream, a function of the layout alone.

        What a unit's rows see before the unit is what its first row sees there. Cuts are at roots, at children of nodes
        whose subtree is over UNIT_ROWS, and every UNIT_ROWS rows of a longer node; neighbours go together up to
        UNIT_ROWS.
        """
        start, parent = self.node_start[:-1], self.node_parent
        opened = np.append(self.node_until - start > UNIT_ROWS, True)  # the last entry: above the roots
        places = [start[opened[parent]]]
        for node in np.flatnonzero(self.node_rows > UNIT_ROWS):
            places.append(np.arange(start[node], self.node_start[node + 1], UNIT_ROWS))
        cuts = np.unique(np.concatenate([*places, [self.num_rows]]))
        chosen = [0]
        while chosen[-1] < self.num_rows:
            furthest = np.searchsorted(cuts, chosen[-1] + UNIT_ROWS, side="right") - 1
            nearest = np.searchsorted(cuts, chosen[-1], side="right")
            chosen.append(int(cuts[max(furthest, nearest)]))
        return np.asarray(chosen, dtype=np.int64)


def grow(groups: Sequence[Sequence[np.ndarray]]) -> Trie:
    """The tries of groups of branches, side by side: branches of one group share what they begin with alike.

    groups: per group its branches, each int64 [length], not empty. `Trie.leaves` counts branches through the groups.
    """
    roots: list[_Node] = []
    ends: list[_Node] = []
    for group in groups:
        top = _Node(0, np.empty(0, np.int64))
        path, last = [top], top.ids
        for ids in group:
            alike = _common(last, ids)  # with the branch before: its path leads so far
            while len(path) > 1 and path[-1].start >= alike:
                path.pop()
            _insert(path, ids, alike)
            ends.append(path[-1])
            last = ids
        roots += top.children.values()
    return _flattened(roots, ends)


class Common:
    """The rows that all of many tries have alike, tree after tree: the instructions of a data set's prompts."""

    def __init__(self) -> None:
        self._paths: list[np.ndarray] | None = None  # None: of no tree

    def add(self, branches: Sequence[np.ndarray]) -> None:
        """One more tree, by its branches: each int64 [length]."""
        if self._paths is None:
            self._paths = list(branches)
            return
        shared = [path[: max(_common(path, ids) for ids in branches)] for path in self._paths]
        self._paths = list({path.tobytes(): path for path in shared if len(path)}.values())

    @property
    def positions(self) -> np.ndarray:
        """int64 [rows]: the place of each in its branches; none where no tree was added."""
        return grow([self._paths]).positions if self._paths else np.empty(0, np.int64)

    @property
    def num_rows(self) -> int:
        return len(self.positions)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each of `counts` numbers, one range after the other: int64."""
    ends = counts.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


class _Node:
    __slots__ = ("children", "ids", "number", "start")

    def __init__(self, start: int, ids: np.ndarray) -> None:
        self.start, self.ids, self.number = start, ids, -1
        self.children: dict[int, _Node] = {}  # by first token


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that both begin with."""
    shorter = min(len(one), len(other))
    different = one[:shorter] != other[:shorter]
    first = int(different.argmax()) if shorter else 0
    return first if shorter and different[first] else shorter


def _insert(path: list[_Node], ids: np.ndarray, at: int) -> None:
    """Lengthen `path` to the node of the branch's last token; its last node holds what the branch has before `at`."""
    node = path[-1]
    while True:
        inside = at - node.start
        inside += _common(node.ids[inside:], ids[at:])
        at = node.start + inside
        if at == len(ids):
            return
        if inside < len(node.ids):  # in two: what stood below stays below, and keeps the node that ends know
            head = _Node(node.start, node.ids[:inside])
            head.children[int(node.ids[inside])] = node
            path[-2].children[int(node.ids[0])] = head
            node.start, node.ids, path[-1] = at, node.ids[inside:], head
            node = head
        child = node.children.get(int(ids[at]))
        if child is None:
            child = node.children[int(ids[at])] = _Node(at, ids[at:])
            path.append(child)
            return
        path.append(child)
        node = child


def _flattened(roots: list[_Node], ends: list[_Node]) -> Trie:
    parents: list[int] = []
    nodes: list[_Node] = []
    waiting = [(root, -1) for root in reversed(roots)]
    while waiting:
        node, parent = waiting.pop()
        node.number = len(nodes)
        nodes.append(node)
        parents.append(parent)
        waiting += [(child, node.number) for child in reversed(node.children.values())]
    lengths = np.array([len(node.ids) for node in nodes])
    node_start = np.concatenate([[0], lengths.cumsum()])
    until = node_start[1:].tolist()
    for number in range(len(nodes) - 1, -1, -1):  # children come after their parents
        if parents[number] >= 0 and until[parents[number]] < until[number]:
            until[parents[number]] = until[number]
    depths = np.array([node.start for node in nodes])
    return Trie(
        ids=np.concatenate([node.ids for node in nodes]),
        positions=np.arange(node_start[-1]) + np.repeat(depths - node_start[:-1], lengths),
        node_start=node_start,
        node_parent=np.array(parents, dtype=np.int32),
        node_until=np.array(until, dtype=np.int32),
        leaves=np.array([node.number for node in ends], dtype=np.int64),
    )
