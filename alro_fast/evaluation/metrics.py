"""Ranking metrics with every convention stated (libraries differ by up to 0.5 on the same list; see CONVENTIONS).

Everything takes padded arrays [L lists, M candidates]: `scores`, higher is better, and `ratings`, NaN where a candidate
has no grade or the row is padding. Ungraded candidates are condensed out: removed from the ranking before anything is
counted, never called zero stars. All arithmetic is float64 numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data.records import LARGEST_RATING
from ..errors import AlroFastError

CUTOFFS = (1, 3, 5, 10)

CONVENTIONS = {
    "gain": "2^rating - 1 (`linear`: the rating itself)",
    "discount": "1 / log2(1 + position)",
    "ties in scores": "averaged: mean over all orders of tied candidates",
    "ideal": "the best order of the list's own graded candidates",
    "ungraded candidates": "removed from the ranking (condensed list)",
    "lists whose ratings are all equal": "counted apart, in no mean: every order of them is perfect",
    "hit, mrr": "relevant = the candidates that carry the list's highest rating",
    "interval": "95 % percentile bootstrap over users",
}


def pad(rows: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """Rows of any lengths -> float64 [L, M], NaN-padded on the right."""
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    padded = np.full((len(rows), int(lengths.max(initial=0))), np.nan)
    if len(rows):
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(
            [np.asarray(row, dtype=np.float64) for row in rows]
        )
    return padded


def all_equal(ratings: np.ndarray) -> np.ndarray:
    """bool [L]: the graded candidates carry at most one distinct rating, so there is nothing to rank."""
    graded = ~np.isnan(ratings)
    highest = np.max(ratings, axis=1, where=graded, initial=-np.inf)
    lowest = np.min(ratings, axis=1, where=graded, initial=np.inf)
    return highest <= lowest


def gains(ratings: np.ndarray, gain: str = "exp2") -> np.ndarray:
    """`exp2`: 2^r - 1; `linear`: r. AlroFastError for ratings whose 2^r says nothing any more."""
    if gain == "exp2":
        if np.max(ratings, initial=0.0, where=~np.isnan(ratings)) > LARGEST_RATING:
            raise AlroFastError(
                f"ratings reach {np.nanmax(ratings):g}, and gains are 2^rating - 1: bring them to a scale that ends at "
                f"{LARGEST_RATING:g} or below, such as 1 to 5 (or take gain 'linear')"
            )
        return np.exp2(ratings) - 1.0
    if gain == "linear":
        return ratings
    raise AlroFastError(f"unknown gain {gain!r}; expected 'exp2' (2^rating - 1) or 'linear'")


def ndcg(scores: np.ndarray, ratings: np.ndarray, cutoff: int | None = None, gain: str = "exp2") -> np.ndarray:
    """NDCG@cutoff per list, float64 [L]; NaN where the ideal is 0 (no graded candidate, or only ratings of 0).

    cutoff None: the whole list. With gain="linear" equal to scikit-learn's `ndcg_score`.
    """
    ranked = _ranked(scores, ratings)
    value = gains(ranked.ratings, gain)
    discount = _discounts(value.shape[1], cutoff)
    got = np.sum(value * _tie_means(np.broadcast_to(discount, value.shape), ranked.group), axis=1, where=ranked.graded)
    ideal = -np.sort(-np.where(ranked.graded, value, 0.0), axis=1) @ discount
    return np.divide(got, ideal, out=np.full(len(got), np.nan), where=ideal > 0)


def hit_rate(scores: np.ndarray, ratings: np.ndarray, cutoff: int, relevant: float | None = None) -> np.ndarray:
    """Probability [L], over the orders of tied candidates, that one of the first `cutoff` candidates is relevant.

    relevant: smallest relevant rating; None: the list's highest rating. NaN for a list without a relevant candidate.
    """
    start, none_yet = _first_relevant(scores, ratings, relevant)
    taken = np.clip(cutoff - start, 0, none_yet.shape[1] - 1)
    return np.where(np.isnan(none_yet[:, 0]), np.nan, 1.0 - none_yet[np.arange(len(start)), taken])


def reciprocal_rank(scores: np.ndarray, ratings: np.ndarray, relevant: float | None = None) -> np.ndarray:
    """Expectation [L], over the orders of tied candidates, of 1 / position of the first relevant candidate."""
    start, none_yet = _first_relevant(scores, ratings, relevant)
    position = start[:, None] + np.arange(1, none_yet.shape[1])
    return np.sum((none_yet[:, :-1] - none_yet[:, 1:]) / position, axis=1)


def kendall_tau(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Kendall's tau-b [L] between two scorings [L, M] (or two rows of ranks) of the same candidates; NaN pads.

    For orders without ties: 1 - 2 (discordant pairs) / (all pairs). NaN where either side ties everything.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or (np.isnan(first) != np.isnan(second)).any():
        raise AlroFastError(f"kendall_tau compares the same candidates: shapes {first.shape} and {second.shape} given")
    above = np.triu(np.ones((first.shape[1],) * 2, dtype=bool), 1)
    tau = np.empty(len(first))
    for rows in _chunks(len(first), first.shape[1] ** 2):
        one, two = (np.sign(x[rows, :, None] - x[rows, None, :]) * above for x in (first, second))
        one, two = np.nan_to_num(one), np.nan_to_num(two)
        untied = np.sqrt(np.square(one).sum((1, 2)) * np.square(two).sum((1, 2)))
        agreement = (one * two).sum((1, 2))
        tau[rows] = np.divide(agreement, untied, out=np.full(len(untied), np.nan), where=untied > 0)
    return tau


def measure(
    scores: np.ndarray, ratings: np.ndarray, cutoffs: Sequence[int] = CUTOFFS, gain: str = "exp2"
) -> dict[str, np.ndarray]:
    """The standard set per list: {"ndcg@1": [L], ..., "hr@1": [L], ..., "mrr": [L]}."""
    measured = {f"ndcg@{k}": ndcg(scores, ratings, k, gain) for k in cutoffs}
    measured |= {f"hr@{k}": hit_rate(scores, ratings, k) for k in cutoffs}
    return measured | {"mrr": reciprocal_rank(scores, ratings)}


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: np.ndarray,
    users: Sequence[str] | np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean over lists and its percentile bootstrap interval; users are drawn, each with all of their lists.

    users: one key per value; None: every value is its own user. NaN ends when there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    means = _resampled_means(*_per_user(values, users), resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


class Comparison(NamedTuple):
    """mean(first - second) over lists, its 95 % bootstrap interval over users, and a two-sided sign-flip p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def compare(
    first: np.ndarray,
    second: np.ndarray,
    users: Sequence[str] | np.ndarray | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Paired comparison of two rankers on the same lists."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    interval = bootstrap_interval(difference, users, resamples=resamples, seed=seed)
    return Comparison(*interval, sign_flip_test(difference, users, resamples=10 * resamples, seed=seed))


def sign_flip_test(
    difference: np.ndarray,
    users: Sequence[str] | np.ndarray | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of "the differences are symmetric about 0": each user's sign flipped by a fair coin.

    All 2^users flips are counted when there are no more of them than `resamples`; otherwise `resamples` random ones,
    the observed one included (Phipson and Smyth, 2010: a p-value is never 0).
    """
    if not len(difference):
        return float("nan")
    totals, _ = _per_user(np.asarray(difference, dtype=np.float64), users)
    bar = abs(totals.sum()) * (1 - 1e-12)
    count = len(totals)
    if 2**count <= resamples:
        flips = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float(np.mean(np.abs(flips @ totals) >= bar))
    generator = np.random.default_rng(seed)
    extreme = 0
    for rows in _chunks(resamples, count):
        flips = generator.integers(0, 2, (rows.stop - rows.start, count), dtype=np.int8)
        extreme += int(np.sum(np.abs(totals.sum() - 2.0 * (flips @ totals)) >= bar))
    return (extreme + 1) / (resamples + 1)


class _Ranked(NamedTuple):
    ratings: np.ndarray  # [L, M], best score first, ungraded last
    graded: np.ndarray  # bool [L, M]
    group: np.ndarray  # int [L, M]: number of the block of equal scores, unique over all lists


def _ranked(scores: np.ndarray, ratings: np.ndarray) -> _Ranked:
    scores, ratings = np.asarray(scores, dtype=np.float64), np.asarray(ratings, dtype=np.float64)
    if scores.shape != ratings.shape or scores.ndim != 2:
        raise AlroFastError(
            f"scores and ratings must both be [lists, candidates]; given {scores.shape} and {ratings.shape}"
        )
    graded = ~np.isnan(ratings)
    if np.isnan(scores[graded]).any():
        raise AlroFastError("a graded candidate has no score (NaN); give every candidate a number")
    if (ratings[graded] < 0).any():
        raise AlroFastError("a rating is negative; NDCG needs ratings of 0 and more, so shift the scale first")
    order = np.lexsort((-scores, ~graded))  # graded first, then by score; per row, along the last axis
    keys = np.take_along_axis(scores, order, axis=1)
    graded = np.take_along_axis(graded, order, axis=1)
    fresh = np.ones(keys.shape, dtype=bool)
    fresh[:, 1:] = (keys[:, 1:] != keys[:, :-1]) | (graded[:, 1:] != graded[:, :-1])
    return _Ranked(np.take_along_axis(ratings, order, axis=1), graded, np.cumsum(fresh.ravel()).reshape(keys.shape) - 1)


def _tie_means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Each value replaced by the mean of its block."""
    flat = group.ravel()
    totals = np.bincount(flat, weights=values.ravel())
    return (totals / np.bincount(flat))[group] if flat.size else np.zeros(group.shape)


def _discounts(length: int, cutoff: int | None) -> np.ndarray:
    discount = 1.0 / np.log2(np.arange(2, length + 2))
    if cutoff is not None:
        if cutoff < 1:
            raise AlroFastError(f"a cutoff is at least 1; given {cutoff}")
        discount[cutoff:] = 0.0
    return discount


def _first_relevant(scores: np.ndarray, ratings: np.ndarray, relevant: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Where the first block that holds a relevant candidate starts [L], and [L, M + 1]: the probability that its first
    t candidates, in random order, hold none: C(n - r, t) / C(n, t) for a block of n with r relevant."""
    ranked = _ranked(scores, ratings)
    length = ranked.ratings.shape[1]
    if relevant is None:
        threshold = np.max(ranked.ratings, axis=1, where=ranked.graded, initial=-np.inf)[:, None]
    else:
        threshold = relevant
    wanted = ranked.graded & (np.nan_to_num(ranked.ratings, nan=-np.inf) >= threshold)
    start = np.argmax(wanted, axis=1) if length else np.zeros(len(wanted), dtype=np.int64)
    rows = np.arange(len(start))
    block = ranked.group == (ranked.group[rows, start] if length else start)[:, None]
    start = np.argmax(block, axis=1) if length else start
    size, hits = block.sum(axis=1)[:, None], (block & wanted).sum(axis=1)[:, None]
    drawn = np.arange(length)
    factors = np.maximum(size - hits - drawn, 0) / np.maximum(size - drawn, 1)
    none_yet = np.cumprod(np.concatenate([np.ones((len(rows), 1)), factors], axis=1), axis=1)
    return start, np.where(wanted.any(axis=1)[:, None], none_yet, np.nan)


def _per_user(values: np.ndarray, users: Sequence[str] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of values per user."""
    if users is None:
        return values, np.ones(len(values))
    if len(users) != len(values):
        raise AlroFastError(f"{len(values)} values but {len(users)} users; give one user per value")
    _, index = np.unique(np.asarray(users), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


def _resampled_means(totals: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for rows in _chunks(resamples, len(totals)):
        drawn = generator.integers(0, len(totals), (rows.stop - rows.start, len(totals)))
        means[rows] = totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return means


def _chunks(length: int, width: int, cells: int = 4_000_000) -> list[slice]:
    """Slices of 0..length that keep a temporary of `width` cells a row under `cells`."""
    step = max(1, cells // max(width, 1))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
