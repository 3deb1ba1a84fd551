"""Ranking lists as the losses take them: tensors of a batch, and their checks.

Three things go by the name of lists, one at each stage of the way to a loss:

    data.lists.Lists           a prepared split on disk: a sequence that makes a record when it is asked for one
    data.records.RankingList   that record: one user's history, candidates and their ratings, in words
    losses.RankingLists        many presentations of them in one batch: where each slot's row, identifier and grade are
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.records import LARGEST_RATING, target_ranks
from ..errors import AlroFastError
from ..ops.checks import check_floats, check_index, check_number, check_ranks, check_values, values_are_free
from .given import is_whole, ratings_of, rows_of, tokens_of, whole_of


class Grades(NamedTuple):
    """The `ratings` answer form: one grade token per candidate, read as the expectation of `values`."""

    token_ids: Tensor  # [C] int64, distinct
    values: Tensor  # [C] float, the grade each token stands for


class RankingLists(NamedTuple):
    """A batch of L presentations of at most M candidates, as tensors that point into its answer rows and vocabulary.

    Not a `RankingList` (one user's record, in words), of which each may be here several times, in several orders. Axis
    i is in item space: one item in a list and in its twin.

    A list of n candidates fills the first n entries of its rows; the rest are pads.
    """

    slot_rows: Tensor  # [L, M] int64: row of `hidden` that predicts slot k (ratings form: candidate i's grade); -1 pads
    candidate_ids: Tensor  # [L, M] int64: identifier token of candidate i in list l's own prompt; -1 pads
    ratings: Tensor  # [L, M] float >= 0: graded relevance of candidate i; NaN = ungraded
    ranks: Tensor  # [L, M] int64: target slot of candidate i, 1 = best
    twin: Tensor  # [L] int64: the list this one is a re-ordering of; -1: none
    grades: Grades | None = None  # None: the `ranking` form

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RankingLists:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, non_blocking=non_blocking)

        grades = None if self.grades is None else Grades._make(map(move, self.grades))
        return RankingLists._make([*map(move, self[:5]), grades])

    @classmethod
    def from_ratings(
        cls,
        ratings: Sequence[Sequence[float]] | Tensor,
        candidate_ids: Sequence[Sequence[int]] | Tensor | None = None,
        *,
        twin: Sequence[int] | Tensor | None = None,
        first_rows: Sequence[int] | Tensor | None = None,
        step: int = 1,
        ties: Sequence[Sequence[Any]] | None = None,
        grades: Grades | None = None,
    ) -> RankingLists:
        """The lists of a batch, each of any length, from what is known of them; their labels: `labels()`.

        Sequences, arrays and tensors are taken alike.
        ratings: of every list's candidates, in 0 .. LARGEST_RATING, higher is better; NaN: ungraded. candidate_ids: the
        token that names each of them in the list's own prompt, all different; left out where answers are `grades`.
        twin: for a re-ordered list the number of the list it re-orders, -1 for others; None: none is. Items stand in
        the same places in both.
        first_rows: row of `hidden` that predicts a list's first slot, the others `step` rows apart (2 where a separator
        stands between identifiers); None: one list after the other from row 0 on. Answers of `grades` may share rows.
        ties: something to sort by for every candidate, such as item ids, by which equal ratings are ordered; None: by
        their places.
        Raises AlroFastError naming the argument that does not fit.
        """
        rated = ratings_of("ratings", ratings)
        if not rated:
            raise AlroFastError("ratings holds no lists; expected one at least")
        if (candidate_ids is None) == (grades is None):
            raise AlroFastError(
                "candidate_ids are for answers of identifiers, and left out with grades; give one of them"
            )
        sizes = [len(each) for each in rated]
        count = len(sizes)
        ids = [[-1] * size for size in sizes] if candidate_ids is None else tokens_of("candidate_ids", candidate_ids)
        keys = [list(range(size)) for size in sizes] if ties is None else rows_of("ties", ties)
        for name, rows in (("candidate_ids", ids), ("ties", keys)):
            if [len(each) for each in rows] != sizes:
                raise AlroFastError(
                    f"{name} and ratings differ in their lengths; expected one entry for every candidate"
                )
        if not is_whole(step) or step < 1:
            raise AlroFastError(f"step is {step!r}; expected a whole number of at least 1")
        twins = [-1] * count if twin is None else whole_of("twin", twin, -1, count)
        starts = [0, *itertools.accumulate(size * step for size in sizes[:-1])]
        if first_rows is not None:
            starts = whole_of("first_rows", first_rows, 0)
        for name, entries in (("twin", twins), ("first_rows", starts)):
            if len(entries) != count:
                raise AlroFastError(f"{name} has {len(entries)} entries for {count} lists; expected one for each")
        made = cls(
            _padded([range(start, start + size * step, step) for start, size in zip(starts, sizes)], -1, torch.long),
            _padded(ids, -1, torch.long),
            _padded(rated, math.nan, torch.float32),
            _padded([_ranks(number, *each) for number, each in enumerate(zip(rated, keys))], 0, torch.long),
            torch.tensor(twins, dtype=torch.long),
            grades,
        )
        if grades is None:
            _check_distinct("candidate_ids", made.candidate_ids)
            _check_own_rows(made.slot_rows)
        _check_twins(made)
        return made

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> RankingLists:
        """Those of a batch of `RankingCollator`."""
        return cls(*(batch[name] for name in cls._fields[:5]))

    def labels(self, row_count: int | None = None, ignore_index: int = -100) -> Tensor:
        """[N] int64: the token that each of `row_count` rows (None: up to the last slot's) is to predict.

        Identifiers in target order, or the grade that stands for a rating. `ignore_index` elsewhere: on rows of
        separators and ends, which are the caller's to fill in, and where a rating has no grade.
        """
        used = self.slot_rows >= 0
        last = int(self.slot_rows.max()) + 1 if self.slot_rows.numel() else 0
        row_count = last if row_count is None else row_count
        if last > row_count:
            raise AlroFastError(f"slot_rows reach row {last - 1}; expected rows below row_count, {row_count}")
        labels = torch.full((row_count,), ignore_index, dtype=torch.long, device=self.slot_rows.device)
        tokens = _targets(self)
        labels[self.slot_rows[used].long()] = torch.where(tokens < 0, ignore_index, tokens)[used]
        return labels


def _targets(lists: RankingLists) -> Tensor:
    """[L, M] int64: the token that each slot's row is to predict; -1 on pads and for a rating without a grade."""
    used = lists.slot_rows >= 0
    if lists.grades is not None:
        same = lists.ratings[:, :, None] == lists.grades.values.to(lists.ratings.dtype)
        tokens = torch.where(same, lists.grades.token_ids.long(), -1)
        return tokens.amax(dim=2).masked_fill(~used, -1)
    return _by_slot(lists, lists.candidate_ids.long(), -1)


def _by_slot(lists: RankingLists, values: Tensor, pad: float) -> Tensor:
    """Values of candidates [L, M] in the order of their ranks."""
    used = lists.slot_rows >= 0
    place = torch.where(used, lists.ranks.long() - 1, torch.arange(used.shape[1], device=used.device))
    return torch.full_like(values, pad).scatter(1, place, values.masked_fill(~used, pad))


def by_row(labels: Tensor) -> Tensor:
    """Labels [N] or [N, K] as int64 [N, K]: a row may predict tokens of several sequences."""
    return labels.long().view(len(labels), *(labels.shape[1:] or [1]))


def _ranks(number: int, ratings: Sequence[float], keys: Sequence[Any]) -> list[int]:
    try:
        return target_ranks(ratings, keys)
    except TypeError:
        raise AlroFastError(
            f"ties of list {number} cannot be sorted; expected all of one kind, such as strings or numbers"
        ) from None


def _padded(rows: Sequence[Sequence[float]], pad: float, dtype: torch.dtype) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=dtype)


