"""Losses' building blocks over the LM head: log-probs, divergences and listwise terms, without [N, V] logits.

Each op is a `torch.library` custom op with a fake implementation and its own autograd (`torch.compile(fullgraph=True)`
works) and is served by a backend: `triton` (CUDA), `cpp` (CPU), `eager` (anything). "auto" takes the first that
can serve the tensors at hand and logs its choice once. The logits of a row are, everywhere,

    z = softcap(scale * (hidden @ weight.T + bias)),      softcap(x) = cap * tanh(x / cap), or x where cap is None.

With a frozen head the backward pass holds no [V, H] buffer and does no product with the vocabulary: the forward keeps
U = d lse / d hidden, and d logprob(c) / d hidden = w_c - U. A trainable head recomputes its logits tile by tile.
Results are float32 (float64 for float64 input). Under autocast the ops compute in the dtype of `weight`.

Values of index tensors (targets, relabelled ids, ranks) are checked where that costs no device synchronisation: on the
CPU, outside torch.compile. On CUDA an id outside the vocabulary is a device-side assertion or undefined.
"""

import contextlib
import functools
import importlib
import logging
import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from .backends import eager
from .checks import (check_device, check_head, check_index, check_number, check_positive, check_ranks, check_relabel, check_scores, check_values)
from ..errors import AlroFastError

log = logging.getLogger(__name__)

