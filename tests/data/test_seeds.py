"""Streams of random numbers: the numbers of runs that are out there."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from alro_fast.data import seeds


def test_a_stream_is_its_seeds_and_its_name():
    digest = hashlib.blake2b(b"draw/u1-30", digest_size=8).digest()
    wanted = np.random.default_rng([7, 2, int.from_bytes(digest, "little")]).random(5)
    np.testing.assert_array_equal(seeds.generator(7, 2, name="draw/u1-30").random(5), wanted)
    np.testing.assert_array_equal(seeds.generator(7, 2).random(5), np.random.default_rng([7, 2]).random(5))
    others = [(7, 2, "draw/u1-31"), (7, 3, "draw/u1-30"), (8, 2, "draw/u1-30"), (7, 2, None)]
    assert all((seeds.generator(a, b, name=name).random(5) != wanted).all() for a, b, name in others)


def test_a_training_list_has_a_stream_per_epoch():
    assert seeds.draw(1, 2, 33).random() == random.Random("1/2/33").random()
    assert len({seeds.draw(*key).random() for key in [(1, 2, 33), (1, 23, 3), (12, 3, 3), (1, 2, 3)]}) == 4


def test_ids_hash_alike_one_by_one_and_together():
    ids = ["1", "Émile", "", "x" * 300]
    assert seeds.hash_ids(ids).tolist() == [seeds.hash_id(id) for id in ids]
    assert seeds.hash_ids(ids).dtype == np.uint64


def test_splitmix64_is_the_published_one():
    assert seeds.splitmix64(np.array([0], dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF]


def test_shares_are_below_one():
    shares = seeds.uniform(np.array([0, 2**11 - 1, 2**63, 2**64 - 1], dtype=np.uint64))
    assert shares.tolist() == [0.0, 0.0, 0.5, pytest.approx(1.0)]
    assert shares.max() < 1.0
