"""Random numbers by name: what is drawn depends on the run's seed and on what it is drawn for, on nothing else.

So a list keeps its draws whatever else is prepared, trained on or ranked beside it, in any order and any process. There
are three kinds of streams, which differ in what they are drawn for and in how many are needed:

    generator(seed, ..., name=)   a numpy generator: of a stage of the data, or of one list (name: its list_id)
    draw(seed, epoch, index)      a `random.Random`: of one training list in one epoch
    splitmix64 of hash_ids        a hash per (user, item): millions of them at once

Streams of one numpy seed are told apart by a number: DEMO_*, RATING_MODEL, USER_SAMPLE, FIRST_STAGE_LISTS.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

import numpy as np

DEMO_ITEMS, DEMO_RATINGS = 0, 1
RATING_MODEL, USER_SAMPLE, FIRST_STAGE_LISTS = 1, 2, 3


def generator(*seeds: int, name: str | None = None) -> np.random.Generator:
    """The stream of these seeds (each at least 0) and, of one list or the like, its name."""
    return np.random.default_rng([*seeds, *(() if name is None else (hash_id(name),))])


def draw(seed: int, epoch: int, index: int) -> random.Random:
    """The stream of training list `index` in one epoch."""
    return random.Random(f"{seed}/{epoch}/{index}")


def hash_id(id: str) -> int:
    """The first 8 bytes of BLAKE2b, little-endian; the same on every machine and version."""
    return int.from_bytes(_digest(id), "little")


def hash_ids(ids: Iterable[str]) -> np.ndarray:
    """uint64: `hash_id` of each."""
    return np.frombuffer(b"".join(map(_digest, ids)), dtype="<u8").astype(np.uint64)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijective mixer of uint64 (Steele, Lea and Flood, 2014); x may be of any shape, at least one-dimensional."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(hashes: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), from the upper 53 bits."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _digest(id: str) -> bytes:
    return hashlib.blake2b(id.encode(), digest_size=8).digest()
