"""The made catalogue behind the default recipe: `make_demo`.

Titles, genres, users and ratings are invented here, so the best possible ranking is known. An item has one genre and a
quality; a user has a taste for every genre. The user's rating of an item is

    clip(round(MEAN + taste[genre] + quality + noise), 1, 5),   taste, quality, noise ~ Normal(0, their spread)

so a ranker has to read a user's tastes out of the history, and can learn the qualities from everyone's ratings.
Popular items are rated more often and are a little better. The ratings go through `build_lists` like any data set's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from . import seeds
from .lists import LIST_SCHEMA, SPLITS, check_output_folder, read_manifest, seen_frame, write_prepared
from .sources.interactions import Interactions
from .windows import ORDER_RULE, SPLIT_RULE, TIE_RULE, ListOptions, build_lists

ORACLE_FILE = "oracle.parquet"
GENRES = ("comedy", "crime", "drama", "fantasy", "heist", "horror", "romance", "western")
_ADJECTIVES = """
    Amber Ancient Autumn Bitter Blue Borrowed Brass Bright Broken Burning Cardboard Careless Clockwork Cobalt Copper
    Counterfeit Crimson Crooked Distant Drifting Dusty Eleventh Emerald Empty Endless Fading Feathered Final First
    Folded Forgotten Fragile Frozen Gentle Gilded Glass Golden Granite Hidden Hollow Honest Idle Indigo Inner Iron
    Ivory Jagged Last Little Lonely Lost Lucky Marble Midnight Mirrored Missing Modest Moonlit Narrow Nimble Northern
    Ordinary Outer Painted Paper Patient Pearl Perfect Plastic Quiet Rapid Reckless Restless Rolling Rusty Sacred
    Salted Scarlet Second Secret Seventh Shattered Silent Silver Sleeping Slow Solar Spiral Stolen Stubborn Sudden
    Sunken Tangled Tender Thirsty Timid Turning Twelfth Unseen Upper Velvet Wandering Whispering Wild Winter Wooden
    Yellow
"""
_NOUNS = """
    Acrobat Admiral Alley Anchor Archive Arrow Atlas Avenue Balcony Ballad Bandit Barrel Beacon Bell Bicycle Bishop
    Blizzard Bottle Bridge Cabin Canal Candle Canyon Caravan Carnival Castle Cathedral Cello Chapel Choir Circus
    Citadel Clinic Coast Comet Compass Corridor Courier Crater Crown Curtain Dancer Dawn Desert Detective Diary Dinner
    Doctor Dolphin Dragon Drummer Echo Eclipse Elevator Ember Empire Engine Equation Falcon Farmer Ferry Festival
    Fiddler Forest Fortress Fountain Fox Frontier Garden Gate Ghost Glacier Gospel Guest Harbor Harvest Heron Highway
    Horizon Hotel Hunter Island Jester Journey Judge Juniper Kettle Kingdom Kite Ladder Lagoon Lantern Library
    Lighthouse Lion Locket Machine Magnet Maple Market Meadow Melody Mermaid Meteor Mill Mirror Monsoon Monument
    Mountain Needle Oasis Ocean Opera Orbit Orchard Organ Outpost Owl Parade Passage Pilot Planet Poet Portrait
    Prairie Prophet Puzzle Quarry Railway Raven Reef Rehearsal River Robot Sailor Satellite Scholar Season Shadow
    Shepherd Signal Singer Spark Station Stranger Summit Tailor Temple Theater Tiger Tower Train Traveler Tunnel
    Valley Vessel Village Violin Voyage Waltz Warden Waterfall Weaver Window Wizard
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())

MEAN, TASTE_SPREAD, QUALITY_SPREAD, NOISE_SPREAD = 3.2, 1.3, 0.35, 0.5  # in stars
HISTORY_LENGTH = 12