def checked_counts(counts: ALROCounts) -> ALROCounts:
    """Denominators given by a caller, 0 (of what a batch has none of) as 1; AlroFastError for what is no count."""
    made: list[Tensor | float] = []
    for name, count in zip(ALROCounts._fields, counts):
        if not isinstance(count, Tensor):
            check_number(f"counts.{name}", count, lambda n: 0 <= n < math.inf, "a count, a finite number of at least 0")
            made.append(count or 1.0)
            continue
        check_values(f"counts.{name}", count, (count >= 0) & count.isfinite(), "of at least 0, finite")
        made.append(torch.where(count == 0, 1, count))
    return ALROCounts._make(made)


def alro_counts(labels: Tensor, lists: RankingLists, ignore_index: int = -100) -> ALROCounts:
    """The denominators `alro_loss` uses by default, as tensors, without synchronisation; they add up over batches."""
    lists_with_candidates = (lists.slot_rows >= 0).any(dim=1).sum()
    return ALROCounts((labels != ignore_index).sum(), lists_with_candidates, (lists.twin >= 0).sum())


class ALROCounts(NamedTuple):
    """What the three means divide by; give those of the whole batch when it is split over steps or processes."""

    rows: Tensor | float  # with a label; of several labels, each
    lists: Tensor | float  # with a candidate
    twins: Tensor | float  # with a twin


