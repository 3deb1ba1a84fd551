"""Ranking lists as the losses take them: tensors of a batch, and their checks.

Three things go by the name of lists, one at each stage of the way to a loss:

    data.lists.Lists           a prepared split on disk: a sequence that makes a record when it is asked for one
    data.records.RankingList   that record: one user's history, candidates and their ratings, in words
    losses.RankingLists        many presentations of them in one batch: where each slot's row, identifier and grade are
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.records import LARGEST_RATING
from ..errors import AlroFastError
from ..ops.checks import check_floats, check_index, check_ranks, check_values, values_are_free


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


def _check_distinct(name: str, ids: Tensor) -> None:
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        place, column = repeated.nonzero()[0].tolist()
        raise AlroFastError(
            f"{name} holds token {int(ordered[place, column])} twice in list {place}; expected distinct tokens"
        )
