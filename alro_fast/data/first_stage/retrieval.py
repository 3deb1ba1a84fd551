"""The first stage: retrievers fitted on training likes, candidates in their order, and how good that order is.

Kept implementations do the work: implicit (Hu, Koren and Volinsky 2008: als; Rendle et al. 2009: bpr; item-item
neighbours by cosine and BM25); the sequential one is sasrec.py, the one on the graph of likes lightgcn.py. A retriever
scores the items somebody likes in training ("known" items); the others can never be retrieved. A user without a
training like gets the known items by popularity.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import AlroFastError
from .likes import LikeSplit

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CUTOFFS = (3, 5, 10)
BLOCK_CELLS = 1 << 22  # scores held at once
SPECTRAL_SIZE = 32  # embedding size of users where the retriever has none
EXTRA = "pip install 'alro-fast[recranker]'"


@dataclass(frozen=True, slots=True)
class RetrieverOptions:
    """Sizes and rates of a retriever; None: its own default (DEFAULTS). Options it does not have must stay None."""

    factors: int | None = None  # als, bpr, sasrec, lightgcn: size of the embeddings
    iterations: int | None = None  # als, bpr, sasrec, lightgcn: passes over the likes
    regularization: float | None = None  # als, bpr, lightgcn: weight of the squared norm
    alpha: float | None = None  # als: confidence of a like, 1 for everything else
    learning_rate: float | None = None  # bpr, sasrec, lightgcn
    neighbours: int | None = None  # item-knn, item-bm25: kept per item
    layers: int | None = None  # lightgcn: neighbourhoods of neighbourhoods


DEFAULTS: dict[str, dict[str, Any]] = {
    "als": {"factors": 64, "iterations": 15, "regularization": 10.0, "alpha": 5.0},
    "bpr": {"factors": 64, "iterations": 100, "regularization": 0.01, "learning_rate": 0.02},
    "item-knn": {"neighbours": 100},
    "item-bm25": {"neighbours": 50},
    "popularity": {},
    "sasrec": {"factors": 64, "iterations": 25, "learning_rate": 0.002},
    "lightgcn": {"factors": 64, "iterations": 120, "regularization": 1e-4, "learning_rate": 0.02, "layers": 2},
}
RETRIEVERS = tuple(DEFAULTS)
MOST = {"factors": 4096, "iterations": 100_000, "neighbours": 100_000, "layers": 100}


class Retriever(NamedTuple):
    """A fitted first stage.

    name; options: every option with its value; known: int64 [k], item indices it can score, ascending;
    embeddings: float32 [users, d]; cold: bool [users], True where popularity stands in;
    score: int64 users [B] -> float32 [B, k], higher is better, columns as `known`.
    """

    name: str
    options: dict[str, Any]
    known: np.ndarray
    embeddings: np.ndarray
    cold: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


class Retrieved(NamedTuple):
    """items: int64 [users, n], best first, -1 where fewer are left; place: int64 [users], the target's place among all
    items the user has not seen, 1 = first, 0 = no target or one that cannot be retrieved."""

    items: np.ndarray
    place: np.ndarray


def resolve(name: str, options: RetrieverOptions) -> dict[str, Any]:
    """The retriever's options with defaults filled in; AlroFastError for an unknown name, option or value."""
    if name not in DEFAULTS:
        raise AlroFastError(f"unknown retriever {name!r}; expected one of {', '.join(RETRIEVERS)}")
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if key not in DEFAULTS[name]:
            readers = ", ".join(one for one, known in DEFAULTS.items() if key in known)
            raise AlroFastError(f"--{key} is no option of retriever {name} (it is read by {readers}); leave it out")
        if not math.isfinite(value) or value < 0 or (value == 0 and key != "regularization"):
            raise AlroFastError(f"--{key} {value:g}; expected a number above 0")
        if value > MOST.get(key, math.inf):
            raise AlroFastError(f"--{key} {value:g} is too large; at most {MOST[key]:,} is taken")
    return DEFAULTS[name] | given


def need_libraries() -> None:
    """AlroFastError naming the extra unless the first stage's libraries can be imported."""
    try:
        import implicit  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise AlroFastError(f"the first stage needs {error.name}; install it with: {EXTRA}") from error


def fit_retriever(name: str, split: LikeSplit, options: RetrieverOptions | None = None, seed: int = 0) -> Retriever:
    """Fit on the training likes alone, in one thread: the same seed gives the same numbers.

    DEFAULTS were chosen on the validation targets of ml-latest-small.
    """
    resolved = resolve(name, options or RetrieverOptions())
    need_libraries()
    from threadpoolctl import threadpool_limits

    user, item = split.user[split.liked], split.item[split.liked]
    if not len(item):
        raise AlroFastError("no like is left to train a retriever on; lower --like, or raise --min_likes")
    known, column = np.unique(item, return_inverse=True)
    likes = _binary(user, column, (split.users, len(known)))
    popularity = np.bincount(column, minlength=len(known)).astype(np.float32)
    cold = np.diff(likes.indptr) == 0
    with threadpool_limits(1):
        if name == "popularity":
            embeddings, score = _spectral(likes, seed), lambda users: np.tile(popularity, (len(users), 1))
        elif name in ("item-knn", "item-bm25"):
            embeddings, score = _spectral(likes, seed), _neighbours(name, likes, resolved)
        else:
            embeddings, items = _factors(name, likes, column, resolved, seed)
            score = lambda users: embeddings[users] @ items.T  # noqa: E731

    def with_fallback(users: np.ndarray) -> np.ndarray:
        scores = score(users)
        scores[cold[users]] = popularity
        return scores

    return Retriever(name, resolved, known, embeddings, cold, with_fallback)