class DemoWorld(NamedTuple):
    """What the maker knows, by item code and user code."""

    titles: list[str]
    genre: np.ndarray  # int64 [items], index into GENRES
    quality: np.ndarray  # float64 [items], stars
    popularity: np.ndarray  # float64 [items], sums to 1
    taste: np.ndarray  # float64 [users, genres], stars

    def expected_rating(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Mean of the rounded, clipped rating over its noise; float64, the shape of `user` and `item`."""
        centre = self.centre(user, item)[..., None]
        below = np.array([1.5, 2.5, 3.5, 4.5])  # the rating exceeds k when the unrounded one exceeds k + 1/2
        exceeds = 0.5 * np.vectorize(math.erfc)((below - centre) / (NOISE_SPREAD * math.sqrt(2)))
        return 1 + exceeds.sum(-1)

    def centre(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """The rating before noise, rounding and clipping."""
        return MEAN + self.taste[user, self.genre[item]] + self.quality[item]


def make_world(users: int, items: int, seed: int) -> DemoWorld:
    """Draw the catalogue and the tastes."""
    draw = seeds.generator(seed, seeds.DEMO_ITEMS)
    names = draw.permutation(len(ADJECTIVES) * len(NOUNS))[:items]
    quality = QUALITY_SPREAD * draw.standard_normal(items)
    popularity = np.exp(0.8 * draw.standard_normal(items) + 0.7 * quality)
    return DemoWorld(
        titles=[f"{ADJECTIVES[name // len(NOUNS)]} {NOUNS[name % len(NOUNS)]}" for name in names.tolist()],
        genre=draw.permutation(np.arange(items) % len(GENRES)),
        quality=quality,
        popularity=popularity / popularity.sum(),
        taste=TASTE_SPREAD * draw.standard_normal((users, len(GENRES))),
    )


def make_ratings(world: DemoWorld, per_user: int, seed: int) -> Interactions:
    """Every user rates `per_user` items, drawn by popularity without replacement, in random order."""
    draw = seeds.generator(seed, seeds.DEMO_RATINGS)
    users, items = len(world.taste), len(world.titles)
    race = np.log(world.popularity) + draw.gumbel(size=(users, items))
    chosen = np.argpartition(-race, per_user - 1, axis=1)[:, :per_user]
    chosen = draw.permuted(np.sort(chosen, axis=1), axis=1)
    user = np.repeat(np.arange(users), per_user)
    item = chosen.ravel()
    unrounded = world.centre(user, item) + NOISE_SPREAD * draw.standard_normal(len(item))
    return Interactions(
        user=user.astype(np.uint32),
        item=item.astype(np.uint32),
        rating=np.clip(np.rint(unrounded), 1, 5).astype(np.float32),
        time=np.tile(np.arange(per_user, dtype=np.int64), users),
        user_ids=pl.Series([f"user-{i:04d}" for i in range(users)]),
        items=pl.DataFrame(
            {
                "item_id": [f"item-{i:04d}" for i in range(items)],
                "title": world.titles,
                "category": [GENRES[g] for g in world.genre.tolist()],
            }
        ),
        sources=(),
        time_unit="rank of the rating among its user's",
        counts={"ratings": len(item), "users": users, "items": items},
    )


def make_demo(
    path: str | Path,
    seed: int = 0,
    *,
    users: int = 400,
    items: int = 240,
    train_lists_per_user: int = 4,
    list_size: int = 10,
) -> None:
    """Write the demo as a prepared folder, with oracle.parquet beside it; the same arguments give the same bytes.

    oracle.parquet: list_id, scores (list of float64: the expected rating of each candidate, in stored order), for the
    lists of every split. Raises AlroFastError if `path` holds something that `make_demo` did not write.
    """
    path = Path(path)
    options = ListOptions(history_length=HISTORY_LENGTH, min_history=HISTORY_LENGTH, list_size=list_size, seed=seed)
    world = make_world(users, items, seed)
    ratings = make_ratings(world, HISTORY_LENGTH + (train_lists_per_user + 2) * list_size, seed)
    built = build_lists(ratings, options)
    oracle = pl.concat([_expected(world, ratings, built.lists[split]) for split in SPLITS])
    if (read_manifest(path) or {}).get("dataset") == "demo":
        for name in (ORACLE_FILE, f".{ORACLE_FILE}"):  # the second is of one that was killed while it wrote
            (path / name).unlink(missing_ok=True)
    check_output_folder(path)
    manifest = {
        "dataset": "demo",
        "licence": None,
        "sources": [],
        "options": {
            "users": users,
            "items": items,
            "train_lists_per_user": train_lists_per_user,
            "list_size": list_size,
            "history_length": HISTORY_LENGTH,
            "mean": MEAN,
            "taste_spread": TASTE_SPREAD,
            "quality_spread": QUALITY_SPREAD,
            "noise_spread": NOISE_SPREAD,
        },
        "seed": seed,
        "tie_rule": TIE_RULE,
        "split_rule": SPLIT_RULE,
        "order_rule": ORDER_RULE,
        "time_unit": ratings.time_unit,
        "rating_values": [1.0, 2.0, 3.0, 4.0, 5.0],
        "counts": ratings.counts | built.counts,
    }
    seen = seen_frame(ratings.user, ratings.item, ratings.user_ids)
    write_prepared(path, built.items, built.lists, manifest, seen=seen)
    part = path / f".{ORACLE_FILE}"
    oracle.write_parquet(part, compression="zstd")
    part.replace(path / ORACLE_FILE)


def _expected(world: DemoWorld, ratings: Interactions, lists: pl.DataFrame) -> pl.DataFrame:
    assert dict(lists.schema) == LIST_SCHEMA
    code = {name: number for number, name in enumerate(ratings.user_ids)}
    user = np.array([code[name] for name in lists["user_id"]])
    candidates = np.array(lists["candidates"].to_list())
    scores = world.expected_rating(np.broadcast_to(user[:, None], candidates.shape), candidates)
    return pl.DataFrame(
        {"list_id": lists["list_id"], "scores": scores.tolist()},
        schema={"list_id": pl.String, "scores": pl.List(pl.Float64)},
    )
