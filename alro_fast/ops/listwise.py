"""Soft-argmax ranks, soft lambda loss and permutation divergence of lists, with autograd."""

from typing import Any

import torch
from torch import Tensor

from ..errors import AlroFastError
from .backends import eager
from .checks import check_device, check_index, check_positive, check_ranks, check_scores, check_values
from .dispatch import as_given, list_server, no_second_derivative, or_empty, result_dtype


def soft_argmax_ranks(scores: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Expected rank of each candidate, s_i = sum_k k softmax_k(gamma scores_ki): [L, M], 0 on pads, lower is better.

    scores [L, M slots, M candidates]; mask [L, M] bool: which candidates list l has, a prefix of each row (a list of n
    candidates has n slots). Differentiable in scores. Source: docs/methods.md 1.2.
    """
    check_scores(scores, mask)
    check_positive(gamma=gamma)
    scores = scores.to(result_dtype(scores))
    cell = mask[:, :, None] & mask[:, None, :]
    over_slots = torch.softmax((gamma * scores).masked_fill(~cell, torch.finfo(scores.dtype).min), dim=1) * cell
    position = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    return (over_slots * position[:, None]).sum(dim=1)


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
    """Soft lambda loss per list [L] and expected ranks [L, M] (a constant; `soft_argmax_ranks` has a gradient).

    scores [L, M slots, M candidates], differentiable; ratings [L, M] >= 0, NaN = ungraded (in no pair); mask as in
    `soft_argmax_ranks`; ranks [L, M] target slots, 1 = best; None: descending ratings, ungraded last, ties by position.
    Loss and gradient come from one launch. Source: docs/methods.md 1.2.
    """
    check_scores(scores, mask)
    for name, tensor in (("ratings", ratings), ("ranks", ranks)):
        if tensor is not None and tensor.shape != mask.shape:
            raise AlroFastError(f"{name} has shape {tuple(tensor.shape)}; expected that of mask, {tuple(mask.shape)}")
    if ratings.is_complex():
        raise AlroFastError(f"ratings has dtype {ratings.dtype}; expected real numbers")
    check_device("ratings", ratings, scores, "scores")
    check_values("ratings", ratings, ~mask | ~((ratings < 0) | ratings.isinf()), "finite and >= 0, or NaN")
    sizes = mask.sum(dim=1)
    if ranks is None:
        ranks = descending_ranks(ratings, mask)
    check_index("ranks", ranks, scores, "scores")
    check_ranks(ranks, sizes)
    terms = listwise(scores, ratings, ranks, sizes, gamma=gamma, sigma=sigma, normalise=False, backend=backend)
    return terms.soft_lambda, terms.expected


def descending_ranks(ratings: Tensor, mask: Tensor) -> Tensor:
    """Target slots [L, M], 1 = best: descending ratings, ungraded after graded, pads last, ties by position."""
    key = torch.where(mask, torch.where(ratings.isnan(), -1.0, ratings), -2.0)
    order = torch.sort(key, dim=1, descending=True, stable=True).indices
    return torch.argsort(order, dim=1, stable=True) + 1


def listwise(
    logits: Tensor,
    ratings: Tensor,
    ranks: Tensor,
    sizes: Tensor,
    twin: Tensor | None = None,
    values: Tensor | None = None,
    *,
    gamma: float = 1.0,
    sigma: float = 1.0,
    normalise: bool = True,
    divergence: str = "none",
    detach: bool = True,
    mask_emitted: bool = False,
    backend: str = "auto",
) -> eager.Listwise:
    """`backends.eager.listwise` with autograd: soft_lambda [L] and permutation [L] are differentiable in logits."""
    check_positive(gamma=gamma, sigma=sigma)
    if divergence != "none" and divergence not in eager.DIVERGENCES:
        raise AlroFastError(
            f"divergence is {divergence!r}; expected 'none' or one of {', '.join(map(repr, eager.DIVERGENCES))}"
        )
    logits = logits.to(result_dtype(logits))
    soft_lambda, permutation, expected, *_ = torch.ops.alro_fast.listwise(
        logits,
        ratings.to(logits.dtype),
        ranks.long(),
        sizes.long(),
        torch.full_like(sizes, -1) if twin is None else twin.long(),
        None if values is None else values.to(logits.dtype),
        float(gamma),
        float(sigma),
        normalise,
        divergence,
        detach,
        mask_emitted,
        backend,
    )
    return eager.Listwise(soft_lambda, permutation, expected.detach(), None, None, None)


@torch.library.custom_op("alro_fast::listwise", mutates_args=())
def _listwise(
    logits: torch.Tensor,
    ratings: torch.Tensor,
    ranks: torch.Tensor,
    sizes: torch.Tensor,
    twin: torch.Tensor,
    values: torch.Tensor | None,
    gamma: float,
    sigma: float,
    normalise: bool,
    divergence: str,
    detach: bool,
    mask_emitted: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """soft_lambda [L], permutation [L], expected [L, M]; for backward d_soft_lambda, d_student, d_teacher or empty."""
    form, longest = "ranking" if values is None else "ratings", max(logits.shape[1:])
    module = list_server(
        backend, logits, form=form, divergence=divergence, mask_emitted=mask_emitted, longest=longest
    )  # fmt: skip
    if logits.numel() == 0:  # no list, or none with a candidate
        length, d_logits = len(logits), torch.zeros_like(logits)
        d_teacher = None if detach or divergence == "none" else torch.zeros_like(logits)
        zeros = logits.new_zeros(length), logits.new_zeros(length), torch.zeros_like(ratings)
        return *zeros, d_logits, torch.zeros_like(logits), or_empty(d_teacher, logits)
    with as_given(logits):
        terms = module.listwise(
            logits,
            ratings,
            ranks,
            sizes,
            twin,
            values,
            gamma=gamma,
            sigma=sigma,
            normalise=normalise,
            divergence=divergence,
            detach=detach,
            mask_emitted=mask_emitted,
        )
    return (*terms[:5], or_empty(terms.d_teacher, logits))


@_listwise.register_fake
def _(
    logits: Tensor, ratings: Tensor, ranks: Tensor, sizes: Tensor, twin: Tensor, values: Tensor | None, gamma: float,
    sigma: float, normalise: bool, divergence: str, detach: bool, mask_emitted: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    length = logits.shape[0]
    has_teacher = divergence != "none" and not detach
    return (
        logits.new_empty(length),
        logits.new_empty(length),
        logits.new_empty(ratings.shape),
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape if has_teacher else 0),
    )


def _listwise_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[4], *output[3:])


def _listwise_autograd(
    ctx: Any, grad_soft_lambda: Tensor | None, grad_permutation: Tensor | None, *_unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    twin, d_soft_lambda, d_student, d_teacher = ctx.saved_tensors
    empty = d_soft_lambda.new_empty(0)
    grads = [empty if grad is None else grad for grad in (grad_soft_lambda, grad_permutation)]
    return torch.ops.alro_fast.listwise_backward(*grads, twin, d_soft_lambda, d_student, d_teacher), *(None,) * 12


@torch.library.custom_op("alro_fast::listwise_backward", mutates_args=())
def _listwise_backward(
    grad_soft_lambda: torch.Tensor,
    grad_permutation: torch.Tensor,
    twin: torch.Tensor,
    d_soft_lambda: torch.Tensor,
    d_student: torch.Tensor,
    d_teacher: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the logits [L, R, C]."""
    if grad_soft_lambda.numel():
        grad = d_soft_lambda * grad_soft_lambda[:, None, None]
    else:
        grad = torch.zeros_like(d_soft_lambda)
    if grad_permutation.numel():
        upstream = grad_permutation[:, None, None]
        grad += d_student * upstream
        if d_teacher.numel():
            eager.add_rows(grad, twin.clamp(min=0), d_teacher * upstream)
    return grad


@_listwise_backward.register_fake
def _(
    grad_soft_lambda: Tensor, grad_permutation: Tensor, twin: Tensor, d_soft_lambda: Tensor, d_student: Tensor,
    d_teacher: Tensor,
) -> Tensor:  # fmt: skip
    return torch.empty_like(d_soft_lambda)


_listwise.register_autograd(_listwise_autograd, setup_context=_listwise_setup)

_listwise_backward.register_autograd(no_second_derivative)
