"""The backend that runs anywhere: plain PyTorch, tiled over the vocabulary, never a tensor of [N, V].

It is also the description of what a backend is: a module with the functions below (`gather_logits` and its backward
may be left out; this module's are then used), and `LONGEST_LIST` where `listwise` has a limit of candidates. Backends
know nothing of autograd, labels or losses; `alro_fast.ops` composes those. The logits of a row are, everywhere in this
project,

    z = softcap(scale * (hidden @ weight.T + bias)),      softcap(x) = cap * tanh(x / cap), or x where cap is None

which is the order in which every causal LM of transformers applies them. `w~_nv = dz_nv / dhidden_n
= scale * (1 - (z_nv / cap)^2) * w_v` is the slope-weighted column. Sums are kept in float32 (float64 for float64
input), whatever the dtype of `hidden` and `weight`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_BYTES = 4 << 20  # of one [N, T] tile of logits, and of one [T, H] tile of weights in the accumulation dtype
_LOWEST = {torch.float32: -87.0, torch.float64: -708.0}  # exp of less is a denormal, which slows a product tenfold
_GATHER_BYTES = 64 << 20  # of one block of gathered columns


class VocabPass(NamedTuple):
    """Statistics of one pass over the vocabulary; N rows, P pairs of rows, p = softmax(z)."""

    lse: Tensor  # [N] log sum_v exp z_nv
    expected: Tensor | None  # [N, H] U_n = sum_v p_nv w~_nv = d lse_n / d hidden_n              (want_expected)
    cross: Tensor | None  # [P] E_{p_a}[z_a - z_b] (entropy=True) or E_{p_a}[-z_b] (entropy=False)        (pairs)
    mixed: Tensor | None  # [P, H] sum_v p_av w~_bv; only with a softcap, else it is expected[a]  (pairs, want_expected)
    spread: Tensor | None  # [P, H] sum_v p_av (z_av - z_bv) w~_av, or p_av (-z_bv) w~_av          (want_spread)


class Listwise(NamedTuple):
    """Listwise terms of L lists and their gradients; logits [L, R, C]."""

    soft_lambda: Tensor  # [L]
    permutation: Tensor  # [L] of list l against twin[l]; 0 where twin[l] < 0
    expected: Tensor  # [L, M] expected rank of candidate i (ranking form) or expected grade (ratings form); 0 on pads
    d_soft_lambda: Tensor  # [L, R, C] d soft_lambda[l] / d logits[l]
    d_student: Tensor  # [L, R, C] d permutation[l] / d logits[l]; 0 where twin[l] < 0
    d_teacher: Tensor | None  # [L, R, C] d permutation[l] / d logits[twin[l]], 0 where twin[l] < 0; None: detached


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of this device and dtype, in a few words; None: it can."""
    return None


def vocab_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor | None,
    second: Tensor | None,
    *,
    entropy: bool,
    want_expected: bool,
    want_spread: bool,
    mass_bound: float,
) -> VocabPass:
    """One pass over `weight` for all rows.

    hidden [N, H] and weight [V, H] of one floating dtype, any strides; bias [V] or None; first, second [P] int64: rows
    a and b of pair p, both -1 for "no pair" (its outputs are 0), a row may be in many pairs; None: no pairs.
    `mass_bound` >= 0: probability mass a row may lose in `expected`, `mixed` and `spread` (|dU| <= mass_bound *
    max|w~|); lse and cross are always whole. This backend drops nothing.
    4 N V H FLOP with `expected`, 2 N V H without; 2 P V H more for each of `mixed` and `spread`.
    """
    accumulate = _accumulate_dtype(hidden)
    rows = hidden.to(accumulate) * scale
    n, h = rows.shape
    highest = rows.new_full((n,), torch.finfo(accumulate).min)
    total = rows.new_zeros(n)
    expected = rows.new_zeros(n, h) if want_expected else None
    pairs = first is not None
    cross = mixed = spread = None
    if pairs:
        held = (first >= 0).nonzero()[:, 0]
        a, b = first[held], second[held]
        cross = rows.new_zeros(len(held))
        mixed = rows.new_zeros(len(held), h) if want_expected and softcap is not None else None
        spread = rows.new_zeros(len(held), h) if want_spread else None

    for start, stop in _tiles(n, *weight.shape):
        columns = weight[start:stop].to(accumulate)
        z = _logits(rows, columns, bias, start, stop, softcap, scale)
        new_highest = torch.maximum(highest, z.amax(dim=1))
        decay = (highest - new_highest).exp_()
        highest = new_highest
        slope = None if softcap is None else 1 - (z / softcap).square_()
        difference = (z[a] - z[b] if entropy else -z[b]) if pairs else None
        p = z.sub_(highest[:, None]).clamp_(min=_LOWEST[accumulate]).exp_()
        total.mul_(decay).add_(p.sum(dim=1))
        if pairs:
            p_a, decay_a = p[a], decay[a]
            if mixed is not None:
                mixed.mul_(decay_a[:, None]).addmm_(p_a * slope[b], columns)
            moment = difference.mul_(p_a)
            cross.mul_(decay_a).add_(moment.sum(dim=1))
            if spread is not None:
                spread.mul_(decay_a[:, None]).addmm_(moment if slope is None else moment * slope[a], columns)
        if expected is not None:
            expected.mul_(decay[:, None]).addmm_(p if slope is None else p.mul_(slope), columns)

    if expected is not None:
        expected.mul_((scale / total)[:, None])
    if pairs:
        total_a, pair_count = total[a], len(first)
        cross = cross.div_(total_a).new_zeros(pair_count).index_copy(0, held, cross)
        factor = (scale / total_a)[:, None]
        if mixed is not None:
            mixed = mixed.mul_(factor).new_zeros(pair_count, h).index_copy(0, held, mixed)
        if spread is not None:
            spread = spread.mul_(factor).new_zeros(pair_count, h).index_copy(0, held, spread)
    return VocabPass(highest + total.log(), expected, cross, mixed, spread)


