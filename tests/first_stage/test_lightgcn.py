"""LightGCN: propagation and gradient against dense matrices, the loss by hand, groups of taste it has to find."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_ratings import interactions

from alro_fast.data.first_stage.lightgcn import Propagation, normalised, pair_loss, train_lightgcn
from alro_fast.data.first_stage.likes import split_likes
from alro_fast.data.first_stage.retrieval import (
    RetrieverOptions,
    fit_retriever,
    retrieval_metrics,
    retrieve,
    seen_items,
)

USER, ITEM = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 1, 2, 3])
SHAPE = (4, 5)  # user 3 and item 4 have no like


def dense() -> torch.Tensor:
    """D^(-1/2) A D^(-1/2), a zero row where the degree is zero."""
    adjacency = torch.zeros(sum(SHAPE), sum(SHAPE), dtype=torch.float64)
    for user, item in zip(USER, ITEM):
        adjacency[user, SHAPE[0] + item] = adjacency[SHAPE[0] + item, user] = 1
    root = torch.diag(torch.tensor([1 / math.sqrt(d) if d else 0.0 for d in adjacency.sum(1).tolist()]).double())
    return root @ adjacency @ root


def test_the_graph_by_hand():
    """The like of user 0 for item 1: two likes of the user, three of the item."""
    graph = normalised(USER, ITEM, SHAPE).to_dense()
    torch.testing.assert_close(graph, dense().float())
    assert graph[0, 4 + 1].item() == graph[4 + 1, 0].item() == pytest.approx(1 / math.sqrt(6))
    assert not graph[3].any()
    assert not graph[4 + 4].any()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_propagation_and_its_gradient_are_the_dense_ones(layers):
    table = torch.randn(sum(SHAPE), 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(sum(SHAPE), 3, generator=torch.Generator().manual_seed(1))
    ours = Propagation.apply(table, normalised(USER, ITEM, SHAPE), layers)
    (gradient,) = torch.autograd.grad((ours * weight).sum(), table)
    closed = sum(torch.linalg.matrix_power(dense(), power) for power in range(layers + 1)).float() / (layers + 1)
    torch.testing.assert_close(ours, closed @ table)
    torch.testing.assert_close(gradient, closed.T @ weight)


def test_the_loss_by_hand():
    """Two pairs of user 1 (item 1 against 0 and 3), in dense matrices; the squared norm is that of E, not of F."""
    table = torch.randn(sum(SHAPE), 2, generator=torch.Generator().manual_seed(0))
    final = (dense().float() @ table + table) / 2
    nodes = torch.tensor([[1, 1], [5, 5], [4, 7]])
    expected = 0.0
    for u, i, j in nodes.T.tolist():
        ahead = (final[u] @ (final[i] - final[j])).item()
        expected -= math.log(1 / (1 + math.exp(-ahead)))
        expected += 0.3 / 2 * sum(table[node].square().sum().item() for node in (u, i, j))
    loss = pair_loss(table, normalised(USER, ITEM, SHAPE), nodes, layers=1, regularization=0.3)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-6)
    assert pair_loss(table, normalised(USER, ITEM, SHAPE), nodes[:, :0], layers=1, regularization=0.3).item() == 0.0


def test_it_learns_groups_of_taste_from_sparse_likes():
    """Users of four tastes like 6 of their group's 20 items, all as popular: what a user likes next is theirs."""
    generator = np.random.default_rng(0)
    rows = [
        (user, int(4 * item + user % 4), 5, time)
        for user in range(120)
        for time, item in enumerate(generator.permutation(20)[:6])
    ]
    split = split_likes(interactions(rows, 80), 4.0, 0)

    def figures(name, options):
        retriever = fit_retriever(name, split, options, seed=0)
        return retriever, retrieve(retriever, seen_items(split), split.target["valid"], 10)

    retriever, found = figures("lightgcn", RetrieverOptions(factors=16, iterations=60, learning_rate=0.02))
    own = found.items % 4 == np.arange(120)[:, None] % 4
    assert own.mean() > 0.95
    _, popular = figures("popularity", RetrieverOptions())
    assert retrieval_metrics(found.place)["hr@10"] > 2 * retrieval_metrics(popular.place)["hr@10"]
    scores = retriever.score(np.arange(120))
    assert scores.shape == (120, len(retriever.known))


def test_who_has_no_like_has_zeros_and_global_randomness_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    options = {"factors": 8, "layers": 2, "iterations": 2, "learning_rate": 0.01, "regularization": 1e-4}
    fits = [train_lightgcn(USER, ITEM, SHAPE, **options, seed=seed) for seed in (0, 0, 1)]
    assert torch.rand(1) == expected
    users, items = fits[0]
    assert (users.shape, items.shape, users.dtype) == ((4, 8), (5, 8), np.float32)
    assert not users[3].any()
    assert not items[4].any()
    assert users[:3].any(1).all()
    assert np.array_equal(users, fits[1][0])
    assert not np.array_equal(users, fits[2][0])


def test_threads_change_nothing():
    options = {"factors": 8, "layers": 3, "iterations": 3, "learning_rate": 0.01, "regularization": 1e-4, "seed": 0}
    threads, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(train_lightgcn(USER, ITEM, SHAPE, **options))
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)
    assert np.array_equal(found[0][1], found[1][1])
