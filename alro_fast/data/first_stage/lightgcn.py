"""LightGCN (He et al. 2020, arXiv 2002.02126): embeddings of users and items, averaged over their neighbourhoods.

    P = D^(-1/2) A D^(-1/2),      A: the adjacency of users and the items they like, D: its degrees
    F = 1 / (L + 1) sum_{l = 0..L} P^l E,      score(u, i) = F_u . F_i
    loss = mean over pairs of -ln sigmoid(score(u, i) - score(u, j)) + lambda / 2 (|E_u|^2 + |E_i|^2 + |E_j|^2)

A pair is a like (u, i) and an item j drawn uniformly, left out where u likes it too. The abstract states linear
propagation and a weighted sum over layers; the normalisation, equal weights and the loss are as secondary sources
describe them, and so is the draw of j. The authors' code was not read. The size of a batch is ours. float32, on the
CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .seeded import seeded

BATCH = 8192  # likes; every step propagates the whole graph, whatever their number
SPREAD = 0.1  # standard deviation of the first embeddings


def train_lightgcn(
    user: np.ndarray,
    item: np.ndarray,
    shape: tuple[int, int],
    *,
    factors: int,
    layers: int,
    iterations: int,
    learning_rate: float,
    regularization: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [users, factors] and [items, factors], F of the module's formula; zeros for who has no like.

    user, item: int64 [likes], every pair once; shape: (users, items); layers: L; iterations: passes over the likes;
    regularization: lambda.
    """
    users, items = shape
    with seeded(seed):
        table = (SPREAD * torch.randn(users + items, factors)).requires_grad_()
        graph, pairs = normalised(user, item, shape), torch.from_numpy(np.stack([user, item], axis=1))
        liked = torch.from_numpy(np.unique(user * items + item))
        optimizer = torch.optim.Adam([table], lr=learning_rate)
        for _ in range(iterations):
            for rows in torch.randperm(len(pairs)).split(BATCH):
                of, positive = pairs[rows].unbind(1)
                negative = torch.randint(items, (len(rows),))
                fresh = ~torch.isin(of * items + negative, liked)
                nodes = torch.stack([of, users + positive, users + negative])[:, fresh]
                loss = pair_loss(table, graph, nodes, layers, regularization)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            final = Propagation.apply(table, graph, layers)
    final[np.bincount(np.concatenate([user, users + item]), minlength=users + items) == 0] = 0.0
    return final[:users].numpy().copy(), final[users:].numpy().copy()


def normalised(user: np.ndarray, item: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """P, sparse float32 [users + items, users + items]: items are numbered after users. Every pair is given once."""
    node = torch.from_numpy(np.stack([user, shape[0] + item]))
    degree = torch.bincount(node.flatten(), minlength=sum(shape)).double()
    weight = degree[node].prod(0).rsqrt().float()
    places = torch.cat([node, node.flip(0)], dim=1)
    size = (sum(shape), sum(shape))
    return torch.sparse_coo_tensor(places, weight.repeat(2), size, check_invariants=True).coalesce()


class Propagation(torch.autograd.Function):
    """(E [nodes, d], P, L) -> F [nodes, d]. P is symmetric, so the gradient is propagated in the same way."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, graph: Tensor, layers: int) -> Tensor:
        ctx.graph, ctx.layers = graph, layers
        return _mean_of_layers(table, graph, layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _mean_of_layers(gradients[0], ctx.graph, ctx.layers), None, None


def _mean_of_layers(table: Tensor, graph: Tensor, layers: int) -> Tensor:
    total = layer = table
    for _ in range(layers):
        layer = torch.sparse.mm(graph, layer)
        total = total + layer
    return total / (layers + 1)


def pair_loss(table: Tensor, graph: Tensor, nodes: Tensor, layers: int, regularization: float) -> Tensor:
    """The module's loss. nodes: int64 [3, pairs], the nodes of u, i and j; no pair at all: 0."""
    of, positive, negative = Propagation.apply(table, graph, layers)[nodes]
    ahead = (of * (positive - negative)).sum(1)
    square = table[nodes].square().sum() / 2
    return (functional.softplus(-ahead).sum() + regularization * square) / max(1, nodes.shape[1])