BACKENDS = ("triton", "cpp", "eager")
_PREFERRED = {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")}
_HALF_MASS_BOUND = 2.0**-12  # an eighth of bfloat16's rounding; what half-precision rows may lose from U by default


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
    """Log-probabilities of target tokens.

    hidden [N, H], weight [V, H] of one floating dtype, bias [V]; targets [N] or [N, C], any integer dtype.
    Returns logprobs, shape of targets (0 and no gradient where targets == ignore_index), and lse [N], the log-sum-exp
    of every row's logits; both float32 and differentiable in hidden, weight and bias. `mass_bound`: probability mass a
    row may lose in its gradient (see `backends.eager.vocab_pass`); None: 0, or 2^-12 for half precision.
    Raises AlroFastError naming the argument that does not fit.
    """
    hidden = check_head(hidden, weight, bias)
    check_index("targets", targets, hidden)
    if targets.dim() not in (1, 2) or len(targets) != len(hidden):
        raise AlroFastError(
            f"targets has shape {tuple(targets.shape)}; expected [N] or [N, C] with N = {len(hidden)} rows of hidden"
        )
    wanted, vocab_size = targets.long(), weight.shape[0]
    ignored = wanted == ignore_index
    check_values(
        "targets", targets, ignored | ((wanted >= 0) & (wanted < vocab_size)), f"below {vocab_size} or ignored"
    )
    wanted = wanted.masked_fill(ignored, -1)
    flat = wanted if wanted.dim() == 2 else wanted[:, None]
    stats = head(
        hidden, weight, bias, softcap=softcap, scale=scale, targets=flat, mass_bound=mass_bound, backend=backend
    )
    logprobs = torch.where(flat >= 0, stats.target_logits - stats.lse[:, None], 0.0)
    return logprobs.view(targets.shape), stats.lse


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
    """KL(p || q) of two heads' outputs over the whole vocabulary, per row: float32 [N].

    hidden_p, hidden_q [N, H]. relabel (ids_p, ids_q), [N, C] each, -1 pads: token ids_p[n, c] of p stands for the same
    item as token ids_q[n, c] of q; within a row both must hold the same set of distinct tokens, and every other token
    stands for itself. detach_p: p is a constant (no gradient through it, not to weight either). The other arguments are
    those of `linear_logprobs`.
    """
    hidden_p, hidden_q = check_head(hidden_p, weight, bias, "hidden_p"), check_head(hidden_q, weight, bias, "hidden_q")
    if hidden_p.shape != hidden_q.shape:
        raise AlroFastError(
            f"hidden_q has shape {tuple(hidden_q.shape)}; expected that of hidden_p, {tuple(hidden_p.shape)}"
        )
    n = len(hidden_p)
    rows_p = torch.arange(n, device=weight.device)
    targets = None
    if relabel is not None:
        ids_p, ids_q = check_relabel(relabel, hidden_p, weight)
        # row n of p: its own tokens; row n of q: its own, then those of p
        targets = torch.cat([torch.cat([ids_p, ids_p.new_full(ids_p.shape, -1)], 1), torch.cat([ids_q, ids_p], 1)])
    stats = head(
        torch.cat([hidden_p, hidden_q]),
        weight,
        bias,
        softcap=softcap,
        scale=scale,
        targets=targets,
        first=rows_p,
        second=rows_p + n,
        detach_first=detach_p,
        mass_bound=mass_bound,
        backend=backend,
    )
    lse_p, lse_q = stats.lse[:n], stats.lse[n:]
    if detach_p:
        lse_p = lse_p.detach()
    divergence = stats.cross - lse_p + lse_q
    if relabel is not None:
        c = ids_p.shape[1]
        z_p, z_q, z_q_own = stats.target_logits[:n, :c], stats.target_logits[n:, :c], stats.target_logits[n:, c:]
        if detach_p:
            z_p = z_p.detach()
        divergence = divergence + relabel_correction(z_p, lse_p[:, None], z_q, z_q_own, ids_p >= 0)
    return divergence


def soft_argmax_ranks(scores: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Expected rank of each candidate, s_i = sum_k k softmax_k(gamma scores_ki): [L, M], 0 on pads, lower is better.

    scores [L, M slots, M candidates]; mask [L, M] bool: which candidates list l has, a prefix of each row (a list of n
    candidates has n slots). Differentiable in scores. Source: docs/methods.md 1.2.
    """
    check_scores(scores, mask)
    check_positive(gamma=gamma)
    scores = scores.to(_result_dtype(scores))
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


def available_backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Names of the backends that can serve tensors of this device and dtype, preferred ones first."""
    device = torch.device(device)
    preferred = _PREFERRED.get(device.type, ("eager",))
    names = [*preferred, *(name for name in BACKENDS if name not in preferred)]
    return [name for name in names if _reason_against(name, device, dtype) is None]


# ---------------------------------------------------------------------------------------------------------------------
# The two fused ops as the losses use them.


class HeadStats:
    """What one pass over the head yields; every tensor float32 (float64), differentiable in hidden, weight, bias."""

    __slots__ = ("cross", "group_logits", "lse", "target_logits")

    def __init__(self, lse: Tensor, target_logits: Tensor, group_logits: Tensor, cross: Tensor):
        self.lse = lse  # [N]
        self.target_logits = target_logits  # [N, C]
        self.group_logits = group_logits  # [G, S, C]
        self.cross = cross  # [P]


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    targets: Tensor | None = None,
    rows: Tensor | None = None,
    ids: Tensor | None = None,
    first: Tensor | None = None,
    second: Tensor | None = None,
    entropy: bool = True,
    detach_first: Tensor | bool = False,
    detach_second: Tensor | bool = False,
    mass_bound: float | None = None,
    backend: str = "auto",
) -> HeadStats:
    """Everything the losses need of the head in one pass; the arguments are taken as checked.

    targets [N, C] token ids, logits of which are wanted at their own row; rows [G, S], ids [G, C]: groups of rows that
    share token ids; first, second [P]: pairs of rows a, b; negative entries are pads everywhere (result 0).
    cross [P] = E_{p_a}[z_a - z_b] (entropy) or E_{p_a}[-z_b]; detach_first / detach_second (bool, or bool [P]) stop its
    gradient into row a / row b, and into the head through that row. With pairs the bias must be finite.
    """
    empty = torch.empty(0, dtype=torch.int64, device=hidden.device)
    pair_count = 0 if first is None else len(first)
    grad_enabled = torch.is_grad_enabled()
    want_expected = grad_enabled and hidden.requires_grad
    want_spread = want_expected and pair_count > 0 and detach_first is not True
    if softcap is not None:
        check_positive(softcap=softcap)
    check_number("scale", scale, scale != 0 and abs(scale) < math.inf, "a finite number other than 0")
    if mass_bound is None:
        mass_bound = _HALF_MASS_BOUND if hidden.dtype in (torch.float16, torch.bfloat16) else 0.0
    check_number("mass_bound", mass_bound, 0 <= mass_bound < 1, "a number of at least 0 and below 1, or None")
    if pair_count and bias is not None:
        check_values("bias", bias, bias.isfinite(), "finite where distributions are compared: 0 * inf has no value")
    detached = [
        flag if isinstance(flag, Tensor) else torch.full((pair_count,), flag, dtype=torch.bool, device=hidden.device)
        for flag in (detach_first, detach_second)
    ]
    lse, target_logits, group_logits, cross, *_ = torch.ops.alro_fast.head(
        hidden,
        weight,
        bias,
        empty.view(0, 0) if targets is None else targets,
        empty.view(0, 0) if rows is None else rows,
        empty.view(0, 0) if ids is None else ids,
        empty if first is None else first,
        empty if second is None else second,
        *detached,
        softcap,
        float(scale),
        entropy,
        want_expected,
        want_spread,
        float(mass_bound),
        backend,
    )
    return HeadStats(lse, target_logits, group_logits, cross)


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
    logits = logits.to(_result_dtype(logits))
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


def relabel_correction(z_p: Tensor, lse_p: Tensor, z_q: Tensor, z_q_own: Tensor, valid: Tensor) -> Tensor:
    """What to add to E_p[-z_q] when tokens are paired by item: -sum_c p_c (z_q of its counterpart - z_q of itself).

    z_p [.., C] logits of p's relabelled tokens at p, z_q those of their counterparts at q, z_q_own those of p's own
    tokens at q; lse_p [.., 1]; valid [.., C].
    """
    return -torch.where(valid, (z_p - lse_p).exp() * (z_q - z_q_own), 0.0).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Custom ops.


@torch.library.custom_op("alro_fast::head", mutates_args=())
def _head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    detach_first: torch.Tensor,
    detach_second: torch.Tensor,
    softcap: float | None,
    scale: float,
    entropy: bool,
    want_expected: bool,
    want_spread: bool,
    mass_bound: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """lse [N], target_logits [N, C], group_logits [G, S, C], cross [P]; for backward: expected, mixed, spread."""
    module = resolve_backend(backend, hidden.device, hidden.dtype)
    gather = getattr(module, "gather_logits", eager.gather_logits)
    pairs = len(first) > 0
    with _as_given(hidden):
        passed = module.vocab_pass(
            hidden,
            weight,
            bias,
            softcap,
            scale,
            first if pairs else None,
            second if pairs else None,
            entropy=entropy,
            want_expected=want_expected,
            want_spread=want_spread,
            mass_bound=mass_bound,
        )
        target_logits = _gather(gather, hidden, weight, bias, softcap, scale, *_target_groups(targets, hidden))
        group_logits = _gather(gather, hidden, weight, bias, softcap, scale, rows, ids)
    target_logits = target_logits.view(targets.shape)
    optional = (passed.cross, passed.expected, passed.mixed, passed.spread)
    return passed.lse, target_logits, group_logits, *(_or_empty(tensor, passed.lse) for tensor in optional)


@_head.register_fake
def _(
    hidden, weight, bias, targets, rows, ids, first, second, detach_first, detach_second, softcap, scale, entropy,
    want_expected, want_spread, mass_bound, backend,
):  # fmt: skip
    n, h = hidden.shape
    dtype = _result_dtype(hidden)
    pairs = first.shape[0] > 0

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(*shape, dtype=dtype)

    return (
        new(n),
        new(*targets.shape),
        new(*rows.shape, ids.shape[1]),
        new(first.shape[0]),
        new(n, h) if want_expected else new(0),
        new(first.shape[0], h) if pairs and want_expected and softcap is not None else new(0),
        new(first.shape[0], h) if pairs and want_spread else new(0),
    )


def _head_setup(ctx, inputs, output) -> None:
    (
        hidden, weight, bias, targets, rows, ids, first, second, detach_first, detach_second, softcap, scale, entropy,
        _want_expected, _want_spread, _mass_bound, backend,
    ) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, rows, ids, first, second, detach_first, detach_second, *output)
    ctx.options = (softcap, scale, entropy, backend)