def check_lists(
    labels: Tensor,
    lists: RankingLists,
    row_count: int,
    vocab_size: int,
    ignore_index: int = -100,
    *,
    force: bool = False,
) -> None:
    """Raises AlroFastError naming the argument when labels or lists do not fit `row_count` rows and the vocabulary.

    Shapes and dtypes always; values only on the CPU outside torch.compile, or with `force`, which synchronises: check a
    batch before it moves to CUDA.
    """
    if not isinstance(lists, RankingLists):
        raise AlroFastError(
            f"lists is a {type(lists).__name__}; expected RankingLists, as RankingLists.from_ratings makes them"
        )
    shape = lists.slot_rows.shape
    if len(shape) != 2:
        raise AlroFastError(f"slot_rows has shape {tuple(shape)}; expected [L, M]")
    wanted = {
        "labels": (row_count, *labels.shape[1:2]),
        "slot_rows": shape,
        "candidate_ids": shape,
        "ratings": shape,
        "ranks": shape,
        "twin": shape[:1],
    }
    for name, expected in wanted.items():
        tensor = labels if name == "labels" else getattr(lists, name)
        if tensor.shape != expected:
            raise AlroFastError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)}")
        if name == "ratings":
            check_floats(name, tensor, labels, "labels")
        else:
            check_index(name, tensor, labels, "labels")
    if lists.grades is not None:
        _check_grades(lists.grades, labels)
    if force and labels.device.type != "cpu":
        labels, lists = labels.cpu(), lists.to("cpu")
    if values_are_free(labels):
        _check_list_values(labels, lists, row_count, vocab_size, ignore_index)


def _check_grades(grades: Grades, labels: Tensor) -> None:
    token_ids, values = grades
    if token_ids.dim() != 1 or token_ids.shape != values.shape or len(values) == 0:
        raise AlroFastError(
            f"grades has token_ids {tuple(token_ids.shape)} and values {tuple(values.shape)}; "
            "expected [C] both, a value for each of at least one token"
        )
    check_index("grades.token_ids", token_ids, labels, "labels")
    check_floats("grades.values", values, labels, "labels")


def _check_list_values(labels: Tensor, lists: RankingLists, row_count: int, vocab_size: int, ignore_index: int) -> None:
    in_vocab = f"in 0 .. {vocab_size - 1}"
    slot_rows, candidate_ids, ratings, ranks, twin, grades = lists
    known = (labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))
    check_values("labels", labels, known, f"{in_vocab}, or {ignore_index}")
    check_values("slot_rows", slot_rows, slot_rows < row_count, f"below the {row_count} rows of hidden, -1 on pads")
    check_values("slot_rows", slot_rows, slot_rows >= -1, "at least -1, the pad")
    used = slot_rows >= 0
    if (used[:, 1:] & ~used[:, :-1]).any():
        raise AlroFastError("slot_rows has a slot after a pad; expected each list's slots first, then its pads")
    sizes = used.sum(dim=1)
    if grades is None:
        _check_distinct("slot_rows", slot_rows, "row")  # graded candidates of one text may share theirs
        check_values("candidate_ids", candidate_ids, candidate_ids < vocab_size, f"{in_vocab}, -1 on pads")
        check_values(
            "candidate_ids", candidate_ids, (candidate_ids >= 0) == used, "on slots and -1 on the pads of slot_rows"
        )
        _check_distinct("candidate_ids", candidate_ids)
    else:
        check_values(
            "grades.token_ids",
            grades.token_ids,
            (grades.token_ids >= 0) & (grades.token_ids < vocab_size),
            in_vocab,
        )
        _check_distinct("grades.token_ids", grades.token_ids[None])
        check_values("grades.values", grades.values, grades.values.isfinite(), "finite")
    bounded = (ratings >= 0) & (ratings <= LARGEST_RATING) | ratings.isnan()
    check_values("ratings", ratings, ~used | bounded, f"in 0 .. {LARGEST_RATING:g} (gains are 2^rating - 1), or NaN")
    check_ranks(ranks, sizes)
    check_values("twin", twin, (twin >= -1) & (twin < len(twin)), f"in -1 .. {len(twin) - 1}")
    _check_twins(lists)
    of, has_twin = twin.clamp(min=0), twin >= 0
    shared = has_twin & (sizes > 0) & ((slot_rows == slot_rows[of]) | ~used).all(dim=1)
    if grades is None and shared.any():
        place = int(shared.nonzero()[0, 0])
        raise AlroFastError(
            f"slot_rows of list {place} and of list {int(twin[place])}, which it is the twin of, are the same rows; a "
            "list in another order has a prompt and rows of its own"
        )
    if grades is None and labels.shape[1:] in ((), (1,)):  # of several labels, each list has its own
        _check_own_rows(slot_rows)
    _check_agreement(labels, lists, ignore_index)


