"""Trees of token sequences, and the padding-free batches they are packed into.

Branches that begin alike share the rows of what they have in common (`alro_fast.modeling.trie`): a batch takes one row
of the trunk for every distinct (prefix, token) of it that something follows. The last token of a branch predicts
nothing, and has a row only where another branch goes on from it. A row's position id is its place in its own branch, so
nothing but the attention (`alro_fast.modeling.attention`) knows that branches lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import AlroFastError
from .planning import plan_batches
from .trie import Common, Trie, grow, ranges

IGNORED = -100  # a label that is none, as transformers has it
SHARES = ("batch", "list", "none")  # whose branches share the rows of what they begin with alike


@dataclass(frozen=True, eq=False)
class Branch:
    """One whole sequence, prefix included; its answer is `ids[answer_start:]`.

    `answer_start` is at least 1, because nothing predicts the first token of a sequence, and below `len(ids)`.
    """

    ids: Sequence[int]
    answer_start: int


class Tree:
    """Branches that are packed together; what any of them begin with alike is found by ids and is one row each.

    Attributes:
        ids: per branch, int64 [length].
        answer_starts: per branch.
        num_tokens: rows the tree takes in a packed stream: distinct (prefix, token) of its branches without their ends.
        unshared_tokens: tokens of all branches.
        num_answer_rows: answer tokens of all branches.

    Raises:
        AlroFastError: no branch, an empty branch, ids that are not whole numbers >= 0, an answer_start out of range;
            the message begins with `name`.
    """

    def __init__(self, branches: Sequence[Branch], name: str | None = None) -> None:
        self.name = name
        if not branches:
            raise AlroFastError(f"{self}: no branches given; a tree needs at least one")
        self.ids = [_checked_ids(self, b, branch) for b, branch in enumerate(branches)]
        self.answer_starts = [int(branch.answer_start) for branch in branches]

    @cached_property
    def num_tokens(self) -> int:
        return self.rows("batch")

    def rows(self, share: str) -> int:
        """Rows the tree takes in a stream that is shared so (`collate`)."""
        return grow(_groups([self], share)).num_rows

    def extent(self, share: str, windows: Sequence[int | None]) -> Extent:
        """What a trunk of layers with these windows (`visible_pairs`) goes over in a stream that is shared so."""
        trie = grow(_groups([self], share))
        lengths = np.array([len(ids) for ids in self.ids])
        answering = np.unique(_predicting_rows(trie, lengths, np.array(self.answer_starts)))
        pairs = visible_pairs(trie.positions, trie.positions[answering], windows)
        return Extent(trie.num_rows, len(answering), pairs)

    @property
    def contexts(self) -> list[np.ndarray]:
        """The branches without their last tokens, which nothing is predicted from."""
        return [ids[:-1] for ids in self.ids]

    @cached_property
    def unshared_tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)

    @cached_property
    def num_answer_rows(self) -> int:
        return self.unshared_tokens - sum(self.answer_starts)

    def __str__(self) -> str:
        return "tree" if self.name is None else f"tree {self.name}"


class Extent(NamedTuple):
    """What a trunk goes over."""

    rows: int  # distinct tokens
    answer_rows: int  # those that predict an answer's token
    pairs: int  # visible (query, key), over all layers


def pairs_of_layers(positions: np.ndarray, answering: np.ndarray, windows: Sequence[int | None]) -> list[int]:
    """Visible (query, key) of a stream in each layer; in the last one the answer rows alone are queries.

    positions: of all rows, and `answering` of the answer rows. windows: of every layer, first to last, how many keys
    back its queries see, themselves included; None: all of their branch.
    """

    def seen(places: np.ndarray, window: int | None) -> int:
        return int((places + 1 if window is None else np.minimum(places + 1, window)).sum())

    deep = {window: seen(positions, window) for window in set(windows[:-1])}
    return [*(deep[window] for window in windows[:-1]), seen(answering, windows[-1])]


def visible_pairs(positions: np.ndarray, answering: np.ndarray, windows: Sequence[int | None]) -> int:
    """`pairs_of_layers`, over all of them."""
    return sum(pairs_of_layers(positions, answering, windows))


@dataclass(frozen=True, eq=False)
class Varlen:
    """Sequences of queries and keys for a variable-length kernel: len_q <= len_k, causal and aligned at their ends.

    Attributes:
        kv_index: int64 [Tk], the stream row of each key; None where the keys are the stream as it is.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1].
        max_seqlen_q, max_seqlen_k: the longest sequence, as Python numbers (no device sync to read them).
        rows: int64 [Tq] in numpy, the stream row of each query; None where the queries are the stream as it is.
        q_lengths, k_lengths: int64 [sequences] in numpy, on the host as `rows` is.
    """

    kv_index: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    rows: np.ndarray | None
    q_lengths: np.ndarray
    k_lengths: np.ndarray


@dataclass(frozen=True, eq=False)
class Segments:
    """What attention must know of a packed stream; the same object serves every layer of a step.

    Row r sees key k exactly where k <= r < until[k] and, with a window, positions[r] - positions[k] < window.

    Attributes:
        trie: the layout in numpy, which stays on the host whatever device the tensors are on.
        node_start: int64 [G + 1]; node_parent, node_until: int32 [G]; until, row_node: int32 [T]; positions: int64 [T];
            units: int64 [S + 1]: as in the trie.
        distinct_rows: int64 [U], ascending: the stream rows that predict any label.
        stream: every row a query.
        answers: the distinct answer rows alone as queries.
        unit_answers: distinct answer rows of each unit.
        longest, shortest: rows of the longest and of the shortest branch.
        cache: what an attention body derives from the layout once per batch (masks, calls).
    """

    trie: Trie
    node_start: Tensor
    node_parent: Tensor
    node_until: Tensor
    until: Tensor
    row_node: Tensor
    positions: Tensor
    units: Tensor
    distinct_rows: Tensor
    stream: Varlen
    answers: Varlen
    unit_answers: tuple[int, ...]
    longest: int
    shortest: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """Rows of the stream."""
        return self.trie.num_rows


_OF_THE_TRIE = ("node_start", "node_parent", "node_until", "until", "row_node", "positions", "units")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One stream of T rows without padding between branches, and the rows answers are predicted from.

    Attributes:
        input_ids, position_ids: int64 [T].
        segments: attention metadata; `segments.distinct_rows` [U] are the rows that labels are predicted from.
        labels: int64 [N], ordered by tree, branch, position.
        label_rows: int64 [N], which of the U rows predicts each label: one row serves every branch that needs it.
        label_table: int64 [U, K], the labels of each row, at most K, -100 on pads; label_places: int64 [N], where in
            its U * K entries each label stands.
        row_tree: int64 [N], counted within this batch: `tree_indices[row_tree[n]]` is the input tree of labels[n].
        row_branch: int64 [N].
        tree_indices: the input trees of this batch.
        branch_rows: per tree, the label offsets of its branches: branch b of tree t has labels
            `branch_rows[t][b] : branch_rows[t][b + 1]`.
        one_label_a_row: label_rows are 0, 1, ... N - 1.
        unique_tokens: stream rows, T; unshared_tokens: tokens of all branches one by one;
            padded_tokens: rows of the rectangle (branches x longest branch) an ordinary padded batch would hold.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    labels: Tensor
    label_rows: Tensor
    label_table: Tensor
    label_places: Tensor
    row_tree: Tensor
    row_branch: Tensor
    tree_indices: tuple[int, ...]
    branch_rows: tuple[tuple[int, ...], ...]
    one_label_a_row: bool
    unique_tokens: int
    unshared_tokens: int
    padded_tokens: int

    @property
    def answer_rows(self) -> Tensor:
        """int64 [N]: the stream row whose hidden state predicts labels[n]."""
        return self.segments.distinct_rows[self.label_rows]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return _mapped(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch with its tensors in page-locked memory."""
        return _mapped(self, Tensor.pin_memory)