def retrieve(retriever: Retriever, seen: csr_matrix, target: np.ndarray, count: int) -> Retrieved:
    """The best `count` unseen items of every user. Equal scores: the smaller item index first.

    seen: [users, items], stored entries are left out; target: int64 [users], -1 = none.
    """
    known = retriever.known
    found = np.full((len(target), count), -1, dtype=np.int64)
    place = np.zeros(len(target), dtype=np.int64)
    at = np.minimum(np.searchsorted(known, target), len(known) - 1)
    reachable = (target >= 0) & (known[at] == target)
    for user, scores in enumerate(_unseen_scores(retriever, seen)):
        best = _best(scores, count)
        found[user, : len(best)] = known[best]
        if reachable[user] and scores[at[user]] > -np.inf:
            own = scores[at[user]]
            place[user] = 1 + (scores > own).sum() + (scores[: at[user]] == own).sum()
    return Retrieved(found, place)


def seen_items(split: LikeSplit, also: np.ndarray | None = None) -> csr_matrix:
    """[users, items]: 1 for every training rating, and for the item `also` [users] (-1: none)."""
    user, item = split.user, split.item
    if also is not None:
        more = np.flatnonzero(also >= 0)
        user, item = np.concatenate([user, more]), np.concatenate([item, also[more]])
    return _binary(user, item, (split.users, split.items))


def retrieval_metrics(place: np.ndarray, cutoffs: tuple[int, ...] = CUTOFFS) -> dict[str, float]:
    """HR@k and NDCG@k (one relevant item: 1 / log2(1 + place)) over all users given; place 0 is a miss."""
    metrics = {}
    for k in cutoffs:
        hit = (place >= 1) & (place <= k)
        metrics[f"hr@{k}"] = float(hit.mean()) if len(place) else 0.0
    for k in cutoffs:
        hit = (place >= 1) & (place <= k)
        metrics[f"ndcg@{k}"] = float((hit / np.log2(1.0 + np.maximum(place, 1))).mean()) if len(place) else 0.0
    return metrics


def _unseen_scores(retriever: Retriever, seen: csr_matrix) -> Iterator[np.ndarray]:
    """float32 [k] of every user in turn, columns as `known`, -inf where seen; scored a block of users at a time."""
    from threadpoolctl import threadpool_limits

    hidden = seen[:, retriever.known].tocsr()
    block = max(1, BLOCK_CELLS // len(retriever.known))
    for first in range(0, hidden.shape[0], block):
        mask = hidden[first : first + block]
        users = np.arange(first, first + mask.shape[0])
        with threadpool_limits(1):
            scores = np.array(retriever.score(users), dtype=np.float32)
        scores[np.repeat(users - first, np.diff(mask.indptr)), mask.indices] = -np.inf
        yield from scores


def _factors(
    name: str, likes: csr_matrix, column: np.ndarray, options: dict[str, Any], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [users, d] and [known, d]: a score is an inner product. column: the known item of each like, in order."""
    if name == "sasrec":
        from .sasrec import train_sasrec

        users, items = train_sasrec(np.split(column, likes.indptr[1:-1]), likes.shape[1], **options, seed=seed)
    elif name == "lightgcn":
        from .lightgcn import train_lightgcn

        user, item = (part.astype(np.int64) for part in likes.nonzero())
        users, items = train_lightgcn(user, item, likes.shape, **options, seed=seed)
    else:
        from implicit.cpu.als import AlternatingLeastSquares
        from implicit.cpu.bpr import BayesianPersonalizedRanking

        kind = {"als": AlternatingLeastSquares, "bpr": BayesianPersonalizedRanking}[name]
        model = kind(**options, num_threads=1, random_state=seed)
        model.fit(likes, show_progress=False)
        users, items = np.asarray(model.user_factors), np.asarray(model.item_factors)
    if not (np.isfinite(users).all() and np.isfinite(items).all()):
        raise AlroFastError(f"retriever {name} diverged with {options}; lower its rates")
    return users, items


def _neighbours(name: str, likes: csr_matrix, options: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    from implicit.nearest_neighbours import BM25Recommender, CosineRecommender

    kind = {"item-knn": CosineRecommender, "item-bm25": BM25Recommender}[name]
    model = kind(K=min(options["neighbours"], likes.shape[1]), num_threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matrices it makes in another format than it likes
        model.fit(likes, show_progress=False)
    similarity = model.similarity.astype(np.float32)
    return lambda rows: (likes[rows] @ similarity).toarray()


def _spectral(likes: csr_matrix, seed: int) -> np.ndarray:
    """float32 [users, d] for a retriever without user embeddings: the likes on their leading right singular vectors."""
    from sklearn.decomposition import TruncatedSVD

    size = min(SPECTRAL_SIZE, min(likes.shape) - 1)
    if size < 1:
        return np.zeros((likes.shape[0], 1), dtype=np.float32)
    return TruncatedSVD(size, random_state=seed).fit_transform(likes).astype(np.float32)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest finite scores, best first, ties by index."""
    if count < len(scores):
        floor = np.partition(scores, len(scores) - count)[len(scores) - count]
        chosen = np.flatnonzero((scores >= floor) & (scores > -np.inf))
    else:
        chosen = np.flatnonzero(scores > -np.inf)
    return chosen[np.argsort(-scores[chosen], kind="stable")][:count]


def _binary(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> csr_matrix:
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((np.ones(len(row), dtype=np.float32), (row, column)), shape=shape)
    matrix.sort_indices()
    return matrix
