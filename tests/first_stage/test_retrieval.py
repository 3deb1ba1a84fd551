"""Retrievers and their figures, against implicit's own recommendations and evaluation."""

from __future__ import annotations

import builtins
import warnings

import numpy as np
import pytest
from made_ratings import interactions, taste_rows

from alro_fast.data.first_stage import retrieval
from alro_fast.data.first_stage.likes import split_likes
from alro_fast.data.first_stage.retrieval import (
    RETRIEVERS,
    RetrieverOptions,
    fit_retriever,
    need_libraries,
    resolve,
    retrieval_metrics,
    retrieve,
    seen_items,
)
from alro_fast.data.sources.interactions import read_interactions
from alro_fast.errors import AlroFastError

implicit = pytest.importorskip("implicit")

MADE = split_likes(interactions(taste_rows(), 60), 4.0, 0)


@pytest.fixture(scope="module")
def likes_only(shared_data):
    """ml-latest-small with every rating a like, so that what is seen is what a retriever is fitted on."""
    return split_likes(read_interactions("ml-latest-small", shared_data / "ml-latest-small"), 0.5, 0)


def quick(name):
    return RetrieverOptions(iterations=3, factors=16) if name in ("als", "bpr") else RetrieverOptions()


def peer(name, split, known):
    """implicit's own model and matrices of one retriever: (model, fitted on, targets)."""
    from implicit.cpu.als import AlternatingLeastSquares
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    from implicit.nearest_neighbours import BM25Recommender, CosineRecommender
    from scipy.sparse import csr_matrix

    shape = (split.users, len(known))
    column = np.searchsorted(known, split.item)
    seen = csr_matrix((np.ones(len(column), np.float32), (split.user, column)), shape=shape)
    target = split.target["valid"]
    at = np.minimum(np.searchsorted(known, target), len(known) - 1)
    users = np.flatnonzero((target >= 0) & (known[at] == target))
    wanted = csr_matrix((np.ones(len(users), np.float32), (users, at[users])), shape=shape)
    options = resolve(name, quick(name))
    if name in ("als", "bpr"):
        kind = {"als": AlternatingLeastSquares, "bpr": BayesianPersonalizedRanking}[name]
        model = kind(**options, num_threads=1, random_state=5)
    else:
        kind = {"item-knn": CosineRecommender, "item-bm25": BM25Recommender}[name]
        model = kind(K=options["neighbours"], num_threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(seen, show_progress=False)
    return model, seen, wanted, users


@pytest.mark.parametrize("name", ["als", "bpr", "item-knn", "item-bm25"])
def test_figures_agree_with_implicits_own_evaluation(likes_only, name):
    """One relevant item: implicit's precision is our hit rate; its NDCG and ours are the same."""
    from implicit.evaluation import ranking_metrics_at_k

    ours = fit_retriever(name, likes_only, quick(name), seed=5)
    found = retrieve(ours, seen_items(likes_only), likes_only.target["valid"], 10)
    model, seen, wanted, users = peer(name, likes_only, ours.known)
    figures = retrieval_metrics(found.place[users])
    for k in (3, 10):
        theirs = ranking_metrics_at_k(model, seen, wanted, K=k, show_progress=False, num_threads=1)
        assert figures[f"hr@{k}"] == pytest.approx(theirs["precision"], abs=1e-9)
        assert figures[f"ndcg@{k}"] == pytest.approx(theirs["ndcg"], abs=1e-9)
    some = users[:40]
    recommended, _ = model.recommend(some, seen[some], N=10)
    agree = np.mean([a == b for a, b in zip(ours.known[recommended], found.items[some])])
    assert agree > 0.97  # equal scores may be ordered otherwise


def test_retrievers_beat_popularity_on_real_likes(likes_only):
    def median_place(name):
        target = likes_only.target["valid"]
        place = retrieve(fit_retriever(name, likes_only, seed=0), seen_items(likes_only), target, 10).place
        return np.median(place[place > 0])

    popular = median_place("popularity")
    assert median_place("als") < 0.8 * popular
    assert median_place("item-knn") < 0.8 * popular


@pytest.mark.parametrize("name", RETRIEVERS)
def test_candidates_are_the_best_unseen_items_and_places_count_them(name):
    retriever = fit_retriever(name, MADE, seed=0)
    target = MADE.target["valid"]
    found = retrieve(retriever, seen_items(MADE), target, 60)
    ten = retrieve(retriever, seen_items(MADE), target, 10)
    scores = np.full((MADE.users, 60), -np.inf)
    scores[:, retriever.known] = retriever.score(np.arange(MADE.users))
    for user in range(MADE.users):
        mine = set(MADE.item[MADE.offsets[user] : MADE.offsets[user + 1]].tolist())
        expected = sorted(set(retriever.known.tolist()) - mine, key=lambda i: (-scores[user, i], i))
        assert found.items[user][found.items[user] >= 0].tolist() == expected
        assert ten.items[user].tolist()[: len(expected)] == (expected + [-1] * 10)[:10]
        if target[user] >= 0:
            assert found.place[user] == ten.place[user] == expected.index(target[user]) + 1
    assert retriever.embeddings.shape[0] == MADE.users
    assert np.isfinite(retriever.embeddings).all()


def test_blocks_of_users_do_not_change_anything(monkeypatch):
    retriever = fit_retriever("als", MADE, quick("als"))
    whole = retrieve(retriever, seen_items(MADE), MADE.target["test"], 10)
    monkeypatch.setattr(retrieval, "BLOCK_CELLS", 150)
    pieces = retrieve(retriever, seen_items(MADE), MADE.target["test"], 10)
    assert np.array_equal(whole.items, pieces.items)
    assert np.array_equal(whole.place, pieces.place)


@pytest.mark.parametrize("name", RETRIEVERS)
def test_the_same_seed_gives_the_same_numbers(name):
    first, second = (fit_retriever(name, MADE, seed=1) for _ in range(2))
    users = np.arange(MADE.users)
    assert np.array_equal(first.score(users), second.score(users))
    assert np.array_equal(first.embeddings, second.embeddings)


@pytest.mark.parametrize("name", RETRIEVERS)
def test_a_user_without_likes_gets_the_popular_items(name):
    rows = [*taste_rows(), *((40, item, 1, item) for item in range(5))]
    split = split_likes(interactions(rows, 60), 4.0, 0)
    retriever = fit_retriever(name, split)
    assert np.flatnonzero(retriever.cold).tolist() == [40]
    likes = np.bincount(split.item[split.liked], minlength=60)
    expected = sorted(set(retriever.known.tolist()) - set(range(5)), key=lambda i: (-likes[i], i))
    assert retrieve(retriever, seen_items(split), split.target["test"], 10).items[40].tolist() == expected[:10]


def test_an_item_nobody_likes_is_never_retrieved_and_its_place_is_none():
    rows = [row for row in taste_rows() if row[1] != 59]
    rows += [(0, 58, 5, 10_000), (0, 59, 5, 10_001)] if (0, 58) not in {r[:2] for r in rows} else [(0, 59, 5, 10_001)]
    split = split_likes(interactions(rows, 60), 4.0, 0)
    assert split.target["test"][0] == 59
    found = retrieve(fit_retriever("popularity", split), seen_items(split), split.target["test"], 60)
    assert found.place[0] == 0
    assert 59 not in found.items


def test_metrics_by_hand():
    figures = retrieval_metrics(np.array([1, 4, 0, 11]), cutoffs=(3, 5))
    assert figures == pytest.approx({"hr@3": 0.25, "hr@5": 0.5, "ndcg@3": 0.25, "ndcg@5": (1 + 1 / np.log2(5)) / 4})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("svd", {}, "unknown retriever 'svd'; expected one of als, bpr, item-knn"),
        ("als", {"neighbours": 5}, "--neighbours is no option of retriever als .it is read by item-knn, item-bm25."),
        (
            "popularity",
            {"factors": 5},
            "--factors is no option of retriever popularity .it is read by als, bpr, sasrec, lightgcn.",
        ),
        ("bpr", {"factors": 0}, "--factors 0; expected a number above 0"),
        ("als", {"regularization": -1.0}, "--regularization -1; expected a number above 0"),
    ],
)
def test_bad_options(name, options, said):
    with pytest.raises(AlroFastError, match=said):
        resolve(name, RetrieverOptions(**options))


def test_a_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "implicit":
            raise ModuleNotFoundError("No module named 'implicit'", name="implicit")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AlroFastError, match=r"needs implicit; install it with: pip install 'alro-fast\[recranker\]'"):
        need_libraries()
