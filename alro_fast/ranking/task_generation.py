"""RecRanker's own way to its hybrid, for comparison: every question answered by generated text, the texts parsed.

Per list of ten: ten grades, five pairs in both orders, one list, so 21 answers. As in the release, a grade that cannot
be read is the middle one, and candidates that a list does not name get nothing for it (Luo et al., arXiv 2312.16018).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np

from ..data.seeds import generator
from ..processes.dealing import dealt
from ..prompts.recranker import TOP, Ask
from .generation import Generated, mentions, write_answers
from .hybrid import constants_of, first_shares, pairs_of, places_of, utilities, ways_of, win_shares
from .orders import unlabelled

if TYPE_CHECKING:
    from ..data.records import RankingList
    from ..prompts.recranker import RecRankerPrompts
    from .ranker import Ranker

SLACK = 4  # tokens that an answer may take beyond its own length


def generate_tasks(
    ranker: Ranker,
    lists: Sequence[RankingList],
    *,
    hybrid: str | None = None,
    pairing: str = "matching",
    pair_orders: str = "both",
    seed: int = 0,
    batch_size: int = 8,
) -> Generated:
    """Every list ordered by the hybrid of parsed answers; equal utilities keep the list's order.

    `valid`: every answer about the list could be read in full. `texts`: its answers, one per line. Lists are dealt over
    processes (`processes.dealing`).
    """
    constants = constants_of(hybrid or ranker.hybrid)

    def answered(entry: RankingList) -> tuple[list[int], bool, str]:
        m = len(entry.candidates)
        pairs = pairs_of(m, pairing, generator(seed, 0, name=entry.list_id))
        ways = ways_of(pairs, pair_orders)
        prompts = cast("RecRankerPrompts", ranker.prompts).encode([Ask(entry, range(m), ways, [range(m)])])[0]
        (listing,) = prompts.listings
        longest = sum(sorted(map(len, listing.entries))[-TOP:]) + 2 * TOP
        asked = [(prompts.rated_ids + one.ids, 2 + SLACK) for one in prompts.points]
        asked += [(prompts.liked_ids + one.ids, 4 + SLACK) for one in prompts.pairs]
        asked.append((prompts.liked_ids + listing.ids, longest + SLACK))
        texts = write_answers(ranker, asked, batch_size)
        grades = [_grade(ranker, text) for text in texts[:m]]
        first = [_first_wins(ranker, text) for text in texts[m:-1]]
        named, _ = mentions(texts[-1], [ranker.tokenizer.decode(entry_ids) for entry_ids in listing.entries])
        order = list(dict.fromkeys(named))[:TOP]
        values = sorted(ranker.prompts.grade_values)
        wins = first_shares([0.5 if one is None else one for one in first], pair_orders)
        utility = utilities(
            np.array([values[len(values) // 2] if grade is None else grade for grade in grades]),
            win_shares(m, pairs, wins),
            places_of(order, m),
            constants,
        )
        valid = None not in chain(grades, first) and len(order) == min(TOP, m)
        return np.argsort(-utility, kind="stable").tolist(), valid, "\n".join(texts)

    entries = [unlabelled(entry) for entry in lists]
    costs = [len(entry.candidates) for entry in entries]
    made = dealt(entries, costs, answered, model=ranker.model, passes=True)
    return Generated([order for order, _, _ in made], [valid for _, valid, _ in made], [text for _, _, text in made])


def _grade(ranker: Ranker, text: str) -> float | None:
    """The rating that the first grade in a text stands for."""
    grades = cast("RecRankerPrompts", ranker.prompts).template.grades
    found, _ = mentions(text, list(grades))
    return list(grades.values())[found[0]] if found else None


def _first_wins(ranker: Ranker, text: str) -> float | None:
    """1 where a text begins by saying that the first of two is preferred, 0 the second; None: neither."""
    template = cast("RecRankerPrompts", ranker.prompts).template
    words = [template[key] for key in ("pair.first", "pair.second")]
    for value, word in zip((1.0, 0.0), words, strict=True):
        if re.match(rf"\s*{re.escape(word)}(?!\w)", text):
            return value
    return None
