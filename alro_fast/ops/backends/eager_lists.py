"""Terms of a list in plain PyTorch, with their gradients: soft lambda and the permutation divergence.

A divergence is an entry of DIVERGENCES here and its definition in `alro_fast.losses.reference`; the other backends
leave those that they do not declare to this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# p, q, log p, log q [L, R, C], all 0 off the cells -> D(P, Q) [L, R], its gradients in the logits of P and of Q
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Listwise(NamedTuple):
    """Listwise terms of L lists and their gradients (None: autograd has them); logits [L, R, C]."""

    soft_lambda: Tensor  # [L]
    permutation: Tensor  # [L] of list l against twin[l]; 0 where twin[l] < 0
    expected: Tensor  # [L, M] expected rank of candidate i (ranking form) or expected grade (ratings form); 0 on pads
    d_soft_lambda: Tensor | None  # [L, R, C] d soft_lambda[l] / d logits[l]
    d_student: Tensor | None  # [L, R, C] d permutation[l] / d logits[l]; 0 where twin[l] < 0
    d_teacher: Tensor | None  # [L, R, C] d permutation[l] / d logits[twin[l]], 0 where twin[l] < 0; None: detached


def listwise(
    logits: Tensor,
    ratings: Tensor,
    ranks: Tensor,
    sizes: Tensor,
    twin: Tensor,
    values: Tensor | None,
    *,
    gamma: float,
    sigma: float,
    normalise: bool,
    divergence: str,
    detach: bool,
    mask_emitted: bool,
) -> Listwise:
    """Soft lambda loss and permutation divergence of every list, with their gradients.

    logits [L, R, C] float32 or float64. values None, the `ranking` form: R = M slots, C = M candidates, of which list l
    uses the first sizes[l] of each; values [C], the `ratings` form: R = M candidates (the first sizes[l]), C grades.
    ratings [L, M] (logits' dtype): NaN = ungraded, in the softmax but in no pair and not in maxDCG. ranks [L, M] int64
    target slots, 1 = best. sizes [L] int64. twin [L] int64, -1: none. Entries on pads are anything finite.

        y = log softmax_i(z_k) over the list's candidates (normalise) or z itself;  s_i = sum_k k softmax_k(gamma y_ki)
        soft_lambda = sum_{r_i > r_j} delta_ij |G_i - G_j| log2(1 + exp(sigma (s_i - s_j)))
            G_i = (2^r_i - 1) / maxDCG (0 where maxDCG is 0)
            delta_ij = 1/log2(1 + d) - 1/log2(2 + d), d = |rank_i - rank_j|
            ratings form: e_i = sum_c values_c softmax_c(z_i) in place of s_i, the sign of sigma flipped; gamma,
            normalise and mask_emitted are not used
        permutation[l] = 1/(m-1) sum_{k<m} D(P_k, Q_k), P from list twin[l], Q from list l, over the candidates
            (ratings form: 1/m sum_i over the grades); divergence: "none" or a name of DIVERGENCES; always of
            softmax(logits); mask_emitted leaves out, at slot k, the candidates of target slots before k
    """
    length, row_count = logits.shape[:2]
    ranking = values is None
    slot = torch.arange(row_count, device=logits.device)
    valid = slot < sizes[:, None]
    cell = valid[:, :, None] & (valid[:, None, :] if ranking else torch.ones_like(logits, dtype=torch.bool))
    log_p = _masked_log_softmax(logits, cell)
    p = log_p.exp() * cell

    if values is None:
        score = log_p if normalise else logits
        over_slots = torch.softmax((gamma * score).masked_fill(~cell, torch.finfo(logits.dtype).min), dim=1) * cell
        position = (slot + 1).to(logits.dtype)[None, :, None]
        expected = (over_slots * position).sum(dim=1)
        jacobian = gamma * over_slots * (position - expected[:, None, :])
        soft_lambda, d_expected = _pairwise_lambda(expected, ratings, ranks, valid, sigma)
        d_soft_lambda = d_expected[:, None, :] * jacobian
        if normalise:
            d_soft_lambda = d_soft_lambda - p * d_soft_lambda.sum(dim=2, keepdim=True)
    else:
        expected = (p * values).sum(dim=2)
        soft_lambda, d_expected = _pairwise_lambda(expected, ratings, ranks, valid, -sigma)
        d_soft_lambda = d_expected[:, :, None] * p * (values - expected[:, :, None])

    if divergence == "none":
        zeros = torch.zeros_like(logits)
        return Listwise(soft_lambda, logits.new_zeros(length), expected, d_soft_lambda, zeros, None)
    if ranking and mask_emitted:
        cell = cell & (ranks[:, None, :] > slot[None, :, None])
        log_p = _masked_log_softmax(logits, cell)
    compared = valid & (slot < (sizes - 1)[:, None]) if ranking else valid
    compared = (compared & (twin >= 0)[:, None]).to(logits.dtype)
    weight = compared / compared.sum(dim=1, keepdim=True).clamp(min=1)
    teacher = twin.clamp(min=0)
    cell = cell & cell[teacher]
    log_p, log_q = (torch.where(cell, each, 0.0) for each in (log_p[teacher], log_p))
    value, d_teacher, d_student = DIVERGENCES[divergence](log_p.exp() * cell, log_q.exp() * cell, log_p, log_q)
    return Listwise(
        soft_lambda,
        (value * weight).sum(dim=1),
        expected,
        d_soft_lambda,
        d_student * weight[:, :, None],
        None if detach else d_teacher * weight[:, :, None],
    )


def _kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ratio = log_p - log_q
    value = (p * ratio).sum(dim=2)
    return value, p * (ratio - value[:, :, None]), q - p


def _ce(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = -(p * log_q).sum(dim=2)
    return value, -p * (log_q + value[:, :, None]), q - p


def _symmetric(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    forward, forward_p, forward_q = _kl(p, q, log_p, log_q)
    backward, backward_q, backward_p = _kl(q, p, log_q, log_p)
    return (forward + backward) / 2, (forward_p + backward_p) / 2, (forward_q + backward_q) / 2


DIVERGENCES: dict[str, Divergence] = {"kl": _kl, "ce": _ce, "symmetric": _symmetric}


def _pairwise_lambda(
    score: Tensor, ratings: Tensor, ranks: Tensor, valid: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """[L] sum over r_i > r_j of delta |G_i - G_j| log2(1 + exp(sigma (score_i - score_j))); d / d score [L, M]."""
    graded = valid & ~ratings.isnan()
    rating = torch.where(graded, ratings, 0.0)
    gain = torch.where(graded, torch.exp2(rating) - 1, 0.0)
    position = torch.arange(1, gain.shape[1] + 1, device=gain.device, dtype=gain.dtype)
    ideal = (gain.sort(dim=1, descending=True).values / torch.log2(1 + position)).sum(dim=1, keepdim=True)
    gain = gain / torch.where(ideal > 0, ideal, 1.0)
    distance = (ranks[:, :, None] - ranks[:, None, :]).abs().clamp(min=1).to(gain.dtype)
    delta = 1 / torch.log2(1 + distance) - 1 / torch.log2(2 + distance)
    better = graded[:, :, None] & graded[:, None, :] & (rating[:, :, None] > rating[:, None, :])
    pair_weight = torch.where(better, delta * (gain[:, :, None] - gain[:, None, :]).abs(), 0.0) / math.log(2)
    margin = sigma * (score[:, :, None] - score[:, None, :])
    loss = (pair_weight * F.softplus(margin, threshold=math.inf)).sum(dim=(1, 2))
    pull = sigma * pair_weight * torch.sigmoid(margin)
    return loss, pull.sum(dim=2) - pull.sum(dim=1)


def _masked_log_softmax(logits: Tensor, cell: Tensor) -> Tensor:
    return torch.log_softmax(logits.masked_fill(~cell, torch.finfo(logits.dtype).min), dim=-1)
