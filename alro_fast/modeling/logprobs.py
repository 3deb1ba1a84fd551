"""Log-probabilities of answers, computed in packed forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ..ops import linear_logprobs
from .attention import tree_hidden_states
from .lm_head import Head, head_of
from .packing import PackedBatch, Tree, collate, plan_forwards

Autocast = Callable[[], AbstractContextManager]


@torch.no_grad()
def answer_logprobs(
    model: nn.Module,
    trees: Sequence[Tree],
    token_budget: int = 8192,
    backend: str = "auto",
    autocast: Autocast = nullcontext,
) -> list[np.ndarray]:
    """Per tree, the summed log-probability of every branch's answer: float64 [branches] each. The model in eval mode.

    A tree over the budget gets a forward of its own. autocast: a context around the trunk, as training has; the head is
    outside.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    sums: list[np.ndarray] = [np.empty(0)] * len(trees)
    sizes = [tree.num_tokens for tree in trees]
    head = head_of(model)
    for indices in plan_forwards(sizes, token_budget):
        packed = collate(trees, indices).to(device)
        with autocast():
            hidden = tree_hidden_states(model, packed)
        rows = token_logprobs(hidden.to(head.weight.dtype), head, packed, backend).double().cpu().numpy()
        for place, index in enumerate(indices):
            offsets = packed.branch_rows[place]
            sums[index] = np.add.reduceat(rows[: offsets[-1]], offsets[:-1])
    model.train(training)
    return sums


def token_logprobs(hidden: Tensor, head: Head, packed: PackedBatch, backend: str = "auto") -> Tensor:
    """log p(label) of every answer row, [N]."""
    logprobs, _ = linear_logprobs(
        hidden, head.weight, packed.labels, bias=head.bias, softcap=head.softcap, scale=head.scale, backend=backend
    )
    return logprobs
