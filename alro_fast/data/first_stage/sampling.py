"""Adaptive user sampling of RecRanker (arXiv 2312.16018): importance, clusters, repetition penalty.

The parts and constants are those of the authors' released prompt/make_train_prompt.py; leaving some out is our choice
(docs/methods.md 3.1).

Used as docs/first_stage.md, "Training lists", says; with |U| users and n draws:

importance : share * n draws with replacement, P(u) proportional to ln(likes of u)
clustering : k-means on user embeddings; cluster c gives round(share * n * |c| / |U|) users, uniform with replacement
pool       : both together, repeats kept; C_u = how often u is in it
penalty    : n draws with replacement from the pool, each entry weighted penalty^(C_u - 1)
             so user u has the weight C_u * penalty^(C_u - 1)

Any of the three can be left out (`PARTS`). The pool keeps its size, 2 * share * n: of importance and clustering, one
alone gives all of it; without either it is drawn uniformly. Without the penalty all entries weigh the same, and with
none of the three, n users are drawn uniformly, from no pool.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import AlroFastError
from .. import seeds

SHARE, CLUSTERS, PENALTY = 0.6, 10, 0.95
PARTS = ("importance", "clustering", "penalty")
MIN_SAMPLED_LIKES = 2  # ln 1 = 0: a user with one like is never drawn by importance, and has no task to give
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class UserSample:
    """drawn: int64 [n], users as drawn; pool: int64 [users], C_u; cluster: int64 [users], -1: too few likes to draw."""

    drawn: np.ndarray
    pool: np.ndarray
    cluster: np.ndarray


def sample_users(
    likes: np.ndarray,
    embeddings: np.ndarray,
    count: int,
    *,
    seed: int = 0,
    parts: Collection[str] = PARTS,
    share: float = SHARE,
    clusters: int = CLUSTERS,
    penalty: float = PENALTY,
) -> UserSample:
    """Draw `count` users with repeats, among those with MIN_SAMPLED_LIKES training likes or more.

    likes: int64 [users]; embeddings: float [users, d]. parts: of PARTS, those that are used. Raises AlroFastError where
    nobody can be drawn.
    """
    if count < 1:
        raise AlroFastError(f"--num_samples {count} is too small; at least 1 is needed")
    users = candidates_for_sampling(likes)
    generator = seeds.generator(seed, seeds.USER_SAMPLE)
    labels = cluster_users(embeddings[users], clusters, seed)
    cluster = np.full(len(likes), -1, dtype=np.int64)
    cluster[users] = labels
    if not parts:
        drawn = users[generator.integers(len(users), size=count)]
        return UserSample(drawn, np.bincount(drawn, minlength=len(likes)), cluster)
    sources = [part for part in ("importance", "clustering") if part in parts]
    total = 2 * share * count / max(len(sources), 1)
    draws = [] if sources else [generator.integers(len(users), size=round(total))]
    if "importance" in sources:
        draws.append(importance_draws(likes[users], round(total), generator))
    if "clustering" in sources:
        draws.append(cluster_draws(labels, total, generator))
    entries = users[np.concatenate(draws)]
    pool = np.bincount(entries, minlength=len(likes))
    weight = penalty if "penalty" in parts else 1.0
    return UserSample(penalised_draws(entries, count, generator, weight), pool, cluster)


def parse_parts(text: str) -> tuple[str, ...]:
    """The parts that `--sampling` names, in the order of PARTS: "importance,penalty", or "none"; AlroFastError else."""
    named = [part.strip() for part in text.split(",")]
    if named == ["none"]:
        return ()
    if len(set(named)) < len(named) or not set(named) <= set(PARTS):
        raise AlroFastError(f"--sampling {text!r}: expected some of {','.join(PARTS)}, each once, or none")
    return tuple(part for part in PARTS if part in named)


def rule(parts: Sequence[str]) -> str:
    """How users are drawn with these parts, in words, for the manifest."""
    among = f"with replacement, among users with {MIN_SAMPLED_LIKES} training likes or more"
    if not parts:
        return f"num_samples draws, uniform, {among}"
    sources = {
        "importance": "in proportion to ln(training likes)",
        "clustering": f"spread over {CLUSTERS} k-means clusters of the retriever's user embeddings by their size, "
        "uniform within each",
    }
    used = [words for part, words in sources.items() if part in parts] or ["uniform"]
    size = 2 * SHARE / len(used)
    pool = " and ".join(f"{size:g} num_samples draws {words}" for words in used)
    weight = f"each entry of a user in it C times weighted {PENALTY:g}^(C - 1)" if "penalty" in parts else "uniform"
    return f"pool: {pool}, {among}; then num_samples draws with replacement from the pool, {weight}"


def candidates_for_sampling(likes: np.ndarray) -> np.ndarray:
    """int64: users with MIN_SAMPLED_LIKES training likes or more; AlroFastError where there are none."""
    users = np.flatnonzero(likes >= MIN_SAMPLED_LIKES)
    if not len(users):
        raise AlroFastError(f"no user has {MIN_SAMPLED_LIKES} training likes, so none can be sampled; lower --like")
    return users


def importance_draws(likes: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [count] positions in `likes` [users], drawn in proportion to ln(likes); all 1: uniformly."""
    weight = np.log(likes)
    weight = weight if weight.sum() > 0 else np.ones(len(likes))
    return generator.choice(len(likes), count, p=weight / weight.sum())


