"""DMPO and its relatives: one user's chosen answer against k rejected ones, from summed answer log-probabilities.

    out = dmpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    out.loss.backward()

With l = log pi(answer) - log pi_ref(answer) and the margins m_i = l_chosen - l_rejected_i of a user's k negatives:

    dmpo          -log sig(beta mean_i m_i)                  the mean inside the sigmoid (docs/methods.md 2.1)
    mean_outside  mean_i -log sig(beta m_i)                  DPO over k pairs: what DMPO's release trains (2.2)
    sdpo          log(1 + sum_i exp(-beta m_i))              softmax-weighted negatives (2.3)
    mult          -sum_{i chosen} log softmax(beta l)_i      over all answers, several chosen ones allowed (2.4)

All equal DPO for k = 1. Definition in plain PyTorch: `alro_fast.losses.reference.dmpo_loss`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AlroFastError
from ..ops.checks import check_device, check_floats, check_values, values_are_free

VARIANTS = ("dmpo", "mean_outside", "sdpo", "mult")


class PreferenceLoss(NamedTuple):
    """`loss` is a differentiable scalar, the rewards are constants: beta * (log pi - log pi_ref), 0 on pads."""

    loss: Tensor  # mean over users with a rejected answer, plus ftx times the cross-entropy of the chosen answers
    rewards_chosen: Tensor  # shape of chosen
    rewards_rejected: Tensor  # [B, k]


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
    """The preference loss of B users.

    chosen [B]: summed answer log-probabilities of the chosen answer; or [B, k]: rejected answer i has a chosen one
    of its own, as where every pair has its own prompt; or, for mult, [B, P]: P chosen answers, any P.
    rejected [B, k]; ref_chosen, ref_rejected: the same under the reference, both or (reference-free) neither.
    rejected_mask [B, k], chosen_mask [B, P] bool: False on pads; a user without a rejected answer counts for nothing.
    ftx: weight of the cross-entropy of the chosen answers, -chosen / chosen_lengths averaged over them;
    chosen_lengths, shape of chosen: their tokens (None: 1, a sum in place of the mean over tokens).
    float64 stays float64; everything else is computed in float32.
    Raises AlroFastError naming the argument that does not fit.
    """
    rejected_mask, chosen_mask = _check(
        chosen, rejected, ref_chosen, ref_rejected, beta, rejected_mask, chosen_mask, variant, ftx, chosen_lengths
    )
    policy_chosen = _wide(chosen).view(len(chosen), -1).masked_fill(~chosen_mask, 0.0)
    policy_rejected = _wide(rejected).masked_fill(~rejected_mask, 0.0)
    gain_chosen, gain_rejected = policy_chosen, policy_rejected
    if ref_chosen is not None and ref_rejected is not None:
        gain_chosen = policy_chosen - _wide(ref_chosen).view(len(chosen), -1).masked_fill(~chosen_mask, 0.0)
        gain_rejected = policy_rejected - _wide(ref_rejected).masked_fill(~rejected_mask, 0.0)
    rewards_chosen, rewards_rejected = beta * gain_chosen, beta * gain_rejected
    negatives = rejected_mask.sum(dim=1)
    if variant == "mult":
        users = _mult(rewards_chosen, rewards_rejected, chosen_mask, rejected_mask)
    else:
        margins = (rewards_chosen - rewards_rejected) * rejected_mask
        if variant == "dmpo":
            users = F.softplus(-margins.sum(dim=1) / negatives.clamp(min=1))
        elif variant == "mean_outside":
            users = (F.softplus(-margins) * rejected_mask).sum(dim=1) / negatives.clamp(min=1)
        else:
            against = (-margins).masked_fill(~rejected_mask, -torch.inf)
            users = torch.logsumexp(F.pad(against, (1, 0)), dim=1)
    counted = negatives > 0
    loss = (users * counted).sum() / counted.sum().clamp(min=1)
    if ftx:
        lengths = 1.0 if chosen_lengths is None else chosen_lengths.view(len(chosen), -1).clamp(min=1)
        loss = loss - ftx * (policy_chosen / lengths).sum() / chosen_mask.sum().clamp(min=1)
    return PreferenceLoss(loss, rewards_chosen.detach().view(chosen.shape), rewards_rejected.detach())


class DMPOLoss(nn.Module):
    """`dmpo_loss` with its hyper-parameters held."""

    def __init__(self, beta: float = 0.1, variant: str = "dmpo", ftx: float = 0.0) -> None:
        super().__init__()
        _check_settings(beta, variant, ftx)
        self.beta, self.variant, self.ftx = beta, variant, ftx

    def forward(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor | None = None,
        ref_rejected: Tensor | None = None,
        *,
        rejected_mask: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        chosen_lengths: Tensor | None = None,
    ) -> PreferenceLoss:
        return dmpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, beta=self.beta, rejected_mask=rejected_mask,
            chosen_mask=chosen_mask, variant=self.variant, ftx=self.ftx, chosen_lengths=chosen_lengths,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"beta={self.beta}, variant={self.variant!r}, ftx={self.ftx}"


def _mult(chosen: Tensor, rejected: Tensor, chosen_mask: Tensor, rejected_mask: Tensor) -> Tensor:
    answers = torch.cat([chosen, rejected], dim=1)
    mask = torch.cat([chosen_mask, rejected_mask], dim=1)
    mask = mask | ~mask.any(dim=1, keepdim=True)  # a user without answers: finite, counted nowhere
    total = torch.logsumexp(answers.masked_fill(~mask, -torch.inf), dim=1, keepdim=True)
    return ((total - chosen) * chosen_mask).sum(dim=1)


def _check(chosen, rejected, ref_chosen, ref_rejected, beta, rejected_mask, chosen_mask, variant, ftx, chosen_lengths):
    """The masks, made where they are not given; AlroFastError for anything that does not fit."""
    _check_settings(beta, variant, ftx)
    check_floats("chosen", chosen, rejected, "rejected")
    check_floats("rejected", rejected, rejected, "rejected")
    if rejected.dim() != 2 or chosen.dim() not in (1, 2) or len(chosen) != len(rejected):
        raise AlroFastError(
            f"chosen has shape {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}; expected [B] (or [B, k]) "
            "and [B, k] for B users"
        )
    if chosen.dim() == 2 and variant != "mult" and chosen.shape != rejected.shape:
        raise AlroFastError(
            f"chosen has shape {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}; {variant} takes one chosen "
            "answer a user ([B]) or one beside each rejected answer ([B, k]): several positives need variant 'mult'"
        )
    if 0 in rejected.shape:
        raise AlroFastError(
            f"rejected has shape {tuple(rejected.shape)}; a preference loss needs a user and a rejected answer at least"
        )
    if (ref_chosen is None) != (ref_rejected is None):
        raise AlroFastError("ref_chosen and ref_rejected go together; give both, or neither for a reference-free loss")
    masks = {"rejected_mask": (rejected_mask, rejected), "chosen_mask": (chosen_mask, chosen)}
    like = {"ref_chosen": (ref_chosen, chosen), "ref_rejected": (ref_rejected, rejected)}
    for name, (tensor, model) in (masks | like | {"chosen_lengths": (chosen_lengths, chosen)}).items():
        if tensor is not None and tensor.shape != model.shape:
            raise AlroFastError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(model.shape)}")
        if tensor is None:
            continue
        check_device(name, tensor, rejected, "rejected")
        if name.endswith("_mask") and tensor.dtype != torch.bool:
            raise AlroFastError(f"{name} has dtype {tensor.dtype}; expected bool, True where there is an answer")
        if name in like:
            check_floats(name, tensor, rejected, "rejected")
    if chosen_lengths is not None:
        if chosen_lengths.is_complex():
            raise AlroFastError(f"chosen_lengths has dtype {chosen_lengths.dtype}; expected numbers of tokens")
        there = torch.ones_like(chosen_lengths, dtype=torch.bool) if chosen_mask is None else chosen_mask
        check_values("chosen_lengths", chosen_lengths, ~there | (chosen_lengths > 0), "above 0: an answer's tokens")
    if rejected_mask is None:
        rejected_mask = torch.ones_like(rejected, dtype=torch.bool)
    if chosen_mask is None:
        paired = chosen.dim() == 2 and variant != "mult"
        chosen_mask = rejected_mask if paired else torch.ones_like(chosen, dtype=torch.bool)
    chosen_mask = chosen_mask.view(len(chosen), -1)
    if values_are_free(rejected_mask) and not bool(rejected_mask.any()):
        raise AlroFastError("no user has a rejected answer; a preference loss needs at least one")
    return rejected_mask, chosen_mask


def _check_settings(beta: float, variant: str, ftx: float) -> None:
    if variant not in VARIANTS:
        raise AlroFastError(f"variant is {variant!r}; expected one of {', '.join(VARIANTS)}")
    if not 0 < beta < math.inf:
        raise AlroFastError(f"beta is {beta}; expected a positive finite number")
    if not 0 <= ftx < math.inf:
        raise AlroFastError(f"ftx is {ftx}; expected a weight, a finite number of at least 0")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
