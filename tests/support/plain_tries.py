"""Tries token by token in dictionaries: the layout of a packed stream as its definition has it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PlainTrie:
    """ids, positions, parents (-1: none) and untils of every row; rows of every branch, through the groups."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    untils: list[int] = field(default_factory=list)
    branches: list[list[int]] = field(default_factory=list)

    def prefix(self, row: int) -> tuple[int, ...]:
        """The tokens from the beginning of its branches to a row."""
        above = self.prefix(self.parents[row]) if self.parents[row] >= 0 else ()
        return (*above, self.ids[row])


def plain_trie(groups: list[list[list[int]]]) -> PlainTrie:
    made = PlainTrie()
    for group in groups:
        root: dict = {}
        for ids in group:
            node = root
            for token in ids:
                node = node.setdefault(token, {})
        numbers: dict[int, int] = {}
        waiting = [(token, child, 0, -1) for token, child in reversed(root.items())]
        while waiting:
            token, node, depth, parent = waiting.pop()
            numbers[id(node)] = row = len(made.ids)
            made.ids.append(token)
            made.positions.append(depth)
            made.parents.append(parent)
            waiting += [(token, child, depth + 1, row) for token, child in reversed(node.items())]
        for ids in group:
            node, rows = root, []
            for token in ids:
                node = node[token]
                rows.append(numbers[id(node)])
            made.branches.append(rows)
    made.untils = [row + 1 for row in range(len(made.ids))]
    for row in reversed(range(len(made.ids))):
        if made.parents[row] >= 0:
            made.untils[made.parents[row]] = max(made.untils[made.parents[row]], made.untils[row])
    return made


def groups_of(trees: list, share: str) -> list[list[list[int]]]:
    """Branches without their ends, those that may share rows together: a batch's, a tree's ("list"), one ("none")."""
    groups = [[ids[:-1].tolist() for ids in tree.ids] for tree in trees]
    if share == "batch":
        return [[ids for group in groups for ids in group]]
    return groups if share == "list" else [[ids] for group in groups for ids in group]
