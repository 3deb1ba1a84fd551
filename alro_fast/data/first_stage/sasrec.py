"""Self-attentive sequential retrieval (Kang and McAuley, 2018): the next like from the likes before it.

Causal transformer blocks over the latest LENGTH likes; an item's score is the inner product of its embedding with the
last hidden state. Trained with a softmax over the positive and NEGATIVES items drawn uniformly for the batch, in place
of the paper's single negative under a sigmoid. float32 torch on the CPU. The settings below were chosen on the
validation targets of ml-latest-small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .seeded import seeded

LENGTH, BLOCKS, HEADS, DROPOUT = 50, 1, 2, 0.4
BATCH, NEGATIVES = 16, 512


class SelfAttentiveRecommender(nn.Module):
    """items [B, T] int64, 0 = padding on the left, k + 1 = item k -> hidden [B, T, d]."""

    def __init__(self, items: int, size: int):
        super().__init__()
        self.item = nn.Embedding(items + 1, size, padding_idx=0)
        self.place = nn.Embedding(LENGTH, size)
        block = nn.TransformerEncoderLayer(size, HEADS, size, DROPOUT, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, BLOCKS, norm=nn.LayerNorm(size), enable_nested_tensor=False)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.normal_(self.item.weight, std=size**-0.5)
        nn.init.normal_(self.place.weight, std=size**-0.5)

    def forward(self, items: Tensor) -> Tensor:
        length = items.shape[1]
        states = self.dropout(self.item(items) + self.place.weight[LENGTH - length :])
        blocked = torch.ones(length, length, dtype=torch.bool).triu(1)  # later places
        hidden = blocked | (items == 0)[:, None, :]
        hidden = hidden & ~torch.eye(length, dtype=torch.bool)  # padding sees itself: no row without anything to see
        return self.blocks(states, mask=hidden.repeat_interleave(HEADS, dim=0))


def train_sasrec(
    sequences: Sequence[np.ndarray], items: int, *, factors: int, iterations: int, learning_rate: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [users, d], the last hidden state of every user (zeros for an empty sequence), and items' [items, d].

    sequences: per user, item numbers 0 .. items - 1 in time order; iterations: passes over the sequences.
    """
    with seeded(seed):
        model = SelfAttentiveRecommender(items, factors)
        windows = torch.from_numpy(_windows(sequences))
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
        model.train()
        for _ in range(iterations if len(windows) else 0):
            for rows in torch.randperm(len(windows)).split(BATCH):
                loss = _loss(model, _trimmed(windows[rows]), items)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            parts = torch.from_numpy(_latest(sequences)).split(BATCH)
            users = torch.cat([model(_trimmed(part))[:, -1] for part in parts])
    states = users.numpy().copy()
    states[[len(sequence) == 0 for sequence in sequences]] = 0.0
    return states, model.item.weight.detach().numpy()[1:].copy()


def _loss(model: SelfAttentiveRecommender, window: Tensor, items: int) -> Tensor:
    """Mean cross-entropy of the next item; negatives that are the positive itself are left out."""
    past, wanted = window[:, :-1], window[:, 1:]
    real = (past > 0) & (wanted > 0)
    hidden, wanted = model(past)[real], wanted[real]
    negatives = torch.randint(1, items + 1, (NEGATIVES,))
    positive = (hidden * model.item(wanted)).sum(1, keepdim=True)
    others = (hidden @ model.item(negatives).T).masked_fill(wanted[:, None] == negatives, -torch.inf)
    return functional.cross_entropy(torch.cat([positive, others], 1), torch.zeros(len(wanted), dtype=torch.long))


def _windows(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [windows, LENGTH + 1]: every sequence cut from its end, the first item of a window the last of the one
    before it, so that each item but a user's first is predicted once."""
    cut = []
    for sequence in sequences:
        for last in range(len(sequence), 1, -LENGTH):
            cut.append(_padded(sequence[max(0, last - LENGTH - 1) : last], LENGTH + 1))
    return np.stack(cut) if cut else np.zeros((0, LENGTH + 1), dtype=np.int64)


def _latest(sequences: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([_padded(sequence[-LENGTH:], LENGTH) for sequence in sequences])


def _trimmed(rows: Tensor) -> Tensor:
    """Without the places that are padding in every row; two at least are kept."""
    used = int((rows > 0).sum(1).max())
    return rows[:, -max(2, used) :]


def _padded(sequence: np.ndarray, length: int) -> np.ndarray:
    row = np.zeros(length, dtype=np.int64)
    if len(sequence):
        row[-len(sequence) :] = np.asarray(sequence) + 1
    return row
