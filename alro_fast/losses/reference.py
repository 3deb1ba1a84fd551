"""Every loss in plain PyTorch: the definition the kernels, the C++ backend and the fused ops are checked against.

Slow and obvious: full [N, V] logits, one list at a time, any floating dtype (float64 stays float64, half precision is
computed in float32), differentiable by autograd to any order. Functions take the arguments of their namesakes in
`alro_fast.ops` and `alro_fast.losses.alro`; `mass_bound` and `backend` are accepted for that reason and have no effect.
Symbols and section numbers are those of docs/methods.md, which says of every formula where it comes from: an
abstract, a secondary source, released code, or our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .alro import ALROCounts, ALROLossOutput, RankingLists, sharpness
from .preference import PreferenceLoss


def head_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """1.1: logits, whose softmax is p: z = softcap(scale * (hidden weight^T + bias)), softcap(x) = cap tanh(x / cap);
    [N, V], float32 or float64."""
    z = F.linear(_wide(hidden), _wide(weight), None if bias is None else _wide(bias)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    mass_bound: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """1.1: log p(target), shape of targets ([N] or [N, C]; 0 where ignored), and lse [N]."""
    z = head_logits(hidden, weight, bias=bias, softcap=softcap, scale=scale)
    lse = torch.logsumexp(z, dim=1)
    columns = targets.long().view(len(targets), *(targets.shape[1:] or [1]))
    ignored = columns == ignore_index
    logprobs = z.gather(1, columns.masked_fill(ignored, 0)) - lse[:, None]
    return logprobs.masked_fill(ignored, 0.0).view(targets.shape), lse


def linear_kl(
    hidden_p: Tensor,
    hidden_q: Tensor,
    weight: Tensor,
    *,
    relabel: tuple[Tensor, Tensor] | None = None,
    detach_p: bool = True,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    mass_bound: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """1.3: KL(p || q) per row [N], over the whole vocabulary; `relabel[0][n, c]` of p is `relabel[1][n, c]` of q."""
    z_p = head_logits(hidden_p, weight, bias=bias, softcap=softcap, scale=scale)
    z_q = head_logits(hidden_q, weight, bias=bias, softcap=softcap, scale=scale)
    if relabel is not None:
        z_q = torch.stack([relabelled(z, *ids) for z, *ids in zip(z_q, *relabel)])
    return divergence(z_p, z_q, "kl", detach_p)


def relabelled(z_q: Tensor, ids_p: Tensor, ids_q: Tensor) -> Tensor:
    """1.3: z_q [V] with the logit of token ids_q[c] moved to where p has that item, token ids_p[c]; -1 pads."""
    used = ids_p >= 0
    return z_q.index_copy(0, ids_p[used].long(), z_q[ids_q[used].long()])


def divergence(z_p: Tensor, z_q: Tensor, kind: str = "kl", detach_p: bool = False) -> Tensor:
    """1.3, over the last axis of logits; kind: a name of DIVERGENCES."""
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence kind is {kind!r}; expected one of {', '.join(DIVERGENCES)}")
    log_p, log_q = torch.log_softmax(z_p.detach() if detach_p else z_p, -1), torch.log_softmax(z_q, -1)
    return DIVERGENCES[kind](log_p, log_q)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # log p, log q [.., C] -> [..]
    "kl": lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(-1),  # KL(P || Q)
    "ce": lambda log_p, log_q: -(log_p.exp() * log_q).sum(-1),
    "symmetric": lambda log_p, log_q: (DIVERGENCES["kl"](log_p, log_q) + DIVERGENCES["kl"](log_q, log_p)) / 2,
}


def soft_argmax(y: Tensor, gamma: float) -> Tensor:
    """1.2: s_i = sum_k k softmax_k(gamma y_ki) of one list; y [n slots, n candidates] -> [n]."""
    position = torch.arange(1, len(y) + 1, dtype=y.dtype, device=y.device)
    return position @ torch.softmax(gamma * y, dim=0)


def soft_argmax_ranks(scores: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """1.2: s, the expected rank [L, M] of each candidate, 0 on pads; scores [L, M slots, M candidates], mask [L, M]."""
    width = scores.shape[1]
    expected = [_padded(soft_argmax(_wide(y)[:n, :n], gamma), width) for y, n in zip(scores, mask.sum(1).tolist())]
    return torch.stack(expected) if expected else _wide(scores).sum(dim=1)


def discount_gap(distance: Tensor) -> Tensor:
    """1.2: delta = 1/D_d - 1/D_{d+1}, D_k = log2(1 + k), for a distance d >= 1 of target positions."""
    return 1 / torch.log2(1 + distance) - 1 / torch.log2(2 + distance)


def gains(ratings: Tensor) -> Tensor:
    """1.2: G_i = (2^r_i - 1) / maxDCG of one list; ratings [n] without NaN; all 0 where no rating is above 0."""
    gain = 2**ratings - 1
    best_first = gain.sort(descending=True).values
    position = torch.arange(1, len(gain) + 1, dtype=gain.dtype, device=gain.device)
    ideal = (best_first / torch.log2(1 + position)).sum()
    return gain / ideal if ideal > 0 else torch.zeros_like(gain)


def pairwise_lambda(badness: Tensor, ratings: Tensor, ranks: Tensor, sigma: float) -> Tensor:
    """1.2, one list: sum over r_i > r_j of delta_ij |G_i - G_j| log2(1 + exp(sigma (badness_i - badness_j))).

    badness [n], lower = better: the expected rank, or minus the expected grade. Ungraded candidates are in no pair.
    """
    graded = ~ratings.isnan()
    badness, rating, rank = badness[graded], ratings[graded].to(badness.dtype), ranks[graded]
    gain = gains(rating)
    i, j = (rating[:, None] > rating[None, :]).nonzero(as_tuple=True)
    weight = discount_gap((rank[i] - rank[j]).abs().to(badness.dtype)) * (gain[i] - gain[j]).abs()
    margin = sigma * (badness[i] - badness[j])
    return (weight * (margin.clamp(min=0) + torch.log1p(torch.exp(-margin.abs())))).sum() / math.log(2)


def soft_lambda(
    scores: Tensor,
    ratings: Tensor,
    mask: Tensor,
    *,
    ranks: Tensor | None = None,
    gamma: float,
    sigma: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """1.2: soft lambda loss per list [L], expected rank [L, M]; ranks None: descending ratings, ties by position."""
    expected = soft_argmax_ranks(scores, mask, gamma=gamma)
    losses = []
    for index, n in enumerate(mask.sum(1).tolist()):
        rating = ratings[index, :n]
        rank = _descending_ranks(rating) if ranks is None else ranks[index, :n]
        losses.append(pairwise_lambda(expected[index, :n], rating, rank, sigma))
    return torch.stack(losses) if losses else expected.sum(dim=1), expected


def alro_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lists: RankingLists,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    mass_bound: float | None = None,
    backend: str = "auto",
    **options,
) -> ALROLossOutput:
    """1.4: L = L_SFT + alpha L_SLL + beta L_PSL; options are those of `alro_loss_from_logits`."""
    z = head_logits(hidden, weight, bias=bias, softcap=softcap, scale=scale)
    return alro_loss_from_logits(z, labels, lists, **options)


def alro_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    lists: RankingLists,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float | None = None,
    sigma: float = 1.0,
    score: str = "logprob",
    score_space: str = "candidates",
    psl: str = "kl",
    psl_space: str = "candidates",
    psl_detach: bool = True,
    psl_mask_emitted: bool = False,
    ignore_index: int = -100,
    counts: ALROCounts | None = None,
    backend: str = "auto",
) -> ALROLossOutput:
    """1.4: the ALRO loss of logits [N, V]; every argument as `alro_fast.alro_loss`."""
    z, gamma = _wide(logits), sharpness(gamma, score)
    width = lists.slot_rows.shape[1]
    soft_lambdas, permutations, expected = [], [], []
    for index in range(len(lists.slot_rows)):
        n = int((lists.slot_rows[index] >= 0).sum())
        slots = z[lists.slot_rows[index, :n]]  # [n, V]
        ratings, ranks = lists.ratings[index, :n], lists.ranks[index, :n]
        if lists.grades is None:
            y = identifier_scores(slots, lists.candidate_ids[index, :n], score, score_space)
            s = soft_argmax(y, gamma)
            soft_lambdas.append(pairwise_lambda(s, ratings, ranks, sigma))
        else:
            s = expected_grade(slots, lists.grades.token_ids, lists.grades.values)
            soft_lambdas.append(pairwise_lambda(-s, ratings, ranks, sigma))
        expected.append(_padded(s, width))
        if lists.twin[index] >= 0:
            permutations.append(_permutation(z, lists, index, psl, psl_space, psl_detach, psl_mask_emitted))

    every = labels.reshape(len(labels), -1).long()  # a row may predict several
    each = z.repeat_interleave(every.shape[1], dim=0)
    row_losses = F.cross_entropy(each, every.flatten(), ignore_index=ignore_index, reduction="sum")
    if counts is None:
        listed = int((lists.slot_rows >= 0).any(dim=1).sum())
        counts = ALROCounts(max(int((labels != ignore_index).sum()), 1), max(listed, 1), max(len(permutations), 1))
    sft = row_losses / counts.rows
    soft_lambda = sum(soft_lambdas, z.new_zeros(())) / counts.lists
    permutation = sum(permutations, z.new_zeros(())) / counts.twins
    loss = sft + alpha * soft_lambda + beta * permutation
    ranks = torch.stack(expected).detach() if expected else z.new_zeros(lists.slot_rows.shape)
    return ALROLossOutput(loss, sft, soft_lambda, permutation, ranks)


def dmpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    rejected_mask: Tensor | None = None,
    chosen_mask: Tensor | None = None,
    variant: str = "dmpo",
    ftx: float = 0.0,
    chosen_lengths: Tensor | None = None,
) -> PreferenceLoss:
    """2.1, 2.2, 2.3, 2.4: the preference loss, user by user; every argument as `alro_fast.dmpo_loss`."""
    chosen, rejected = _wide(chosen), _wide(rejected)
    gain_chosen = chosen if ref_chosen is None else chosen - _wide(ref_chosen)
    gain_rejected = rejected if ref_rejected is None else rejected - _wide(ref_rejected)
    losses, entropies = [], []
    for user in range(len(rejected)):
        there = torch.ones_like(rejected[user], dtype=torch.bool) if rejected_mask is None else rejected_mask[user]
        positive = torch.ones_like(chosen[user], dtype=torch.bool) if chosen_mask is None else chosen_mask[user]
        if chosen.dim() == 2 and chosen_mask is None and variant != "mult":
            positive = there
        worse = beta * gain_rejected[user, there]
        better = beta * gain_chosen[user, positive] if chosen.dim() == 2 else beta * gain_chosen[user].expand(1)
        tokens = torch.ones_like(chosen) if chosen_lengths is None else chosen_lengths
        own = (-chosen[user] / tokens[user]).reshape(-1)
        entropies.append(own[positive] if chosen.dim() == 2 else own)
        if not len(worse):
            continue
        if variant == "dmpo":
            losses.append(-torch.log(torch.sigmoid(better.mean() - worse.mean())))
        elif variant == "mean_outside":
            losses.append(-torch.log(torch.sigmoid(better - worse)).mean())
        elif variant == "sdpo":
            losses.append(torch.log(1 + torch.exp(worse - better).sum()))
        else:
            weights = torch.exp(torch.cat([better, worse]))
            losses.append(-torch.log(weights[: len(better)] / weights.sum()).sum())
    loss = torch.stack(losses).mean() + ftx * torch.cat(entropies).mean()
    rejected_mask = torch.ones_like(rejected, dtype=torch.bool) if rejected_mask is None else rejected_mask
    if chosen_mask is None:
        paired = chosen.dim() == 2 and variant != "mult"
        chosen_mask = rejected_mask if paired else torch.ones_like(chosen, dtype=torch.bool)
    rewards = beta * gain_chosen * chosen_mask, beta * gain_rejected * rejected_mask
    return PreferenceLoss(loss, *(reward.detach() for reward in rewards))


def identifier_scores(slots: Tensor, ids: Tensor, score: str, space: str) -> Tensor:
    """1.2: y_ki of one list, [n slots, n candidates], from the logits of its slots [n, V]."""
    own = slots[:, ids]
    if score == "logit":
        return own
    log_p = own - torch.logsumexp(slots if space == "vocab" else own, dim=1, keepdim=True)
    return log_p if score == "logprob" else log_p.exp()


def expected_grade(rows: Tensor, token_ids: Tensor, values: Tensor) -> Tensor:
    """1.5: e_i = sum_c values_c softmax_c(z_i) over the grade tokens; rows [n, V] -> [n], higher is better."""
    return torch.softmax(rows[:, token_ids], dim=1) @ values.to(rows.dtype)


def _permutation(
    z: Tensor, lists: RankingLists, index: int, kind: str, space: str, detach: bool, mask_emitted: bool
) -> Tensor:
    """1.3: mean divergence of the twin's original (P) and list `index` (Q) over the slots with a choice left."""
    original = int(lists.twin[index])
    n = int((lists.slot_rows[index] >= 0).sum())
    z_p, z_q = z[lists.slot_rows[original, :n]], z[lists.slot_rows[index, :n]]
    if n < (2 if lists.grades is None else 1):
        return z.new_zeros(())
    if lists.grades is not None:
        if space == "candidates":
            z_p, z_q = z_p[:, lists.grades.token_ids], z_q[:, lists.grades.token_ids]
        return divergence(z_p, z_q, kind, detach).mean()
    ids_p, ids_q = lists.candidate_ids[original, :n], lists.candidate_ids[index, :n]
    if space == "vocab":
        z_q = torch.stack([relabelled(row, ids_p, ids_q) for row in z_q])
        return divergence(z_p[: n - 1], z_q[: n - 1], kind, detach).mean()
    z_p, z_q = z_p[:, ids_p], z_q[:, ids_q]
    terms = []
    for slot in range(n - 1):
        left = lists.ranks[index, :n] > slot if mask_emitted else torch.ones(n, dtype=torch.bool, device=z.device)
        terms.append(divergence(z_p[slot, left], z_q[slot, left], kind, detach))
    return torch.stack(terms).mean()


def _descending_ranks(ratings: Tensor) -> Tensor:
    order = torch.argsort(ratings.nan_to_num(nan=-1.0), descending=True, stable=True)
    return torch.argsort(order) + 1


def _padded(values: Tensor, width: int) -> Tensor:
    return F.pad(values, (0, width - len(values)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
