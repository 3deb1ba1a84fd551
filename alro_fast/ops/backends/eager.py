"""The backend that runs anywhere: plain PyTorch, tiled over the vocabulary, never a tensor of [N, V].

It is also the description of what a backend is: a module with `SERVES`, the declaration of what it computes,
`unavailable`, and those of the functions below that it declares; `alro_fast.ops.dispatch` brings everything else here.
Backends know nothing of autograd, labels or losses; `alro_fast.ops` composes those. The logits of a row are, everywhere
in this project,

    z = softcap(scale * (hidden @ weight.T + bias)),      softcap(x) = cap * tanh(x / cap), or x where cap is None

which is the order in which every causal LM of transformers applies them. `w~_nv = dz_nv / dhidden_n
= scale * (1 - (z_nv / cap)^2) * w_v` is the slope-weighted column. Sums are kept in float32 (float64 for float64
input), whatever the dtype of `hidden` and `weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .eager_lists import DIVERGENCES, Listwise, listwise
from .serves import Serves

__all__ = [
    "DIVERGENCES",
    "SERVES",
    "Listwise",
    "PairedVocabPass",
    "VocabPass",
    "add_rows",
    "gather_backward",
    "gather_logits",
    "listwise",
    "paired_vocab_pass",
    "paired_weight_grad",
    "unavailable",
    "vocab_pass",
    "weight_grad",
]

_TILE_BYTES = 4 << 20  # of one [N, T] tile of logits, and of one [T, H] tile of weights in the accumulation dtype
_LOWEST = {torch.float32: -87.0, torch.float64: -708.0}  # exp of less is a denormal, which slows a product tenfold
_GATHER_BYTES = 64 << 20  # of one block of gathered columns


class VocabPass(NamedTuple):
    """Statistics of one pass over the vocabulary; N rows, p = softmax(z)."""

    lse: Tensor  # [N] log sum_v exp z_nv
    expected: Tensor | None  # [N, H] U_n = sum_v p_nv w~_nv = d lse_n / d hidden_n              (want_expected)


class PairedVocabPass(NamedTuple):
    """`VocabPass`, and what it takes to compare P pairs of rows a, b."""

    lse: Tensor
    expected: Tensor | None
    cross: Tensor  # [P] E_{p_a}[z_a - z_b] (entropy=True) or E_{p_a}[-z_b] (entropy=False)
    mixed: Tensor | None  # [P, H] sum_v p_av w~_bv; only with a softcap, else it is expected[a]         (want_expected)
    spread: Tensor | None  # [P, H] sum_v p_av (z_av - z_bv) w~_av, or p_av (-z_bv) w~_av          (want_spread)


SERVES = Serves(devices=None, dtypes=None)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of this device and dtype here, in a few words; None: it can."""
    return None


def vocab_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    *,
    want_expected: bool,
    mass_bound: float,
) -> VocabPass:
    """One pass over `weight` for all rows.

    hidden [N, H] and weight [V, H] of one floating dtype, any strides; bias [V] or None.
    `mass_bound` >= 0: probability mass a row may lose in `expected` (|dU| <= mass_bound * max|w~|); lse is always
    whole. This backend drops nothing.
    4 N V H FLOP with `expected`, 2 N V H without.
    """
    rows, running, expected = _begin(hidden, scale, want_expected)
    for start, stop in _tiles(len(rows), *weight.shape):
        columns = weight[start:stop].to(rows.dtype)
        z = _logits(rows, columns, bias, start, stop, softcap, scale)
        slope = None if softcap is None else 1 - (z / softcap).square_()
        p, decay = running.add(z)
        if expected is not None:
            expected.mul_(decay[:, None]).addmm_(p if slope is None else p.mul_(slope), columns)
    if expected is not None:
        expected.mul_((scale / running.total)[:, None])
    return VocabPass(running.lse, expected)


def paired_vocab_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor,
    second: Tensor,
    *,
    entropy: bool,
    want_expected: bool,
    want_spread: bool,
    mass_bound: float,
) -> PairedVocabPass:
    """`vocab_pass` that compares pairs of rows on its way: the divergence over the whole vocabulary.

    first, second [P] int64: rows a and b of pair p, both -1 for "no pair" (its outputs are 0); a row may be in many
    pairs. `mass_bound` holds for `mixed` and `spread` too; cross is always whole.
    2 P V H FLOP more than `vocab_pass` for each of `mixed` and `spread`.
    """
    rows, running, expected = _begin(hidden, scale, want_expected)
    held = (first >= 0).nonzero()[:, 0]
    a, b = first[held], second[held]
    cross = rows.new_zeros(len(held))
    mixed = rows.new_zeros(len(held), rows.shape[1]) if want_expected and softcap is not None else None
    spread = rows.new_zeros(len(held), rows.shape[1]) if want_spread else None

    for start, stop in _tiles(len(rows), *weight.shape):
        columns = weight[start:stop].to(rows.dtype)
        z = _logits(rows, columns, bias, start, stop, softcap, scale)
        slope = None if softcap is None else 1 - (z / softcap).square_()
        difference = z[a] - z[b] if entropy else -z[b]
        p, decay = running.add(z)
        p_a, decay_a = p[a], decay[a]
        if mixed is not None and slope is not None:
            mixed.mul_(decay_a[:, None]).addmm_(p_a * slope[b], columns)
        moment = difference.mul_(p_a)
        cross.mul_(decay_a).add_(moment.sum(dim=1))
        if spread is not None:
            spread.mul_(decay_a[:, None]).addmm_(moment if slope is None else moment * slope[a], columns)
        if expected is not None:
            expected.mul_(decay[:, None]).addmm_(p if slope is None else p.mul_(slope), columns)

    if expected is not None:
        expected.mul_((scale / running.total)[:, None])
    total_a = running.total[a]

    def of_all_pairs(sums: Tensor) -> Tensor:
        """0 for the pairs that are none."""
        return sums.new_zeros(len(first), *sums.shape[1:]).index_copy(0, held, sums)

    for sums in (mixed, spread):
        if sums is not None:
            sums.mul_((scale / total_a)[:, None])
    return PairedVocabPass(
        running.lse,
        expected,
        of_all_pairs(cross.div_(total_a)),
        None if mixed is None else of_all_pairs(mixed),
        None if spread is None else of_all_pairs(spread),
    )


