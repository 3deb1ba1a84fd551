"""What a model says of RecRanker's three tasks, read from its logits: no text is written, none is parsed.

| task | read |
| --- | --- |
| pointwise | expected grade of every candidate: sum_c v_c P(c), P over the tokens of the grades |
| pairwise | P(the first is preferred), P over Yes and No, averaged over both orders of naming the two, or in one |
| listwise | log-probability of naming the candidate first, normalised over the candidates |

All questions about a list, of every presentation, are one tree over two pages. Of a list with more
candidates than identifiers, grades and pairs are asked as ever; only its listwise order takes sliding windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from ..data.seeds import generator
from ..modeling.packing import Branch, Tree
from ..prompts.recranker import Ask, TaskPrompts
from .hybrid import constants_of, first_shares, pairs_of, utilities, ways_of, win_shares
from .options import TASK_METHODS
from .orders import Ranking, make_ranking, slide

if TYPE_CHECKING:
    from ..data.records import RankingList
    from ..prompts.recranker import RecRankerPrompts
    from .reading import BranchReader

_Branch = tuple[list[int], int, list[int] | None]


class Reading(NamedTuple):
    """One list's answers; None for a task that was not asked. B presentations, m candidates, all float64."""

    grades: np.ndarray | None  # [m], on the rating scale
    wins: np.ndarray | None  # [B, m], mean probability of being preferred to the others it was paired with
    named: np.ndarray | None  # [B, m], log-probability of being named first; of a long list minus the place

    def scores(self, method: str, hybrid: str) -> np.ndarray:
        """Scores of a method of TASK_METHODS, [B, m], higher is better."""
        grades, wins, named = (cast(np.ndarray, part) for part in self)
        if method == "pointwise":
            return grades[None]
        if method != "hybrid":
            return wins if method == "pairwise" else named
        places = np.argsort(np.argsort(-named, axis=1, kind="stable"), axis=1, kind="stable")
        rows = zip(wins, places, strict=True)
        return np.stack([utilities(grades, won, place, constants_of(hybrid)) for won, place in rows])


def read_tasks(
    reader: BranchReader,
    prompts: RecRankerPrompts,
    lists: Sequence[RankingList],
    presented: Sequence[np.ndarray],
    method: str = "hybrid",
    *,
    pairing: str = "matching",
    pair_orders: str = "both",
    seed: int = 0,
) -> list[Reading]:
    """Readings of every list, of the tasks that `method` needs.

    presented: [B, m] per list, the orders that listwise questions show; each comes with a pairing of its own, drawn
    from (seed, its number, list id) where it is random. With more candidates than identifiers each is slid over by
    itself, and `named` is minus the place.
    """
    wanted = {name: method in (name, "hybrid") for name in TASK_METHODS}
    most = prompts.max_candidates
    asks, pairs = [], []
    for entry, shown in zip(lists, presented, strict=True):
        m = len(entry.candidates)
        drawn = [pairs_of(m, pairing, generator(seed, b, name=entry.list_id)) for b in range(len(shown))]
        pairs.append(drawn)
        asks.append(
            Ask(
                entry,
                range(m) if wanted["pointwise"] else (),
                ways_of(chain(*drawn), pair_orders) if wanted["pairwise"] else (),
                shown.tolist() if wanted["listwise"] and m <= most else (),
            )
        )
    encoded = prompts.encode(asks)
    trees, tokens = [], []
    for entry, made in zip(lists, encoded, strict=True):
        branches = []
        pages = _questions(made, prompts.grade_ids, prompts.choice_ids)
        for page, questions in zip((made.rated_ids, made.liked_ids), pages, strict=True):
            branches += [Branch(page + ids, len(page) + start) for ids, start, _ in questions]
            tokens += [asked for _, _, asked in questions]
        if branches:  # a lone candidate is in no pair
            reader.check_length(entry, max(len(branch.ids) for branch in branches))
            trees.append(Tree(branches, name=f"list {entry.list_id}"))
    read = iter(reader.read(trees, tokens))
    values = np.asarray(prompts.grade_values, dtype=np.float64)
    readings = [
        _reading(made, ask, drawn, pair_orders, wanted, read, values)
        for made, ask, drawn in zip(encoded, asks, pairs, strict=True)
    ]  # fmt: skip
    if wanted["listwise"]:
        long = [n for n, entry in enumerate(lists) if len(entry.candidates) > most]
        slid = _named_by_windows(reader, prompts, [lists[n] for n in long], [presented[n] for n in long])
        for n, named in zip(long, slid, strict=True):
            readings[n] = readings[n]._replace(named=named)
    return readings


def _named_by_windows(
    reader: BranchReader, prompts: RecRankerPrompts, lists: Sequence[RankingList], presented: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Minus the listwise place, [B, m], of every candidate of each long list, whose every presentation is slid over:
    the windows of one turn, of all presentations of all lists, are read together."""

    def rank(parts: list[RankingList]) -> list[Ranking]:
        shown = [np.arange(len(part.candidates))[None] for part in parts]
        readings = read_tasks(reader, prompts, parts, shown, "listwise")
        return [
            make_ranking(part, order, reading.scores("listwise", "code"), "mean")
            for part, order, reading in zip(parts, shown, readings)
        ]

    slid = iter(
        slide(
            [one.select(order) for one, orders in zip(lists, presented) for order in orders],
            prompts.max_candidates,
            rank,
        )
    )
    found = [np.empty(orders.shape) for orders in presented]
    for named, orders in zip(found, presented):
        for row, order in zip(named, orders):
            row[order] = next(slid).scores
    return found


def _questions(made: TaskPrompts, grades: list[int], choices: list[int]) -> tuple[list[_Branch], list[_Branch]]:
    """Per page, its branches as (ids after the page, where the answer starts in them, the tokens to read).

    Tokens None: the answer's own tokens are read, a title's.
    """
    points: list[_Branch] = [([*one.ids, grades[0]], len(one.ids), grades) for one in made.points]
    others: list[_Branch] = [([*one.ids, choices[0]], len(one.ids), choices) for one in made.pairs]
    for one in made.listings:
        if all(len(entry) == 1 for entry in one.entries):
            tokens = [token for (token,) in one.entries]
            others.append(([*one.ids, tokens[0]], len(one.ids), tokens))
        else:
            others += [([*one.ids, *entry], len(one.ids), None) for entry in one.entries]
    return points, others


def _reading(
    made: TaskPrompts,
    ask: Ask,
    drawn: list[list[tuple[int, int]]],
    pair_orders: str,
    wanted: dict[str, bool],
    read: Iterator[np.ndarray],
    values: np.ndarray,
) -> Reading:
    m = len(ask.source.candidates)
    grades = wins = named = None
    if wanted["pointwise"]:
        grades = np.array([_softmax(next(read)) @ values for _ in made.points])
    if wanted["pairwise"]:
        wins = np.empty((len(drawn), m))
        for b, pairs in enumerate(drawn):
            first_named = [float(_softmax(next(read))[0]) for _ in ways_of(pairs, pair_orders)]
            wins[b] = win_shares(m, pairs, first_shares(first_named, pair_orders))
    if made.listings:
        named = np.empty((len(made.listings), m))
        for b, one in enumerate(made.listings):
            single = all(len(entry) == 1 for entry in one.entries)
            row = next(read) if single else np.array([next(read).item() for _ in one.entries])
            named[b] = row - row.max() - np.log(np.exp(row - row.max()).sum())
    return Reading(grades, wins, named)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
