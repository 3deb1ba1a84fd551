"""The ALRO loss: cross-entropy + alpha * soft lambda + beta * permutation, from hidden states and the LM head.

    out = alro_loss(hidden, model.lm_head.weight, labels, lists, alpha=1.0, beta=1.0, gamma=1.0, sigma=1.0)
    out.loss.backward()

One joint pass over the head serves every term and both orders. Formulas: docs/methods.md 1.1-1.5; definition in plain
PyTorch: `alro_fast.losses.reference`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import AlroFastError
from ..ops import DIVERGENCES, HeadStats
from ..ops.checks import check_device, check_head, check_number, check_positive, check_tensor, values_are_free
from .lists import ALROCounts, RankingLists, alro_counts, by_row, check_lists, check_shared_tokens, checked_counts

SCORES = ("logprob", "prob", "logit")
SPACES = ("candidates", "vocab")
VOCABULARY_DIVERGENCES = ("kl", "ce", "symmetric")  # sums of E_p[z] that a pass over the vocabulary can keep


class ALROLossOutput(NamedTuple):
    """Scalars, differentiable; `expected_rank` is a constant."""

    loss: Tensor  # the three terms below, weighed by `term_weights`
    sft: Tensor  # mean over labels of -log p(label)
    soft_lambda: Tensor  # mean over lists, both orders
    permutation: Tensor  # mean over lists with a twin
    expected_rank: Tensor  # [L, M] expected slot of candidate i, lower is better (ratings form: its expected grade)


def term_weights(alpha: float, beta: float) -> dict[str, float]:
    """What each term of ALROLossOutput weighs in its loss (docs/methods.md 1.4)."""
    return {"sft": 1.0, "soft_lambda": alpha, "permutation": beta}


def sharpness(gamma: float | None, score: str) -> float:
    """gamma; where it is not given, what suits the score: at 1 the softmax of probabilities is nearly flat."""
    return gamma if gamma is not None else (10.0 if score == "prob" else 1.0)


def alro_loss(
    hidden: Tensor,
    weight: Tensor,
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
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    mass_bound: float | None = None,
    backend: str = "auto",
) -> ALROLossOutput:
    """ALRO loss of L lists, both orders in one call.

    hidden [N, H]: the answer rows of all lists and both orders; weight [V, H], bias [V]; labels [N]: next token of each
    row, `ignore_index` for none; or [N, K], where a row predicts tokens of several sequences. Every scalar is float32
    (float64 for float64 input).

    alpha, beta: weights of the soft lambda and the permutation loss, at least 0. gamma: sharpness of the soft-argmax
    (None: `sharpness` of the score); sigma: slope of the pairwise loss. Defaults are those of the train command.
    score, score_space: what the soft-argmax reads, the "logprob", "prob" or "logit" of an identifier, normalised over
    the list's "candidates" or the whole "vocab". psl: divergence ("kl", "ce", "symmetric"; all of `ops.DIVERGENCES`) of
    the twin's original (P) and the list (Q), over the "candidates" or, items paired by their identifiers, the whole
    "vocab"; psl_detach: no gradient through P; psl_mask_emitted: leave out the candidates the target has placed before
    the slot.
    counts: denominators of the means, see `ALROCounts`. mass_bound, backend: see `ops.linear_logprobs`.
    Raises AlroFastError naming the argument; values of index tensors on CUDA are checked by `check_lists` only.
    """
    hidden = check_head(hidden, weight, bias)
    check_tensor("labels", labels)
    check_device("labels", labels, hidden)
    check_lists(labels, lists, len(hidden), weight.shape[0], ignore_index)
    read = functools.partial(
        ops.head, hidden, weight, bias, softcap=softcap, scale=scale, mass_bound=mass_bound, backend=backend
    )
    return _compose(
        read,
        labels,
        lists,
        _Options(alpha, beta, gamma, sigma, score, score_space, psl, psl_space, psl_detach, psl_mask_emitted),
        ignore_index,
        counts,
        backend,
    )


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
    """`alro_loss` where the logits [N, V] of the answer rows exist already; they are used as they are."""
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    if logits.dim() != 2 or not logits.is_floating_point():
        raise AlroFastError(f"logits has shape {tuple(logits.shape)} and dtype {logits.dtype}; expected floats [N, V]")
    check_device("labels", labels, logits, "logits")
    row_count, vocab_size = logits.shape
    check_lists(labels, lists, row_count, vocab_size, ignore_index)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return _compose(
        functools.partial(_stats_from_logits, wide),
        labels,
        lists,
        _Options(alpha, beta, gamma, sigma, score, score_space, psl, psl_space, psl_detach, psl_mask_emitted),
        ignore_index,
        counts,
        backend,
    )


class ALROLoss(nn.Module):
    """`alro_loss` with its hyper-parameters held; no parameters of its own.

    `ALROLoss(alpha=1.0, beta=0.1)(hidden, weight, labels, lists)`; options are the keyword arguments of `alro_loss`,
    with its defaults.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        defaults = alro_loss.__kwdefaults__ or {}
        known = set(defaults) - {"bias", "counts"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise AlroFastError(f"ALROLoss got {unknown}; expected options among {sorted(known)}")
        self.options = {name: defaults[name] for name in ("alpha", "beta", "gamma", "sigma")} | options
        _Options(**{name: value for name, value in self.options.items() if name in _Options.__annotations__})

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        lists: RankingLists,
        *,
        bias: Tensor | None = None,
        counts: ALROCounts | None = None,
    ) -> ALROLossOutput:
        return alro_loss(hidden, weight, labels, lists, bias=bias, counts=counts, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


@dataclass(frozen=True)
class _Options:
    """Hyper-parameters of one call, checked."""

    alpha: float
    beta: float
    gamma: float | None
    sigma: float
    score: str = "logprob"
    score_space: str = "candidates"
    psl: str = "kl"
    psl_space: str = "candidates"
    psl_detach: bool = True
    psl_mask_emitted: bool = False

    def __post_init__(self) -> None:
        choices = {"score": SCORES, "score_space": SPACES, "psl": DIVERGENCES, "psl_space": SPACES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise AlroFastError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        for name in ("alpha", "beta"):
            weight = getattr(self, name)
            check_number(name, weight, lambda n: 0 <= n < math.inf, "a weight, a finite number of at least 0")
        check_positive(gamma=self.sharpness, sigma=self.sigma)
        if self.psl_space == "vocab" and self.psl not in VOCABULARY_DIVERGENCES:
            raise AlroFastError(
                f"psl is {self.psl!r}, which is taken over the candidates alone; psl_space='vocab' takes one of "
                f"{', '.join(VOCABULARY_DIVERGENCES)}"
            )
        if self.psl_mask_emitted and self.psl_space == "vocab":
            raise AlroFastError("psl_mask_emitted needs psl_space='candidates'; got psl_space='vocab'")

    @property
    def sharpness(self) -> float:
        return sharpness(self.gamma, self.score)

    @property
    def default_score(self) -> bool:
        return (self.score, self.score_space) == ("logprob", "candidates")


def _compose(
    read: Callable[..., HeadStats],
    labels: Tensor,
    lists: RankingLists,
    options: _Options,
    ignore_index: int,
    counts: ALROCounts | None,
    backend: str,
) -> ALROLossOutput:
    slot_rows, candidate_ids, ratings, ranks, twin, grades = lists
    if grades is not None and not options.default_score:
        raise AlroFastError(
            f"score={options.score!r}, score_space={options.score_space!r} with grades; "
            "the ratings form reads the expected grade, leave both at their defaults"
        )
    sizes = (slot_rows >= 0).sum(dim=1)
    ids = candidate_ids if grades is None else grades.token_ids.expand(len(slot_rows), -1)
    targets = by_row(torch.where(labels == ignore_index, -1, labels))

    if options.psl_space == "vocab" and grades is None and values_are_free(candidate_ids):
        check_shared_tokens(lists)
    pairs = _TwinPairs(lists, options.psl, options.psl_detach) if options.psl_space == "vocab" else None
    if pairs is None:
        stats = read(targets=targets, rows=slot_rows.long(), ids=ids.long())
    else:
        stats = read(targets=targets, **pairs.request(ids))
    candidate_logits = stats.group_logits[: len(slot_rows)]

    listwise = functools.partial(
        ops.listwise,
        ratings=ratings,
        ranks=ranks,
        sizes=sizes,
        gamma=options.sharpness,
        sigma=options.sigma,
        backend=backend,
    )
    compare: dict[str, Any] = {}
    if pairs is None:
        compare = {"divergence": options.psl, "detach": options.psl_detach, "mask_emitted": options.psl_mask_emitted}
    values = None if grades is None else grades.values
    terms = listwise(candidate_logits, twin=twin, values=values, **compare)
    permutation = terms.permutation
    if not options.default_score:
        terms = listwise(_scores(candidate_logits, stats.lse, slot_rows, options), normalise=False)
    if pairs is not None:
        permutation = pairs.divergence(stats)

    if counts is None:
        counts = ALROCounts._make(cast(Tensor, n).clamp(min=1) for n in alro_counts(labels, lists, ignore_index))
    else:
        counts = checked_counts(counts)
    logprobs = torch.where(targets >= 0, stats.target_logits - stats.lse[:, None], 0.0)
    means = {
        "sft": -logprobs.sum() / counts.rows,
        "soft_lambda": terms.soft_lambda.sum() / counts.lists,
        "permutation": permutation.sum() / counts.twins,
    }
    weights = term_weights(options.alpha, options.beta)
    loss = cast(Tensor, sum(weight * means[name] for name, weight in weights.items()))
    return ALROLossOutput(loss, **means, expected_rank=terms.expected)


def _scores(logits: Tensor, lse: Tensor, slot_rows: Tensor, options: _Options) -> Tensor:
    """y [L, M slots, M candidates] of docs/methods.md 1.2 from the candidates' logits."""
    if options.score == "logit":
        return logits
    if options.score_space == "vocab":
        normaliser = lse[slot_rows.clamp(min=0)]
    else:
        normaliser = logits.masked_fill((slot_rows < 0)[:, None, :], torch.finfo(logits.dtype).min).logsumexp(dim=2)
    log_p = torch.where(slot_rows[:, :, None] >= 0, logits - normaliser[:, :, None], 0.0)
    return log_p if options.score == "logprob" else log_p.exp()


class _TwinPairs:
    """The permutation term over the whole vocabulary: rows a of the original, rows b of the re-ordered list.

    Items are paired by their identifiers: E_a[z_b] is taken over all tokens as they are, then the candidates' share is
    moved to the counterpart's column (`ops.relabel_correction`). That needs, besides every list's own candidate logits,
    the logits of the twin's identifiers at b and, for the symmetric form, of b's identifiers at a.
    """

    def __init__(self, lists: RankingLists, divergence: str, detach: bool) -> None:
        slot_rows, _, _, _, twin, grades = lists
        self.lists, self.kind, self.detach = lists, divergence, detach
        self.of = twin.long().clamp(min=0)
        size = (slot_rows >= 0).sum(dim=1, keepdim=True)
        slot = torch.arange(slot_rows.shape[1], device=slot_rows.device)
        compared = slot < (size if grades is not None else size - 1)
        compared = compared & (twin >= 0)[:, None]
        self.b = torch.where(compared, slot_rows.long(), -1)
        self.a = torch.where(compared, slot_rows.long()[self.of], -1)
        self.compared = compared

    def request(self, ids: Tensor) -> dict[str, Tensor | bool]:
        """Arguments of `ops.head`."""
        rows, ids = self.lists.slot_rows.long(), ids.long()
        all_rows, all_ids = [rows], [ids]
        if self.lists.grades is None:
            all_rows.append(self.b)
            all_ids.append(ids[self.of])
            if self.kind == "symmetric":
                all_rows.append(self.a)
                all_ids.append(ids)
        first, second = self.a.flatten(), self.b.flatten()
        teacher = torch.full_like(first, self.detach, dtype=torch.bool)
        detach_first, detach_second = teacher, torch.zeros_like(teacher)
        if self.kind == "symmetric":
            first, second = torch.cat([first, second]), torch.cat([second, first])
            detach_first, detach_second = torch.cat([teacher, detach_second]), torch.cat([detach_second, teacher])
        return {
            "rows": torch.cat(all_rows),
            "ids": torch.cat(all_ids),
            "first": first,
            "second": second,
            "entropy": self.kind != "ce",
            # a plain True tells the pass that no gradient reaches the first rows
            "detach_first": True if self.detach and self.kind != "symmetric" else detach_first,
            "detach_second": detach_second,
        }

    def divergence(self, stats: HeadStats) -> Tensor:
        """[L], 0 where a list has no twin."""
        length, width = self.a.shape
        cross = stats.cross.view(2 if self.kind == "symmetric" else 1, length, width)
        lse_a, lse_b = stats.lse[self.a.clamp(min=0)], stats.lse[self.b.clamp(min=0)]
        own = stats.group_logits[:length]
        z_a = own[self.of]
        if self.detach:
            lse_a, z_a = lse_a.detach(), z_a.detach()
        forward = cross[0] + lse_b - (lse_a if self.kind != "ce" else 0)
        if self.lists.grades is None:
            valid = self.compared[:, :, None] & (self.lists.candidate_ids >= 0)[:, None, :]
            at_b = stats.group_logits[length : 2 * length]
            forward = forward + ops.relabel_correction(z_a, lse_a[:, :, None], own, at_b, valid)
        if self.kind != "symmetric":
            return self._mean(forward)
        backward = cross[1] + lse_a - lse_b
        if self.lists.grades is None:
            at_a = stats.group_logits[2 * length :]
            if self.detach:
                at_a = at_a.detach()
            backward = backward + ops.relabel_correction(own, lse_b[:, :, None], z_a, at_a, valid)
        return self._mean(forward + backward) / 2

    def _mean(self, value: Tensor) -> Tensor:
        return torch.where(self.compared, value, 0.0).sum(dim=1) / self.compared.sum(dim=1).clamp(min=1)


def _stats_from_logits(
    logits: Tensor,
    *,
    targets: Tensor,
    rows: Tensor,
    ids: Tensor,
    first: Tensor | None = None,
    second: Tensor | None = None,
    entropy: bool = True,
    detach_first: Tensor | bool = False,
    detach_second: Tensor | bool = False,
) -> HeadStats:
    """`ops.head` where the logits [N, V] exist."""
    lse = logits.logsumexp(dim=1)
    target_logits = torch.where(targets >= 0, logits.gather(1, targets.clamp(min=0)), 0.0)
    pads = (rows < 0)[:, :, None] | (ids < 0)[:, None, :]
    group_logits = logits[rows.clamp(min=0)[:, :, None], ids.clamp(min=0)[:, None, :]].masked_fill(pads, 0.0)
    if first is None or second is None:
        return HeadStats(lse, target_logits, group_logits, lse.new_empty(0))
    z_a, z_b = logits[first.clamp(min=0)], logits[second.clamp(min=0)]
    z_a = torch.where(_column(detach_first, z_a), z_a.detach(), z_a)
    z_b = torch.where(_column(detach_second, z_b), z_b.detach(), z_b)
    cross = (torch.softmax(z_a, dim=1) * ((z_a if entropy else 0) - z_b)).sum(dim=1)
    return HeadStats(lse, target_logits, group_logits, cross.masked_fill(first < 0, 0.0))


def _column(flag: Tensor | bool, like: Tensor) -> Tensor:
    return torch.as_tensor(flag, device=like.device).expand(len(like))[:, None]
