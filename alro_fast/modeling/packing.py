"""Trees of token sequences that share a prefix, and the padding-free batches they are packed into.

A tree of branches that share P tokens costs P + sum(R_b) rows of the trunk instead of sum(P + R_b). The stream of a
packed batch is, tree after tree, `prefix | rest of branch 0 | rest of branch 1 | ...`; a row's position id is its place
in its own branch, so nothing but the attention (`alro_fast.modeling.attention`) knows that branches lie side by side.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AlroFastError

POOL_BUDGETS = (
    64  # a seeded plan packs this many batches' worth of trees at a time, so that neighbours change with the seed
)


@dataclass(frozen=True, eq=False)
class Branch:
    """One whole sequence, prefix included; its answer is `ids[answer_start:]`.

    `answer_start` is at least 1, because nothing predicts the first token of a sequence, and below `len(ids)`.
    """

    ids: Sequence[int]
    answer_start: int


class Tree:
    """Branches that are packed together and share their longest common token prefix, which is found here by ids.

    The prefix may reach into the answers, may be a whole branch (of one branch: everything) and may be empty.

    Attributes:
        ids: per branch, int64 [length].
        answer_starts: per branch.
        prefix_length: tokens common to all branches.
        num_tokens: rows the tree takes in a packed stream.
        unshared_tokens: rows the same branches would take one by one.
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
        self.prefix_length = _common_prefix(self.ids)

    @cached_property
    def num_tokens(self) -> int:
        return self.unshared_tokens - (len(self.ids) - 1) * self.prefix_length

    @cached_property
    def unshared_tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)

    @cached_property
    def num_answer_rows(self) -> int:
        return self.unshared_tokens - sum(self.answer_starts)

    def __str__(self) -> str:
        return "tree" if self.name is None else f"tree {self.name}"


@dataclass(frozen=True)
class TreeSpan:
    """Where one tree lies in the stream: `prefix` rows from `start`, then `lengths[b]` own rows of each branch b."""

    start: int
    prefix: int
    lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.prefix + sum(self.lengths)


@dataclass(frozen=True, eq=False)
class Varlen:
    """Sequences of queries and keys for a variable-length kernel: len_q <= len_k, causal and aligned at their ends.

    Attributes:
        kv_index: int64 [Tk], the stream row of each key; None where the keys are the stream as it is.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1].
        max_seqlen_q, max_seqlen_k: the longest sequence, as Python numbers (no device sync to read them).
    """

    kv_index: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True, eq=False)
