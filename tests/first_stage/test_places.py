"""The place of a candidate with the retriever: a share, the same whoever is fitted, and blind to what it is of."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from made_ratings import interactions, taste_rows

from alro_fast.data.first_stage import hints
from alro_fast.data.first_stage.hints import FoldedRetrievers, places
from alro_fast.data.first_stage.likes import split_likes
from alro_fast.data.first_stage.retrieval import Retriever, fit_retriever

pytest.importorskip("implicit")
SPLIT = split_likes(interactions(taste_rows(), 60), 4.0, 0)
REFIT = partial(fit_retriever, "als", seed=0)


def test_a_place_is_the_share_of_items_ranked_no_higher(monkeypatch):
    scores = np.array([[0.5, 0.1, 0.9, 0.5], [3.0, 2.0, 1.0, 0.0]], dtype=np.float32)
    known = np.array([2, 3, 5, 8])
    retriever = Retriever("made", {}, known, scores, np.zeros(2, dtype=bool), lambda users: scores[users])
    user, item = np.array([0, 1, 0, 0, 1, 0, 1]), np.array([2, 8, 3, 5, 2, 4, 9])
    expected = [0.75, 0.25, 0.25, 1.0, 1.0, 0.0, 0.0]  # items 4 and 9 it cannot score
    for cells in (hints.CELLS, 4):
        monkeypatch.setattr(hints, "CELLS", cells)
        np.testing.assert_allclose(places(retriever, user, item), expected)
    assert places(retriever, user[:0], item[:0]).shape == (0,)


def test_a_like_does_not_move_its_own_place_out_of_fold():
    folded = FoldedRetrievers(SPLIT, 3, 0, REFIT(SPLIT), REFIT)
    before = folded.out_of_fold(SPLIT.user, SPLIT.item)
    seen = moved = 0
    for row in np.flatnonzero(SPLIT.liked)[::61]:
        rating = SPLIT.rating.copy()
        rating[row] = 1
        changed = replace(SPLIT, rating=rating)
        after = FoldedRetrievers(changed, 3, 0, REFIT(changed), REFIT)
        own = SPLIT.user[[row]], SPLIT.item[[row]]
        assert after.out_of_fold(*own) == before[row]
        moved += places(after.whole, *own)[0] != places(folded.whole, *own)[0]
        seen += 1
    assert moved > seen / 2  # a retriever that saw the like does move
    whole = places(folded.whole, SPLIT.user[SPLIT.liked], SPLIT.item[SPLIT.liked])
    assert whole.mean() > before[SPLIT.liked].mean() + 0.01  # what a training prompt must not tell
