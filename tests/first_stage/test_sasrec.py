"""The sequential retriever: causal, blind to padding, and able to learn an order that popularity cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_ratings import interactions

from alro_fast.data.first_stage import sasrec
from alro_fast.data.first_stage.likes import split_likes
from alro_fast.data.first_stage.retrieval import (
    RetrieverOptions,
    fit_retriever,
    retrieval_metrics,
    retrieve,
    seen_items,
)
from alro_fast.data.first_stage.sasrec import LENGTH, SelfAttentiveRecommender, train_sasrec

ITEMS = 40


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SelfAttentiveRecommender(ITEMS, 16).eval()


@torch.no_grad()
def test_a_place_sees_itself_and_what_came_before(model):
    items = torch.randint(1, ITEMS + 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    before = model(items)
    changed = items.clone()
    changed[:, 30] = changed[:, 30] % ITEMS + 1
    after = model(changed)
    assert torch.equal(before[:, :30], after[:, :30])
    assert ((before[:, 30:] - after[:, 30:]).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_padding_changes_nothing(model):
    items = torch.randint(1, ITEMS + 1, (1, 7), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.zeros(1, LENGTH - 7, dtype=torch.long), items], dim=1)
    assert torch.isfinite(model(padded)).all()
    assert torch.allclose(model(items), model(padded)[:, -7:], atol=1e-6)


def test_windows_predict_every_item_but_the_first_once():
    sequences = [np.arange(n) % ITEMS for n in (0, 1, 2, LENGTH, LENGTH + 1, 2 * LENGTH + 7)]
    windows = sasrec._windows(sequences)
    past, wanted = windows[:, :-1], windows[:, 1:]
    found = sorted((wanted[(past > 0) & (wanted > 0)] - 1).tolist())
    assert found == sorted(int(item) for sequence in sequences for item in sequence[1:])


def chain_rows(users=60):
    """Everybody walks round the items one by one, from a place of their own: all items are equally popular."""
    return [(u, (7 * u + step) % ITEMS, 5, step) for u in range(users) for step in range(14)]


def test_it_learns_what_follows_what():
    split = split_likes(interactions(chain_rows(), ITEMS), 4.0, 0)

    def figures(name, options):
        retriever = fit_retriever(name, split, options, seed=0)
        return retrieval_metrics(retrieve(retriever, seen_items(split), split.target["valid"], 10).place)

    assert figures("sasrec", RetrieverOptions(factors=32, iterations=40, learning_rate=0.01))["hr@3"] > 0.9
    assert figures("popularity", RetrieverOptions())["hr@3"] < 0.5


def test_a_user_without_likes_has_zeros_and_global_randomness_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    sequences = [np.array([], dtype=np.int64), np.array([1, 2, 3])]
    users, items = train_sasrec(sequences, ITEMS, factors=8, iterations=1, learning_rate=0.01, seed=0)
    assert torch.rand(1) == expected
    assert users[0].tolist() == [0.0] * 8
    assert users[1].any()
    assert items.shape == (ITEMS, 8)