class Segments:
    """What attention must know of a packed stream; the same object serves every layer of a step.

    Attributes:
        spans: the trees in stream order.
        stream: every row a query. The first branch of a tree brings the prefix's queries along, every further branch
            that has rows of its own sees the prefix's keys through `kv_index`.
        answers: the answer rows alone as queries, one sequence per branch.
        answer_rows: int64 [N], as in the batch.
        answer_counts: answer rows per tree.
        cache: what an attention body derives from the layout once per batch (masks, calls).
    """

    spans: tuple[TreeSpan, ...]
    stream: Varlen
    answers: Varlen
    answer_rows: Tensor
    answer_counts: tuple[int, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """Rows of the stream."""
        return self.spans[-1].end

    @property
    def longest(self) -> int:
        """Tokens of the longest branch."""
        return max(span.prefix + max(span.lengths) for span in self.spans)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest branch."""
        return min(span.prefix + min(span.lengths) for span in self.spans)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One stream of T rows without padding between branches, and the rows answers are predicted from.

    Attributes:
        input_ids, position_ids: int64 [T].
        segments: attention metadata.
        answer_rows: int64 [N], ordered by tree, branch, position: the stream row whose hidden state predicts labels[n].
            A row of the shared prefix appears once for every branch whose answer it predicts a token of.
        labels: int64 [N].
        row_tree: int64 [N], counted within this batch: `tree_indices[row_tree[n]]` is the input tree.
        row_branch: int64 [N].
        tree_indices: the input trees of this batch, in stream order.
        branch_rows: per tree, the answer-row offsets of its branches: branch b of tree t has rows
            `branch_rows[t][b] : branch_rows[t][b + 1]`.
        unique_tokens: stream rows; unshared_tokens: tokens of all branches one by one;
            padded_tokens: rows of the rectangle (branches x longest branch) an ordinary padded batch would hold.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    answer_rows: Tensor
    labels: Tensor
    row_tree: Tensor
    row_branch: Tensor
    tree_indices: tuple[int, ...]
    branch_rows: tuple[tuple[int, ...], ...]
    unique_tokens: int
    unshared_tokens: int
    padded_tokens: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return _mapped(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch with its tensors in page-locked memory."""
        return _mapped(self, Tensor.pin_memory)


def pack(trees: Sequence[Tree], token_budget: int, seed: int | None = None) -> list[PackedBatch]:
    """Plan and collate all `trees`: every tree once, whole, in batches of at most `token_budget` rows."""
    plan = plan_batches([tree.num_tokens for tree in trees], token_budget, seed, names=[str(tree) for tree in trees])
    return [collate(trees, indices) for indices in plan]


def plan_batches(
    sizes: Sequence[int],
    token_budget: int,
    seed: int | None = None,
    names: Sequence[str] | None = None,
    most: int | None = None,
) -> list[list[int]]:
    """Best-fit-decreasing bin packing: which trees, by index, go into which batch.

    A pure function of its arguments, so a resumed run that skips the first k batches continues the same epoch.

    Args:
        sizes: rows of each tree (`Tree.num_tokens`).
        token_budget: rows a batch may hold.
        seed: None packs everything at once, batches in the order of their smallest index. A number shuffles the trees,
            packs them pool by pool (`POOL_BUDGETS` batches' worth each: which trees meet changes with the seed) and
            shuffles the batches.
        names: what to call the trees in errors.
        most: trees a batch may hold; None: as many as fit.

    Raises:
        AlroFastError: a tree is larger than the budget, or the budget is not positive.
    """
    if token_budget < 1:
        raise AlroFastError(f"token_budget is {token_budget}; expected at least 1")
    lengths = np.asarray(sizes, dtype=np.int64)
    if len(lengths) and lengths.max() > token_budget:
        worst = int(lengths.argmax())
        name = names[worst] if names is not None else "tree"
        raise AlroFastError(
            f"{name} (number {worst}) takes {lengths[worst]} tokens, more than token_budget {token_budget}: a tree is "
            f"never split; raise token_budget to {lengths[worst]} or more, or shorten the history"
        )
    if seed is None:
        return sorted(sorted(batch) for batch in _best_fit_decreasing(range(len(lengths)), lengths, token_budget, most))
    return _shuffled_plan(lengths, token_budget, seed, most=most)


class EpochPlans:
    """Plans of every epoch over the same trees: other neighbours each time, and always the same number of batches.

    An epoch's plan is that of `plan_batches(sizes, token_budget, seed + epoch)`, the first to the letter, brought to
    `num_batches`: packed pool by pool, one order of the trees needs a few batches more than another. A plan of fewer
    halves its batches of most trees; one of more packs its emptiest batches anew, together. That always suffices,
    because `num_batches` is no less than best-fit-decreasing over all trees needs, whatever their order.

    Args:
        sizes: rows of each tree.
        token_budget: rows a batch may hold.
        seed: None for one plan that all epochs share (`plan_batches` without a seed).
        most: trees a batch may hold; None: as many as fit.

    Raises:
        AlroFastError: as `plan_batches`.
    """

    def __init__(self, sizes: Sequence[int], token_budget: int, seed: int | None, most: int | None = None) -> None:
        self.lengths, self.token_budget, self.seed = np.asarray(sizes, dtype=np.int64), token_budget, seed
        self.most = most
        densest = plan_batches(sizes, token_budget, most=most)
        first = densest if seed is None else plan_batches(sizes, token_budget, seed, most=most)
        self.num_batches = max(len(first), len(densest))

    def __call__(self, epoch: int) -> list[list[int]]:
        """Which trees go into which batch of an epoch: every tree once, `num_batches` batches within the budget."""
        if self.seed is None:
            return plan_batches(self.lengths.tolist(), self.token_budget, most=self.most)
        # trees of fewer than two pools are halved: one pool of all trees is packed much alike in every epoch
        pool = POOL_BUDGETS if epoch == 0 else min(POOL_BUDGETS, -(-self.num_batches // 2))
        return _shuffled_plan(self.lengths, self.token_budget, self.seed + epoch, pool, self.num_batches, self.most)


def halve(batches: list[list[int]], place: int) -> None:
    """Put two batches in the place of one, in their order, in the list itself."""
    middle = len(batches[place]) // 2
    batches[place : place + 1] = [batches[place][:middle], batches[place][middle:]]


def plan_forwards(sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """`plan_batches` where a tree larger than the budget is no error, but a batch of its own. 0: every tree is."""
    fitting = [i for i, size in enumerate(sizes) if size <= token_budget]
    plan = plan_batches([sizes[i] for i in fitting], token_budget) if fitting else []
    alone = [[i] for i, size in enumerate(sizes) if size > token_budget]
    return sorted([[fitting[i] for i in batch] for batch in plan] + alone)


def collate(trees: Sequence[Tree], indices: Sequence[int]) -> PackedBatch:
    """Lay `trees[i] for i in indices` side by side in one stream."""
    if not len(indices):
        raise AlroFastError("no trees to collate; a batch needs at least one")
    spans, ids, positions, answer_rows, labels, branch_rows = [], [], [], [], [], []
    start = row = 0  # of the tree at hand: its first row in the stream, its first answer row
    for index in indices:
        tree = trees[index]
        prefix = tree.prefix_length
        span = TreeSpan(start, prefix, tuple(len(branch) - prefix for branch in tree.ids))
        spans.append(span)
        # The prefix once, then what each branch has of its own; positions count from each branch's own beginning.
        ids += [tree.ids[0][:prefix], *(branch[prefix:] for branch in tree.ids)]
        positions += [np.arange(prefix), *(np.arange(prefix, len(branch)) for branch in tree.ids)]
        offsets = [row]
        own = start + prefix  # where the own rows of the branch at hand begin
        for branch, answer_start in zip(tree.ids, tree.answer_starts):
            # Answer tokens are predicted one row earlier; by position in the branch, then by row of the stream. An
            # answer that begins at or before the end of the prefix is predicted from rows all branches share.
            predicting = np.arange(answer_start - 1, len(branch) - 1)
            answer_rows.append(np.where(predicting < prefix, predicting + start, predicting + (own - prefix)))
            labels.append(branch[answer_start:])
            own += len(branch) - prefix
            row += len(predicting)
            offsets.append(row)
        branch_rows.append(tuple(offsets))
        start = span.end
    # From here on for the batch as a whole: which tree and which branch (of that tree) every answer row is of.
    branches = [branch for offsets in branch_rows for branch in range(len(offsets) - 1)]
    rows_per_branch = np.concatenate([np.diff(offsets) for offsets in branch_rows])
    tree_of_branch = np.repeat(np.arange(len(spans)), [len(span.lengths) for span in spans])
    lengths = [len(branch) for index in indices for branch in trees[index].ids]
    rows = torch.from_numpy(np.concatenate(answer_rows))
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        segments=Segments(
            spans=tuple(spans),
            stream=_stream_sequences(spans),
            answers=_answer_sequences([trees[index] for index in indices], spans),
            answer_rows=rows,
            answer_counts=tuple(offsets[-1] - offsets[0] for offsets in branch_rows),
        ),
        answer_rows=rows,
        labels=torch.from_numpy(np.concatenate(labels)),
        row_tree=torch.from_numpy(np.repeat(tree_of_branch, rows_per_branch)),
        row_branch=torch.from_numpy(np.repeat(np.asarray(branches), rows_per_branch)),
        tree_indices=tuple(int(index) for index in indices),
        branch_rows=tuple(branch_rows),
        unique_tokens=start,
        unshared_tokens=sum(lengths),
        padded_tokens=len(lengths) * max(lengths),
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


def _common_prefix(branches: Sequence[np.ndarray]) -> int:
    first = branches[0]
    common = min(len(ids) for ids in branches)
    for ids in branches[1:]:
        different = np.flatnonzero(first[:common] != ids[:common])
        common = int(different[0]) if len(different) else common
    return common


def _shuffled_plan(
    lengths: np.ndarray,
    budget: int,
    seed: int,
    pool: int = POOL_BUDGETS,
    num_batches: int | None = None,
    most: int | None = None,
) -> list[list[int]]:
    """The plan of a seed (`plan_batches`), from pools of `pool` batches' worth; of `num_batches` if that is given."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    taken = lengths[order] if most is None else np.maximum(lengths[order], -(-budget // most))  # of a batch, by each
    pool_of = (np.cumsum(taken) - 1) // (pool * budget)
    pools = np.split(order, np.flatnonzero(np.diff(pool_of)) + 1)
    batches = [sorted(batch) for pool in pools for batch in _best_fit_decreasing(pool.tolist(), lengths, budget, most)]
    if num_batches is not None:
        batches = _condensed(batches, num_batches, lengths, budget, most)
        while len(batches) < num_batches:
            halve(batches, max(range(len(batches)), key=lambda b: len(batches[b])))
    return [batches[b] for b in generator.permutation(len(batches))]


def _condensed(
    batches: list[list[int]], limit: int, lengths: np.ndarray, budget: int, most: int | None
) -> list[list[int]]:
    """The same trees in at most `limit` batches: the emptiest are packed anew, twice as many until that suffices."""
    fullest_first = sorted(batches, key=lambda batch: -lengths[batch].sum())
    loose = len(batches) - limit
    while len(batches) > limit:
        loose = min(2 * loose, len(fullest_first))
        kept, items = fullest_first[:-loose], [item for batch in fullest_first[-loose:] for item in batch]
        batches = kept + [sorted(batch) for batch in _best_fit_decreasing(items, lengths, budget, most)]
    return batches


def _best_fit_decreasing(items: Sequence[int], lengths: np.ndarray, budget: int, most: int | None) -> list[list[int]]:
    """Largest first, each into the fullest batch that still has room; of several, into the one opened first. A batch of
    `most` trees has none."""
    batches: list[list[int]] = []
    frees: list[int] = []  # rows that some batch has free, ascending
    having: dict[int, list[int]] = {}  # free rows -> a heap of the batches that have them
    for item in sorted(items, key=lambda i: -lengths[i]):
        size = int(lengths[item])
        place = bisect.bisect_left(frees, size)
        if place < len(frees):
            free = frees[place]
            batch = heapq.heappop(having[free])
            batches[batch].append(item)
            if not having[free]:
                del having[free], frees[place]
        else:
            free, batch = budget, len(batches)
            batches.append([item])
        if len(batches[batch]) == most:
            continue
        if free - size not in having:
            having[free - size] = []
            bisect.insort(frees, free - size)
        heapq.heappush(having[free - size], batch)
    return batches


def _stream_sequences(spans: Sequence[TreeSpan]) -> Varlen:
    q_lengths, k_lengths, keys = [], [], []
    for span in spans:
        own = span.start + span.prefix
        for branch, length in enumerate(span.lengths):
            if branch == 0:
                q_lengths.append(span.prefix + length)
                keys.append(np.arange(span.start, own + length))
            elif length:
                q_lengths.append(length)
                keys += [np.arange(span.start, span.start + span.prefix), np.arange(own, own + length)]
            if branch == 0 or length:
                k_lengths.append(span.prefix + length)
            own += length
    return _varlen(q_lengths, k_lengths, keys if sum(k_lengths) > sum(q_lengths) else None)


def _answer_sequences(trees: Sequence[Tree], spans: Sequence[TreeSpan]) -> Varlen:
    q_lengths, k_lengths, keys = [], [], []
    for tree, span in zip(trees, spans):
        own = span.start + span.prefix
        for ids, answer_start, length in zip(tree.ids, tree.answer_starts, span.lengths):
            rows = np.concatenate([np.arange(span.start, span.start + span.prefix), np.arange(own, own + length)])
            q_lengths.append(len(ids) - answer_start)
            k_lengths.append(len(ids) - 1)  # the last token of a branch predicts nothing
            keys.append(rows[:-1])
            own += length
    return _varlen(q_lengths, k_lengths, keys)


def _varlen(q_lengths: Sequence[int], k_lengths: Sequence[int], keys: Sequence[np.ndarray] | None) -> Varlen:
    return Varlen(
        kv_index=None if keys is None else torch.from_numpy(np.concatenate(keys)),
        cu_seqlens_q=torch.from_numpy(np.cumsum([0, *q_lengths], dtype=np.int32)),
        cu_seqlens_k=torch.from_numpy(np.cumsum([0, *k_lengths], dtype=np.int32)),
        max_seqlen_q=max(q_lengths),
        max_seqlen_k=max(k_lengths),
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