def weight_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor | None,
    second: Tensor | None,
    lse: Tensor,
    cross: Tensor | None,
    grad_lse: Tensor,
    grad_first: Tensor | None,
    grad_second: Tensor | None,
    *,
    entropy: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of a trainable head, logits recomputed tile by tile: dW [V, H] and db [V], float32 (or float64).

    grad_lse [N] is the upstream gradient of lse; grad_first, grad_second [P] that of cross as seen by row a and by row
    b of each pair (they differ where one side is detached):

        dL/dz_nv  = grad_lse_n p_nv
        dL/dz_av += grad_first  * p_av ((entropy ? 1 + z_av - z_bv : -z_bv) - cross)
        dL/dz_bv -= grad_second * p_av
        dW_v = sum_n dL/dz_nv scale (1 - (z_nv / cap)^2) hidden_n,      db_v the same without hidden_n
    """
    accumulate = _accumulate_dtype(hidden)
    unscaled = hidden.to(accumulate)
    rows = unscaled * scale
    d_weight = rows.new_empty(weight.shape) if want_weight else None
    d_bias = rows.new_empty(weight.shape[0]) if want_bias else None
    pairs = first is not None
    if pairs:
        held = (first >= 0).nonzero()[:, 0]
        a, b = first[held], second[held]
        cross, grad_first, grad_second = cross[held], grad_first[held], grad_second[held]
    for start, stop in _tiles(len(rows), *weight.shape):
        z = _logits(rows, weight[start:stop].to(accumulate), bias, start, stop, softcap, scale)
        p = (z - lse[:, None]).clamp_(min=_LOWEST[accumulate]).exp_()
        grad = p * grad_lse[:, None]
        if pairs:
            p_a = p[a]
            moment = (1 + z[a] - z[b] if entropy else -z[b]) - cross[:, None]
            grad.index_add_(0, a, moment.mul_(p_a).mul_(grad_first[:, None]))
            grad.index_add_(0, b, p_a.mul_(grad_second[:, None]), alpha=-1)
        if softcap is not None:
            grad.mul_(1 - (z / softcap).square_())
        if d_weight is not None:
            torch.mm(grad.T, rows, out=d_weight[start:stop])
        if d_bias is not None:
            d_bias[start:stop] = grad.sum(dim=0).mul_(scale)
    return d_weight, d_bias


def gather_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float, rows: Tensor, ids: Tensor
) -> Tensor:
    """Logits of a few columns: z[g, s, c] = logit of token ids[g, c] at row rows[g, s].

    rows [G, S], ids [G, C] int64, negative entries are pads (their logits are 0) -> [G, S, C] float32 (float64).
    """
    accumulate = _accumulate_dtype(hidden)
    logits = hidden.new_empty(*rows.shape, ids.shape[1], dtype=accumulate)
    for block in _group_blocks(rows, ids, hidden.shape[1]):
        picked, token = rows[block].clamp(min=0), ids[block].clamp(min=0)
        z = torch.bmm(hidden[picked].to(accumulate) * scale, weight[token].to(accumulate).transpose(1, 2))
        if bias is not None:
            z += scale * bias[token].to(accumulate)[:, None, :]
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        logits[block] = z.masked_fill_(_pads(rows[block], ids[block]), 0.0)
    return logits


def gather_backward(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None,
    scale: float,
    rows: Tensor,
    ids: Tensor,
    logits: Tensor,
    grad: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Adds the gradients of `gather_logits` to d_hidden [N, H], d_weight [V, H], d_bias [V] (each may be None).

    logits, grad [G, S, C]: what the forward returned and its upstream gradient.
    """
    accumulate = _accumulate_dtype(hidden)
    for block in _group_blocks(rows, ids, hidden.shape[1]):
        picked, token = rows[block].clamp(min=0), ids[block].clamp(min=0)
        slope = grad[block].masked_fill(_pads(rows[block], ids[block]), 0.0) * scale
        if softcap is not None:
            slope *= 1 - (logits[block] / softcap).square()
        if d_hidden is not None:
            add_rows(d_hidden, picked.flatten(), torch.bmm(slope, weight[token].to(accumulate)).flatten(0, 1))
        if d_weight is not None:
            outer = torch.bmm(slope.transpose(1, 2), hidden[picked].to(accumulate))
            add_rows(d_weight, token.flatten(), outer.flatten(0, 1))
        if d_bias is not None:
            add_rows(d_bias, token.flatten(), slope.sum(dim=1).flatten())


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
            (ratings form: 1/m sum_i over the grades); divergence: "none" | "kl" KL(P||Q) | "ce" | "symmetric";
            always of softmax(logits); mask_emitted leaves out, at slot k, the candidates of target slots before k
    """
    length, row_count = logits.shape[:2]
    ranking = values is None
    slot = torch.arange(row_count, device=logits.device)
    valid = slot < sizes[:, None]
    cell = valid[:, :, None] & (valid[:, None, :] if ranking else torch.ones_like(logits, dtype=torch.bool))
    log_p = _masked_log_softmax(logits, cell)
    p = log_p.exp() * cell

    if ranking:
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
    value, d_teacher, d_student = _divergence(log_p[teacher], log_p, cell, divergence)
    return Listwise(
        soft_lambda,
        (value * weight).sum(dim=1),
        expected,
        d_soft_lambda,
        d_student * weight[:, :, None],
        None if detach else d_teacher * weight[:, :, None],
    )


def add_rows(target: Tensor, index: Tensor, values: Tensor) -> None:
    """target[index] += values in an order that does not change from run to run, repeated indices included."""
    if target.is_cuda:
        target.index_put_((index,), values, accumulate=True)  # sorts; index_add_ would use atomics
    else:
        target.index_add_(0, index, values)


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


def _divergence(log_p: Tensor, log_q: Tensor, cell: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """D(P, Q) per row [L, R], and its gradients with respect to the logits of P and of Q [L, R, C]."""
    p, q = log_p.exp() * cell, log_q.exp() * cell
    ratio = torch.where(cell, log_p - log_q, 0.0)
    if kind == "ce":
        log_q = torch.where(cell, log_q, 0.0)
        value = -(p * log_q).sum(dim=2)
        return value, -p * (log_q + value[:, :, None]), q - p
    forward = (p * ratio).sum(dim=2)
    d_p = p * (ratio - forward[:, :, None])
    if kind == "kl":
        return forward, d_p, q - p
    backward = -(q * ratio).sum(dim=2)
    d_q = q * (-ratio - backward[:, :, None])
    return (forward + backward) / 2, (d_p + p - q) / 2, (d_q + q - p) / 2


def _masked_log_softmax(logits: Tensor, cell: Tensor) -> Tensor:
    return torch.log_softmax(logits.masked_fill(~cell, torch.finfo(logits.dtype).min), dim=-1)


def _logits(
    scaled_rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    start: int,
    stop: int,
    softcap: float | None,
    scale: float,
) -> Tensor:
    z = torch.mm(scaled_rows, columns.T)
    if bias is not None:
        z += scale * bias[start:stop].to(z.dtype)
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z


def _tiles(n: int, v: int, h: int) -> list[tuple[int, int]]:
    """Vocabulary tiles: [n, T] and [T, h] within the byte budget and, at small sizes, well below [n, v] and [v, h]."""
    n, h = max(n, 1), max(h, 1)
    width = min(_TILE_BYTES // (4 * max(n, h)), v * h // (2 * n), n * v // (2 * h))
    width = max(min(max(width, 256), -(-v // 4)), 1)
    return [(start, min(start + width, v)) for start in range(0, v, width)]


def _group_blocks(rows: Tensor, ids: Tensor, h: int) -> list[slice]:
    step = max(_GATHER_BYTES // (4 * h * max(rows.shape[1] + ids.shape[1], 1)), 1)
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _pads(rows: Tensor, ids: Tensor) -> Tensor:
    return (rows < 0)[:, :, None] | (ids < 0)[:, None, :]


def _accumulate_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