def _check_twins(lists: RankingLists) -> None:
    """A twin re-orders an original, item for item."""
    slot_rows, _, ratings, _, twin, _ = lists
    used = slot_rows >= 0
    sizes = used.sum(dim=1)
    of = twin.clamp(min=0)
    has_twin = twin >= 0
    if (has_twin & (twin[of] >= 0)).any():
        place = int((has_twin & (twin[of] >= 0)).nonzero()[0, 0])
        raise AlroFastError(f"twin[{place}] is {int(twin[place])}, itself a twin; expected the original list or -1")
    same = (ratings == ratings[of]) | (ratings.isnan() & ratings[of].isnan()) | ~used
    wrong = has_twin & ((sizes != sizes[of]) | ~same.all(dim=1))
    if wrong.any():
        place = int(wrong.nonzero()[0, 0])
        raise AlroFastError(
            f"twin[{place}] is {int(twin[place])}, whose size or ratings differ; expected one axis of items in both"
        )


def _check_agreement(labels: Tensor, lists: RankingLists, ignore_index: int) -> None:
    """Ranks and ratings, and labels and candidates, say the same."""
    used = lists.slot_rows >= 0
    best_first = _by_slot(lists, lists.ratings.nan_to_num(nan=-1.0), -1.0)
    wrong = (used[:, 1:] & (best_first[:, 1:] > best_first[:, :-1])).nonzero()
    if len(wrong):
        place, slot = wrong[0].tolist()
        before, after = (
            f"a rating of {value:g}" if value >= 0 else "no rating"
            for value in best_first[place, slot : slot + 2].tolist()
        )
        raise AlroFastError(
            f"ranks of list {place} put {before} before {after}; expected higher ratings first, ungraded ones last"
        )
    rows = lists.slot_rows.clamp(min=0).long()
    every = by_row(labels)
    found, tokens = every[rows] if len(labels) else rows[..., None], _targets(lists)
    labelled = used & (found != ignore_index).any(dim=-1)
    wrong = labelled & (tokens >= 0) & (found != tokens[..., None]).all(dim=-1)
    if lists.grades is not None:  # a rating between grades: any of them may stand for it
        wrong |= labelled & (tokens < 0) & ~torch.isin(found, lists.grades.token_ids).any(dim=-1)
    if wrong.any():
        place, slot = wrong.nonzero()[0].tolist()
        what = f"token {int(tokens[place, slot])}" if tokens[place, slot] >= 0 else "one of grades.token_ids"
        raise AlroFastError(
            f"labels holds {int(found[place, slot, 0])} at row {int(rows[place, slot])}, which slot_rows names for "
            f"slot {slot} of list {place}; expected {what}, or {ignore_index}: are the rows off by one, or "
            "candidate_ids or ratings of another order?"
        )


def check_shared_tokens(lists: RankingLists) -> None:
    """The whole-vocabulary divergence pairs tokens by item, so a list and its twin must use the same ones."""
    own = lists.candidate_ids.sort(dim=1).values
    wrong = (lists.twin >= 0) & (own != own[lists.twin.clamp(min=0)]).any(dim=1)
    if wrong.any():
        place = int(wrong.nonzero()[0, 0])
        raise AlroFastError(
            f"candidate_ids of list {place} and of its twin {int(lists.twin[place])} are different sets of tokens; "
            "psl_space='vocab' needs the same set, in any order"
        )


def _check_own_rows(slot_rows: Tensor) -> None:
    """A row predicts one token, so it is of one slot of one list."""
    taken, order = slot_rows.flatten().sort(stable=True)
    twice = ((taken[1:] == taken[:-1]) & (taken[1:] >= 0)).nonzero()
    if len(twice):
        place = int(twice[0, 0])
        one, other = (int(at) // slot_rows.shape[1] for at in order[place : place + 2])
        raise AlroFastError(
            f"slot_rows holds row {int(taken[place])} in list {one} and in list {other}; expected rows of its own for "
            "every list (first_rows and step of from_ratings), or labels [N, K] where lists share a prompt"
        )


def _check_distinct(name: str, ids: Tensor, what: str = "token") -> None:
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        place, column = repeated.nonzero()[0].tolist()
        raise AlroFastError(
            f"{name} holds {what} {int(ordered[place, column])} twice in list {place}; expected distinct {what}s"
        )