def pack(trees: Sequence[Tree], token_budget: int, seed: int | None = None, share: str = "batch") -> list[PackedBatch]:
    """Plan and collate all `trees`: every tree once, whole, in batches of at most `token_budget` rows."""
    names = [str(tree) for tree in trees]
    sizes = [tree.rows(share) for tree in trees]
    plan = plan_batches(sizes, token_budget, seed, names=names, common=common_rows(trees, share))
    return [collate(trees, indices, share) for indices in plan]


def common_rows(trees: Sequence[Tree], share: str) -> int:
    """Rows that all of `trees` have alike and a batch takes once: the `common` of a plan."""
    common = Common()
    for tree in trees if share == "batch" else ():
        common.add(tree.contexts)
    return common.num_rows


def collate(trees: Sequence[Tree], indices: Sequence[int], share: str = "batch") -> PackedBatch:
    """Lay `trees[i] for i in indices` into one stream.

    share: "batch" makes one forest of all trees, so that every distinct (prefix, token) of the batch is one row; "list"
    a trie of each tree; "none" gives every branch rows of its own.

    Raises:
        AlroFastError: no trees, or another `share`.
    """
    if share not in SHARES:
        raise AlroFastError(f"share is {share!r}; expected one of {', '.join(SHARES)}")
    if not len(indices):
        raise AlroFastError("no trees to collate; a batch needs at least one")
    chosen = [trees[index] for index in indices]
    ids = [branch for tree in chosen for branch in tree.ids]
    trie = grow(_groups(chosen, share))
    lengths = np.array([len(branch) for branch in ids])
    starts = np.array([start for tree in chosen for start in tree.answer_starts])
    counts = lengths - starts  # answer rows of each branch
    offsets = np.concatenate([[0], counts.cumsum()])
    rows = _predicting_rows(trie, lengths, starts)
    asked = np.zeros(trie.num_rows, dtype=bool)
    asked[rows] = True
    distinct = np.flatnonzero(asked)
    label_rows = (asked.cumsum() - 1)[rows]
    labels = np.concatenate([branch[start:] for branch, start in zip(ids, starts)])
    table, places = _table(labels, label_rows, len(distinct))
    branches = np.array([len(tree.ids) for tree in chosen])
    firsts = np.concatenate([[0], branches.cumsum()])  # the first branch of each tree
    branch_rows = tuple(tuple(offsets[a : b + 1].tolist()) for a, b in pairwise(firsts.tolist()))
    return PackedBatch(
        input_ids=torch.from_numpy(trie.ids),
        position_ids=torch.from_numpy(trie.positions),
        segments=_segments(trie, distinct, int(lengths.max()) - 1, int(lengths.min()) - 1),
        labels=torch.from_numpy(labels),
        label_rows=torch.from_numpy(label_rows),
        label_table=torch.from_numpy(table),
        label_places=torch.from_numpy(places),
        row_tree=torch.from_numpy(np.repeat(np.arange(len(chosen)), np.add.reduceat(counts, firsts[:-1]))),
        row_branch=torch.from_numpy(np.repeat(ranges(np.zeros_like(branches), branches), counts)),
        tree_indices=tuple(int(index) for index in indices),
        branch_rows=branch_rows,
        one_label_a_row=len(distinct) == len(rows) and bool((np.diff(label_rows) == 1).all()),
        unique_tokens=trie.num_rows,
        unshared_tokens=int(lengths.sum()),
        padded_tokens=len(lengths) * int(lengths.max()),
    )


