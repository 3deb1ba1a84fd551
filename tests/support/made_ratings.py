"""Small rating data sets made for the first stage's tests."""

from __future__ import annotations

import numpy as np
import polars as pl

from alro_fast.data.sources.interactions import Interactions


def interactions(rows, items: int, users: int | None = None) -> Interactions:
    """rows: (user, item, rating, time) tuples, users and items numbered from 0, every (user, item) once."""
    user, item, rating, time = (np.array(column) for column in zip(*rows, strict=True))
    users = users or int(user.max()) + 1
    return Interactions(
        user=user.astype(np.uint32),
        item=item.astype(np.uint32),
        rating=rating.astype(np.float32),
        time=time.astype(np.int64),
        user_ids=pl.Series("user_id", [f"u{i}" for i in range(users)]),
        items=pl.DataFrame(
            {
                "item_id": [f"i{i}" for i in range(items)],
                "title": [f"Film {i}" for i in range(items)],
                "category": [""] * items,
            }
        ),
        sources=(),
        time_unit="s",
        counts={"ratings": len(user)},
    )


def taste_rows(users: int = 40, items: int = 60, seed: int = 0, groups: int = 4):
    """Users of `groups` tastes: items of one's own group are rated often and high, others seldom and low.

    Every seventh item is disliked by all; every fifth user gives no 5.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        near = np.arange(items) % groups == user % groups
        rated = np.flatnonzero(generator.random(items) < np.where(near, 0.8, 0.25))
        for time, item in enumerate(generator.permutation(rated).tolist()):
            scale = ([4] if user % 5 == 0 else [4, 5, 5]) if near[item] else [1, 2, 3, 4]
            rating = generator.choice([1, 2] if item % 7 == 0 else scale)
            rows.append((user, item, int(rating), 100 + time))
    return rows