def _head_autograd(ctx, grad_lse, grad_target, grad_group, grad_cross, *_unused):
    needs = ctx.needs_input_grad
    saved = ctx.saved_tensors
    empty = saved[10].new_empty(0)
    grads = [empty if grad is None else grad.contiguous() for grad in (grad_lse, grad_target, grad_group, grad_cross)]
    d_hidden, d_weight, d_bias = torch.ops.alro_fast.head_backward(
        *grads, *saved, *ctx.options, needs[0], needs[1], needs[2]
    )
    return (
        d_hidden if needs[0] else None,
        d_weight if needs[1] else None,
        d_bias if needs[2] else None,
        *(None,) * 14,
    )


@torch.library.custom_op("alro_fast::head_backward", mutates_args=())
def _head_backward(
    grad_lse: torch.Tensor,
    grad_target: torch.Tensor,
    grad_group: torch.Tensor,
    grad_cross: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    detach_first: torch.Tensor,
    detach_second: torch.Tensor,
    lse: torch.Tensor,
    target_logits: torch.Tensor,
    group_logits: torch.Tensor,
    cross: torch.Tensor,
    expected: torch.Tensor,
    mixed: torch.Tensor,
    spread: torch.Tensor,
    softcap: float | None,
    scale: float,
    entropy: bool,
    backend: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias (empty where not wanted), summed in float32 and rounded once."""
    module = resolve_backend(backend, hidden.device, hidden.dtype)
    with _as_given(hidden):
        grad_lse = torch.zeros_like(lse) if grad_lse.numel() == 0 else grad_lse
        pairs = grad_cross.numel() > 0
        if pairs:
            grad_cross = grad_cross.masked_fill(first < 0, 0.0)
            grad_first = grad_cross.masked_fill(detach_first, 0.0)
            grad_second = grad_cross.masked_fill(detach_second, 0.0)
        d_hidden = d_weight = d_bias = None
        if want_hidden:
            d_hidden = grad_lse[:, None] * expected
            if pairs:
                a, b = first.clamp(min=0), second.clamp(min=0)
                if spread.numel():
                    own = spread + expected[a] * (float(entropy) - cross)[:, None]
                    eager.add_rows(d_hidden, a, own * grad_first[:, None])
                mean = mixed if mixed.numel() else expected[a]
                eager.add_rows(d_hidden, b, mean * -grad_second[:, None])
        if want_weight or want_bias:
            d_weight, d_bias = module.weight_grad(
                hidden,
                weight,
                bias,
                softcap,
                scale,
                first if pairs else None,
                second if pairs else None,
                lse,
                cross if pairs else None,
                grad_lse,
                grad_first if pairs else None,
                grad_second if pairs else None,
                entropy=entropy,
                want_weight=want_weight,
                want_bias=want_bias,
            )
        backward = getattr(module, "gather_backward", eager.gather_backward)
        gathers = (
            (*_target_groups(targets, hidden), target_logits[:, None], grad_target),
            (rows, ids, group_logits, grad_group),
        )
        for group_rows, group_ids, logits, grad in gathers:
            if grad.numel():
                backward(
                    hidden, weight, softcap, scale, group_rows, group_ids, logits, grad.view(logits.shape),
                    d_hidden, d_weight, d_bias,
                )  # fmt: skip
    return tuple(_or_empty(grad, hidden).to(hidden.dtype) for grad in (d_hidden, d_weight, d_bias))


@_head_backward.register_fake
def _(
    grad_lse, grad_target, grad_group, grad_cross, hidden, weight, bias, targets, rows, ids, first, second,
    detach_first, detach_second, lse, target_logits, group_logits, cross, expected, mixed, spread, softcap, scale,
    entropy, backend, want_hidden, want_weight, want_bias,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        hidden.new_empty(weight.shape if want_weight else 0),
        hidden.new_empty(weight.shape[0] if want_bias else 0),
    )


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
    module = resolve_backend(backend, logits.device, logits.dtype)
    if logits.numel() == 0:  # no list, or none with a candidate
        length, d_logits = len(logits), torch.zeros_like(logits)
        d_teacher = None if detach or divergence == "none" else torch.zeros_like(logits)
        zeros = logits.new_zeros(length), logits.new_zeros(length), torch.zeros_like(ratings)
        return *zeros, d_logits, torch.zeros_like(logits), _or_empty(d_teacher, logits)
    longest = max(logits.shape[1:])
    if longest > getattr(module, "LONGEST_LIST", longest):
        module = _of_long_lists(backend, module.LONGEST_LIST, longest)
    with _as_given(logits):
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
    return (*terms[:5], _or_empty(terms.d_teacher, logits))


@_listwise.register_fake
def _(
    logits, ratings, ranks, sizes, twin, values, gamma, sigma, normalise, divergence, detach, mask_emitted, backend
):  # fmt: skip
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


def _listwise_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[4], *output[3:])


def _listwise_autograd(ctx, grad_soft_lambda, grad_permutation, *_unused):
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
def _(grad_soft_lambda, grad_permutation, twin, d_soft_lambda, d_student, d_teacher):
    return torch.empty_like(d_soft_lambda)


def _no_second_derivative(ctx, *grads):
    raise AlroFastError(
        "double backward through alro_fast ops is not supported: call backward without create_graph, or take the loss "
        "from alro_fast.reference, which has derivatives of every order"
    )


_head.register_autograd(_head_autograd, setup_context=_head_setup)
_listwise.register_autograd(_listwise_autograd, setup_context=_listwise_setup)
_head_backward.register_autograd(_no_second_derivative)
_listwise_backward.register_autograd(_no_second_derivative)


@contextlib.contextmanager
def _as_given(tensor: Tensor) -> Iterator[None]:
    """Backends compute in the dtypes they are given, on the device of `tensor`: Triton launches on the current one."""
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Custom ops return no None, and no tensor twice."""
    return like.new_empty(0) if tensor is None else tensor


def _gather(gather, hidden, weight, bias, softcap, scale, rows: Tensor, ids: Tensor) -> Tensor:
    if rows.numel() == 0 or ids.numel() == 0:
        return hidden.new_empty(*rows.shape, ids.shape[1], dtype=_result_dtype(hidden))
    return gather(hidden, weight, bias, softcap, scale, rows, ids)


def _target_groups(targets: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Targets as groups of one row each."""
    return torch.arange(len(targets), device=hidden.device)[:, None], targets


# ---------------------------------------------------------------------------------------------------------------------
# Backends.


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that serves `name` ("auto" or one of BACKENDS) for tensors of this device and dtype."""
    return _resolve(name, device.type, dtype)


@functools.cache
def _resolve(name: str, device_type: str, dtype: torch.dtype) -> ModuleType:
    device = torch.device(device_type)
    if name == "auto":
        name = available_backends(device, dtype)[0]
        log.info("backend %s serves %s tensors on %s", name, str(dtype).removeprefix("torch."), device_type)
    else:
        check_backend(name)
        reason = _reason_against(name, device, dtype)
        if reason is not None:
            raise AlroFastError(
                f"backend {name!r} cannot serve {dtype} tensors on {device_type}: {reason}; "
                f"use one of {available_backends(device, dtype)} or 'auto'"
            )
    return importlib.import_module(f".backends.{name}", __package__)


def _of_long_lists(backend: str, limit: int, longest: int) -> ModuleType:
    if backend != "auto":
        raise AlroFastError(
            f"lists of {longest} candidates or grades; backend {backend!r} takes at most {limit}: use 'auto' or 'eager'"
        )
    _say_once_long_lists(limit)
    return eager


@functools.cache
def _say_once_long_lists(limit: int) -> None:
    log.info("backend eager serves lists of more than %d candidates", limit)


def check_backend(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise AlroFastError(f"backend is {name!r}; expected 'auto' or one of {', '.join(BACKENDS)}")


def _reason_against(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        module = importlib.import_module(f".backends.{name}", __package__)
    except ImportError as error:
        return f"not installed here ({error})"
    return module.unavailable(device, dtype)


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