def _groups(trees: Sequence[Tree], share: str) -> list[list[np.ndarray]]:
    """What may share rows, together."""
    each = [tree.contexts for tree in trees]
    if share == "list":
        return each
    branches = list(chain.from_iterable(each))
    return [branches] if share == "batch" else [[branch] for branch in branches]


def _predicting_rows(trie: Trie, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64 [N]: the stream row that predicts each answer token, branch after branch. It stands one row earlier in its
    branch: position in the branch, to a node on its path, to a row of the stream."""
    branch, node = trie.paths(trie.leaves)
    depth = trie.node_depth[node]
    low = np.maximum(depth, starts[branch] - 1)
    high = np.minimum(depth + trie.node_rows[node], lengths[branch] - 1)
    return ranges(trie.node_start[node] + low - depth, np.maximum(high - low, 0))


def _table(labels: np.ndarray, label_rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`PackedBatch.label_table` of `count` rows, and `label_places`; labels of a row in their order."""
    each = np.bincount(label_rows, minlength=count)
    order = np.argsort(label_rows, kind="stable")
    slots = np.empty_like(label_rows)
    slots[order] = ranges(np.zeros_like(each), each)
    places = label_rows * each.max() + slots
    table = np.full((count, each.max()), IGNORED, dtype=np.int64)
    table.flat[places] = labels
    return table, places


def _segments(trie: Trie, distinct: np.ndarray, longest: int, shortest: int) -> Segments:
    arrays: dict[str, Any] = {name: torch.from_numpy(getattr(trie, name)) for name in _OF_THE_TRIE}
    return Segments(
        **arrays,
        trie=trie,
        distinct_rows=torch.from_numpy(distinct),
        stream=_stream_sequences(trie),
        answers=_answer_sequences(trie, distinct),
        unit_answers=tuple(np.diff(np.searchsorted(distinct, trie.units)).tolist()),
        longest=longest,
        shortest=shortest,
    )


def _checked_ids(tree: Tree, number: int, branch: Branch) -> np.ndarray:
    ids = np.asarray(branch.ids)
    if ids.ndim != 1 or not len(ids):
        raise AlroFastError(f"{tree}, branch {number}: expected a flat, non-empty sequence of token ids")
    if ids.dtype.kind not in "iu" or ids.min() < 0:
        raise AlroFastError(f"{tree}, branch {number}: token ids must be whole numbers >= 0")
    if not 1 <= branch.answer_start < len(ids):
        raise AlroFastError(
            f"{tree}, branch {number}: answer_start is {branch.answer_start}, expected 1 .. {len(ids) - 1}; an answer "
            "needs a token, and nothing predicts the first token of a sequence"
        )
    return ids.astype(np.int64, copy=False)


def _stream_sequences(trie: Trie) -> Varlen:
    """Every row a query: the runs of the trie, each on what stands above it and on itself."""
    begins = trie.runs[:-1]
    ends = trie.node_start[trie.runs[1:]]
    keys, k_lengths = trie.chains(ends - 1)
    return _varlen(ends - trie.node_start[begins], k_lengths, keys if len(keys) > trie.num_rows else None, None)


def _answer_sequences(trie: Trie, rows: np.ndarray) -> Varlen:
    """The answer rows alone: neighbours of one run together, on what the last of them sees."""
    run = np.searchsorted(trie.runs, trie.row_node[rows], side="right")
    last = np.append((np.diff(rows) > 1) | (np.diff(run) > 0), True)
    keys, k_lengths = trie.chains(rows[last])
    return _varlen(np.diff(np.flatnonzero(last), prepend=-1), k_lengths, keys, rows)


def _varlen(q_lengths: np.ndarray, k_lengths: np.ndarray, keys: np.ndarray | None, rows: np.ndarray | None) -> Varlen:
    return Varlen(
        kv_index=None if keys is None else torch.from_numpy(keys),
        cu_seqlens_q=torch.from_numpy(np.concatenate([[0], q_lengths.cumsum()]).astype(np.int32)),
        cu_seqlens_k=torch.from_numpy(np.concatenate([[0], k_lengths.cumsum()]).astype(np.int32)),
        max_seqlen_q=int(q_lengths.max()),
        max_seqlen_k=int(k_lengths.max()),
        rows=rows,
        q_lengths=q_lengths,
        k_lengths=k_lengths,
    )


def _mapped(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the record with `function` applied to every tensor in it, and nothing cached."""
    changes: dict[str, Any] = {"cache": {}} if isinstance(record, Segments) else {}
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            changes[name] = function(value)
        elif isinstance(value, Segments | Varlen):
            changes[name] = _mapped(value, function)
    return replace(record, **changes)
