"""Log-probabilities of answers, computed in packed forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from ..processes.dealing import dealt
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

    A tree over the budget gets a forward of its own; forwards are dealt over processes (`processes.dealing`).
    autocast: a context around the trunk, as training has; the head is outside. share: as `packing.collate` takes it.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    sizes = [tree.rows(share) for tree in trees]
    plan = plan_forwards(sizes, token_budget, common_rows(trees, share))
    head = head_of(model)

    def forward(indices: list[int]) -> list[np.ndarray]:
        packed = collate(trees, indices, share).to(device)
        with autocast():
            hidden = answer_hidden_states(model, packed)
        rows = head.label_logprobs(hidden, packed, backend=backend).double().cpu().numpy()
        return [np.add.reduceat(rows[: offsets[-1]], offsets[:-1]) for offsets in packed.branch_rows]

    costs = [sum(sizes[index] for index in indices) for indices in plan]
    found = dealt(plan, costs, forward, model=model)
    model.train(training)
    sums = {index: row for indices, rows in zip(plan, found) for index, row in zip(indices, rows, strict=True)}
    return [sums[index] for index in range(len(trees))]