def cluster_draws(labels: np.ndarray, total: float, generator: np.random.Generator) -> np.ndarray:
    """Positions in `labels` [users]: round(total * |c| / |U|) of every cluster c, uniform within it."""
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    return np.concatenate([generator.choice(m, round(total * len(m) / len(labels))) for m in members])


def penalised_draws(
    entries: np.ndarray, count: int, generator: np.random.Generator, penalty: float = PENALTY
) -> np.ndarray:
    """int64 [count] users from the pool `entries` (users, repeats kept), each weighted penalty^(repeats - 1)."""
    users, repeats = np.unique(entries, return_counts=True)
    return generator.choice(users, count, p=user_shares(repeats, penalty))


def user_shares(repeats: np.ndarray, penalty: float = PENALTY) -> np.ndarray:
    """float64, sum 1, proportional to C * penalty^(C - 1): what the C entries of each user weigh together."""
    weight = repeats * penalty ** (repeats - float(np.min(repeats)))  # the common factor keeps it from underflow
    return weight / weight.sum()


def cluster_users(embeddings: np.ndarray, clusters: int = CLUSTERS, seed: int = 0) -> np.ndarray:
    """int64 [users]: labels of k-means (scikit-learn, 10 starts, one thread, so that a seed gives one answer)."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    distinct = len(np.unique(embeddings, axis=0))
    with threadpool_limits(1):
        model = KMeans(min(clusters, distinct), n_init=10, random_state=seed)
        return model.fit_predict(embeddings.astype(np.float64)).astype(np.int64)


def describe(sample: UserSample, likes: np.ndarray) -> dict:
    """Numbers of a sample: likes per user before and after it, multiplicities, share of every cluster."""
    everyone = likes[sample.cluster >= 0]
    times = np.bincount(sample.drawn, minlength=len(likes))
    users, counts = np.unique(times[sample.cluster >= 0], return_counts=True)
    labels = np.unique(sample.cluster[sample.cluster >= 0])
    return {
        "users": len(everyone),
        "draws": len(sample.drawn),
        "distinct_users_drawn": int((times > 0).sum()),
        "users_by_times_drawn": dict(zip(map(str, users.tolist()), counts.tolist())),
        "largest_pool_count": int(sample.pool.max()),
        "likes_per_user": {"all": _spread(everyone), "sampled": _spread(likes[sample.drawn])},
        "share_of_cluster": {
            "all": [round(float((sample.cluster == c).sum() / len(everyone)), 4) for c in labels],
            "sampled": [round(float((sample.cluster[sample.drawn] == c).mean()), 4) for c in labels],
        },
    }


def _spread(likes: np.ndarray) -> dict[str, float]:
    values = {f"{int(q * 100)}%": float(np.quantile(likes, q)) for q in QUANTILES}
    return {"mean": round(float(likes.mean()), 2)} | values
