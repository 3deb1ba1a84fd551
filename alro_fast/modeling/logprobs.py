"""Log-probabilities of answers, computed in packed forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from .attention import answer_hidden_states
from .lm_head import head_of
from .packing import Tree, collate, common_rows
from .planning import plan_forwards

Autocast = Callable[[], AbstractContextManager]


@torch.no_grad()
def answer_logprobs(
    model: nn.Module,
    trees: Sequence[Tree],
    token_budget: int = 8192,
    backend: str = "auto",
    autocast: Autocast = nullcontext,
    share: str = "batch",
) -> list[np.ndarray]:
    """Per tree, the summed log-probability of every branch's answer: float64 [branches] each. The model in eval mode.

    A tree over the budget gets a forward of its own. autocast: a context around the trunk, as training has; the head is
    outside. share: as `packing.collate` takes it.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    sums: list[np.ndarray] = [np.empty(0)] * len(trees)
    sizes = [tree.rows(share) for tree in trees]
    head = head_of(model)
    for indices in plan_forwards(sizes, token_budget, common_rows(trees, share)):
        packed = collate(trees, indices, share).to(device)
        with autocast():
            hidden = answer_hidden_states(model, packed)
        rows = head.label_logprobs(hidden, packed, backend=backend).double().cpu().numpy()
        for place, index in enumerate(indices):
            offsets = packed.branch_rows[place]
            sums[index] = np.add.reduceat(rows[: offsets[-1]], offsets[:-1])
    model.train(training)
    return sums
