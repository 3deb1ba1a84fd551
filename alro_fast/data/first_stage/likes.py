"""Likes: what a first stage learns from, and the two liked items of each user that are held out.

Which ones, and why: docs/first_stage.md, "What is held out".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import AlroFastError
from ..seeds import hash_ids
from ..sources.interactions import Interactions
from ..windows import chronological

LIKE_SPLIT_RULE = (
    "a like is a rating >= like; a user's ratings in time order; with min_likes likes or more the last like is the "
    "test target, the one before it the validation target, and only the ratings before the validation target are "
    "training ratings (those after it that are no target are dropped); with fewer likes the user has no targets and "
    "all ratings are training ratings"
)
MIN_LIKES = 3  # two are held out, one is left to train on


@dataclass(frozen=True, slots=True)
class LikeSplit:
    """Training ratings by user, each user's in time order, and the held-out likes.

    offsets: int64 [users + 1], user u has rows offsets[u] to offsets[u + 1]; item: int64, rating: float32 [rows];
    target, target_rating: "valid" and "test" -> int64 [users] item (-1: none) and float32 [users] (NaN: none);
    dropped: number of ratings after a validation target that are no target.
    """

    offsets: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    target: dict[str, np.ndarray]
    target_rating: dict[str, np.ndarray]
    like: float
    items: int
    dropped: int

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    @property
    def user(self) -> np.ndarray:
        """int64 [rows]: the user of every training rating."""
        return np.repeat(np.arange(self.users), np.diff(self.offsets))

    @property
    def liked(self) -> np.ndarray:
        """bool [rows]."""
        return self.rating >= self.like

    @property
    def like_count(self) -> np.ndarray:
        """int64 [users]: training likes."""
        return np.bincount(self.user[self.liked], minlength=self.users)


def split_likes(interactions: Interactions, like: float, seed: int, min_likes: int = MIN_LIKES) -> LikeSplit:
    """LIKE_SPLIT_RULE; equal times are ordered by windows.TIE_RULE, so data without times by a seeded shuffle.

    min_likes: 2 or more; with 2, a user may have targets and no training like. Raises AlroFastError when no rating is a
    like, or no user has min_likes of them.
    """
    user_hash, item_hash = hash_ids(interactions.user_ids), hash_ids(interactions.items["item_id"])
    rows, _ = chronological(interactions, user_hash, item_hash, seed)
    user = np.repeat(np.arange(len(user_hash)), np.diff(rows.offsets))
    liked = rows.rating >= like
    likes_of = np.bincount(user[liked], minlength=len(user_hash))
    if not liked.any():
        low, high = rows.rating.min(), rows.rating.max()
        raise AlroFastError(f"no rating is at least --like {like:g} (they run from {low:g} to {high:g}); lower --like")
    if likes_of.max() < min_likes:
        raise AlroFastError(
            f"no user has {min_likes} ratings of at least --like {like:g} (the most is {likes_of.max()}), so none can "
            "be held out; lower --like"
        )
    counted = np.cumsum(liked)
    later_likes = counted[rows.offsets[1:] - 1][user] - counted  # likes of the same user after this row
    split_here = likes_of[user] >= min_likes
    target, target_rating = {}, {}
    for split, after in (("test", 0), ("valid", 1)):
        held = np.flatnonzero(split_here & liked & (later_likes == after))
        target[split] = np.full(len(user_hash), -1, dtype=np.int64)
        target_rating[split] = np.full(len(user_hash), np.nan, dtype=np.float32)
        target[split][user[held]] = rows.item[held]
        target_rating[split][user[held]] = rows.rating[held]
    kept = ~split_here | (later_likes >= 2)
    return LikeSplit(
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user[kept], minlength=len(user_hash)))]),
        item=rows.item[kept].astype(np.int64),
        rating=rows.rating[kept],
        target=target,
        target_rating=target_rating,
        like=like,
        items=interactions.items.height,
        dropped=int((~kept).sum()) - 2 * int((target["test"] >= 0).sum()),
    )
