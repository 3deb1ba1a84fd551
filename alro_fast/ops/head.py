"""The pass over the LM head: log-probabilities, divergences and the statistics that every loss is made of."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import AlroFastError
from .backends import eager
from .checks import check_head, check_index, check_number, check_positive, check_relabel, check_values
from .dispatch import as_given, head_server, no_second_derivative, or_empty, result_dtype

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
    check_number("scale", scale, lambda n: n != 0 and abs(n) < math.inf, "a finite number other than 0")
    if mass_bound is None:
        mass_bound = _HALF_MASS_BOUND if hidden.dtype in (torch.float16, torch.bfloat16) else 0.0
    check_number("mass_bound", mass_bound, lambda n: 0 <= n < 1, "a number of at least 0 and below 1, or None")
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
    serves = functools.partial(head_server, backend, hidden, softcap=softcap)
    arguments = hidden, weight, bias, softcap, scale
    mixed = spread = cross = None
    with as_given(hidden):
        if len(first):
            lse, expected, cross, mixed, spread = serves("paired_vocab_pass").paired_vocab_pass(
                *arguments, first, second, entropy=entropy, want_expected=want_expected, want_spread=want_spread,
                mass_bound=mass_bound,
            )  # fmt: skip
        else:
            lse, expected = serves("vocab_pass").vocab_pass(
                *arguments, want_expected=want_expected, mass_bound=mass_bound
            )
        gather = serves("gather_logits").gather_logits
        target_logits = _gather(gather, *arguments, *_target_groups(targets, hidden))
        group_logits = _gather(gather, *arguments, rows, ids)
    target_logits = target_logits.view(targets.shape)
    return lse, target_logits, group_logits, *(or_empty(tensor, lse) for tensor in (cross, expected, mixed, spread))


@_head.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, ids: Tensor, first: Tensor,
    second: Tensor, detach_first: Tensor, detach_second: Tensor, softcap: float | None, scale: float, entropy: bool,
    want_expected: bool, want_spread: bool, mass_bound: float, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, h = hidden.shape
    dtype = result_dtype(hidden)
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


def _head_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        hidden, weight, bias, targets, rows, ids, first, second, detach_first, detach_second, softcap, scale, entropy,
        _want_expected, _want_spread, _mass_bound, backend,
    ) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, rows, ids, first, second, detach_first, detach_second, *output)
    ctx.options = (softcap, scale, entropy, backend)


def _head_autograd(
    ctx: Any,
    grad_lse: Tensor | None,
    grad_target: Tensor | None,
    grad_group: Tensor | None,
    grad_cross: Tensor | None,
    *_unused: Tensor | None,
) -> tuple[Tensor | None, ...]:
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
    serves = functools.partial(head_server, backend, hidden, softcap=softcap)
    arguments = hidden, weight, bias, softcap, scale
    with as_given(hidden):
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
                a, b = (_pads_spread(index, len(hidden)) for index in (first, second))
                if spread.numel():
                    own = spread + expected[a] * (float(entropy) - cross)[:, None]
                    eager.add_rows(d_hidden, a, own * grad_first[:, None])
                mean = mixed if mixed.numel() else expected[a]
                eager.add_rows(d_hidden, b, mean * -grad_second[:, None])
        wanted = {"want_weight": want_weight, "want_bias": want_bias}
        if (want_weight or want_bias) and pairs:
            d_weight, d_bias = serves("paired_weight_grad").paired_weight_grad(
                *arguments, first, second, lse, cross, grad_lse, grad_first, grad_second, entropy=entropy, **wanted
            )
        elif want_weight or want_bias:
            d_weight, d_bias = serves("weight_grad").weight_grad(*arguments, lse, grad_lse, **wanted)
        backward = serves("gather_backward").gather_backward
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
    of_hidden, of_weight, of_bias = (or_empty(grad, hidden).to(hidden.dtype) for grad in (d_hidden, d_weight, d_bias))
    return of_hidden, of_weight, of_bias


@_head_backward.register_fake
def _(
    grad_lse: Tensor, grad_target: Tensor, grad_group: Tensor, grad_cross: Tensor, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, targets: Tensor, rows: Tensor, ids: Tensor, first: Tensor, second: Tensor,
    detach_first: Tensor, detach_second: Tensor, lse: Tensor, target_logits: Tensor, group_logits: Tensor,
    cross: Tensor, expected: Tensor, mixed: Tensor, spread: Tensor, softcap: float | None, scale: float, entropy: bool,
    backend: str, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        hidden.new_empty(weight.shape if want_weight else 0),
        hidden.new_empty(weight.shape[0] if want_bias else 0),
    )


_head.register_autograd(_head_autograd, setup_context=_head_setup)
_head_backward.register_autograd(no_second_derivative)


def _gather(
    gather: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    rows: Tensor,
    ids: Tensor,
) -> Tensor:
    if rows.numel() == 0 or ids.numel() == 0:
        return hidden.new_empty(*rows.shape, ids.shape[1], dtype=result_dtype(hidden))
    return gather(hidden, weight, bias, softcap, scale, rows, ids)


def _target_groups(targets: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Targets as groups of one row each."""
    return torch.arange(len(targets), device=hidden.device)[:, None], targets


def _pads_spread(index: Tensor, rows: int) -> Tensor:
    """index [P] with a row of its own for every pad (negative): the zeros of all pads would queue up at one row."""
    return torch.where(index < 0, torch.arange(len(index), device=index.device) % max(rows, 1), index)