def weight_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    lse: Tensor,
    grad_lse: Tensor,
    *,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of a trainable head, logits recomputed tile by tile: dW [V, H] and db [V], float32 (or float64).

    grad_lse [N] is the upstream gradient of lse [N]:

        dL/dz_nv = grad_lse_n p_nv
        dW_v = sum_n dL/dz_nv scale (1 - (z_nv / cap)^2) hidden_n,      db_v the same without hidden_n
    """
    gradient = _HeadGradient(hidden, weight, bias, softcap, scale, want_weight, want_bias)
    for span, z in gradient.tiles():
        p = (z - lse[:, None]).clamp_(min=_LOWEST[z.dtype]).exp_()
        gradient.put(span, z, p * grad_lse[:, None])
    return gradient.d_weight, gradient.d_bias


def paired_weight_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor,
    second: Tensor,
    lse: Tensor,
    cross: Tensor,
    grad_lse: Tensor,
    grad_first: Tensor,
    grad_second: Tensor,
    *,
    entropy: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`weight_grad` after `paired_vocab_pass`.

    grad_first, grad_second [P] are the upstream gradient of cross as seen by row a and by row b of each pair (they
    differ where one side is detached):

        dL/dz_av += grad_first  * p_av ((entropy ? 1 + z_av - z_bv : -z_bv) - cross)
        dL/dz_bv -= grad_second * p_av
    """
    gradient = _HeadGradient(hidden, weight, bias, softcap, scale, want_weight, want_bias)
    held = (first >= 0).nonzero()[:, 0]
    a, b = first[held], second[held]
    cross, grad_first, grad_second = cross[held], grad_first[held], grad_second[held]
    for span, z in gradient.tiles():
        p = (z - lse[:, None]).clamp_(min=_LOWEST[z.dtype]).exp_()
        grad = p * grad_lse[:, None]
        p_a = p[a]
        moment = (1 + z[a] - z[b] if entropy else -z[b]) - cross[:, None]
        grad.index_add_(0, a, moment.mul_(p_a).mul_(grad_first[:, None]))
        grad.index_add_(0, b, p_a.mul_(grad_second[:, None]), alpha=-1)
        gradient.put(span, z, grad)
    return gradient.d_weight, gradient.d_bias


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


def add_rows(target: Tensor, index: Tensor, values: Tensor) -> None:
    """target[index] += values in an order that does not change from run to run, repeated indices included."""
    if target.is_cuda:
        target.index_put_((index,), values, accumulate=True)  # sorts; index_add_ would use atomics
    else:
        target.index_add_(0, index, values)


class _Softmax:
    """Sums over a row's vocabulary that arrive tile by tile; exponentials are taken relative to the highest so far."""

    def __init__(self, rows: Tensor) -> None:
        self.highest = rows.new_full((len(rows),), torch.finfo(rows.dtype).min)
        self.total = rows.new_zeros(len(rows))

    def add(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """p [N, T] = exp(z - highest), in the memory of z; decay [N]: what to multiply earlier sums with."""
        highest = torch.maximum(self.highest, z.amax(dim=1))
        decay = (self.highest - highest).exp_()
        self.highest = highest
        p = z.sub_(highest[:, None]).clamp_(min=_LOWEST[z.dtype]).exp_()
        self.total.mul_(decay).add_(p.sum(dim=1))
        return p, decay

    @property
    def lse(self) -> Tensor:
        return self.highest + self.total.log()


def _begin(hidden: Tensor, scale: float, want_expected: bool) -> tuple[Tensor, _Softmax, Tensor | None]:
    """Scaled rows in the dtype of sums, and their sums at 0."""
    rows = hidden.to(_accumulate_dtype(hidden)) * scale
    return rows, _Softmax(rows), torch.zeros_like(rows) if want_expected else None


class _HeadGradient:
    """dW and db, from the gradient of the logits tile by tile."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        want_weight: bool,
        want_bias: bool,
    ) -> None:
        self.rows = hidden.to(_accumulate_dtype(hidden)) * scale
        self.weight, self.bias, self.softcap, self.scale = weight, bias, softcap, scale
        self.d_weight = self.rows.new_empty(weight.shape) if want_weight else None
        self.d_bias = self.rows.new_empty(weight.shape[0]) if want_bias else None

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns, and their logits [N, T]."""
        for start, stop in _tiles(len(self.rows), *self.weight.shape):
            columns = self.weight[start:stop].to(self.rows.dtype)
            yield slice(start, stop), _logits(self.rows, columns, self.bias, start, stop, self.softcap, self.scale)

    def put(self, span: slice, z: Tensor, grad: Tensor) -> None:
        """grad [N, T]: the gradient of the logits z of these columns."""
        if self.softcap is not None:
            grad.mul_(1 - (z / self.softcap).square_())
        if self.d_weight is not None:
            torch.mm(grad.T, self.rows, out=self.d_weight[span])
        if self.d_bias is not None:
            self.d_bias[span] = grad.sum(dim=0).mul_(self.scale)


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
