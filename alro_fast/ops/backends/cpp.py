"""The CPU backend: the vectorised kernels of csrc/ (module `alro_fast._cpp`), float32 and bfloat16.

Functions, shapes and formulas are those of `alro_fast.ops.backends.eager`. Each call uses `torch.get_num_threads()`
threads that end with it (nothing to lose in a fork) and gives equal bits for an equal number of threads.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from .eager import Listwise, PairedVocabPass, VocabPass
from .serves import Serves

try:
    from ... import _cpp
except ImportError as error:
    _cpp, _import_error = None, error

log = logging.getLogger(__name__)


SERVES = Serves(
    devices=("cpu",), dtypes=(torch.float32, torch.bfloat16), divergences=("kl", "ce", "symmetric")
)  # fmt: skip


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of this device and dtype here, in a few words; None: it can."""
    declined = SERVES.declines_tensors(device, dtype)
    if declined is None and _cpp is None:
        _say_once_not_built()
        return f"its kernels are not installed ({_import_error})"
    return declined


def instruction_set() -> str | None:
    """Of the kernels that run here: generic, avx2, avx512 or avx512_bf16; None where none are installed."""
    return None if _cpp is None else str(_cpp.instruction_set())


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
    """`eager.vocab_pass`; columns of W are left out of `expected` as far as `mass_bound` allows."""
    lse = _zeros(len(hidden))
    expected = _zeros(*hidden.shape) if want_expected else None
    _cpp.vocab_pass(
        *_head(hidden, weight, bias, softcap, scale),
        *(None, None, False),  # no pairs
        mass_bound,
        lse,
        expected,
        *(None, None, None),
        torch.get_num_threads(),
    )
    return VocabPass(lse, expected)


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
    """`eager.paired_vocab_pass`; columns of W are left out of `expected` and `mixed` as far as `mass_bound` allows."""
    of_pair = len(first), hidden.shape[1]
    passed = PairedVocabPass(
        lse=_zeros(len(hidden)),
        expected=_zeros(*hidden.shape) if want_expected else None,
        cross=_zeros(len(first)),
        mixed=_zeros(*of_pair) if want_expected and softcap is not None else None,
        spread=_zeros(*of_pair) if want_spread else None,
    )
    _cpp.vocab_pass(
        *_head(hidden, weight, bias, softcap, scale),
        _plain(first),
        _plain(second),
        entropy,
        mass_bound,
        *passed,
        torch.get_num_threads(),
    )
    return passed


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
    """`eager.weight_grad`."""
    grads = _head_grads(weight, want_weight, want_bias)
    _cpp.weight_grad(
        *_head(hidden, weight, bias, softcap, scale),
        *(None, None, False),  # no pairs
        _plain(lse),
        _plain(grad_lse),
        *(None, None, None),
        *grads,
        torch.get_num_threads(),
    )
    return grads


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
    """`eager.paired_weight_grad`."""
    grads = _head_grads(weight, want_weight, want_bias)
    _cpp.weight_grad(
        *_head(hidden, weight, bias, softcap, scale),
        _plain(first),
        _plain(second),
        entropy,
        _plain(lse),
        _plain(grad_lse),
        _plain(cross),
        _plain(grad_first),
        _plain(grad_second),
        *grads,
        torch.get_num_threads(),
    )
    return grads


def gather_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float, rows: Tensor, ids: Tensor
) -> Tensor:
    """`eager.gather_logits`."""
    logits = torch.empty(*rows.shape, ids.shape[1], dtype=torch.float32)
    head = _head(hidden, weight, bias, softcap, scale)
    _cpp.gather_logits(*head, _plain(rows), _plain(ids), logits, torch.get_num_threads())
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
    """`eager.gather_backward`; the outputs are contiguous float32."""
    hidden, weight, _, cap, scale = _head(hidden, weight, None, softcap, scale)
    _cpp.gather_backward(
        hidden,
        weight,
        cap,
        scale,
        _plain(rows),
        _plain(ids),
        _plain(logits),
        _plain(grad),
        d_hidden,
        d_weight,
        d_bias,
        torch.get_num_threads(),
    )


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
    """`eager.listwise`, every list visited once; ranks of a list's candidates must lie in 1 .. M."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)

    lists, width = ratings.shape
    terms = Listwise(
        new(lists),
        new(lists),
        new(lists, width),
        new(*logits.shape),
        new(*logits.shape),
        None if detach or divergence == "none" else new(*logits.shape),
    )
    _cpp.listwise(
        _plain(logits),
        _plain(ratings),
        _plain(ranks),
        _plain(sizes),
        _plain(twin),
        _plain(values),
        gamma,
        sigma,
        normalise,
        divergence,
        mask_emitted,
        *terms,
        torch.get_num_threads(),
    )
    return terms


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x [T, H], weight [H] of its dtype -> x s (weight + offset), s [T] float32 = 1 / sqrt(mean(x^2) + eps)."""
    y, scale = x.new_empty(x.shape), torch.empty(len(x), dtype=torch.float32)
    _cpp.rms_norm(x, weight.detach().contiguous()[None], eps, offset, y, scale, torch.get_num_threads())
    return y, scale


def rms_norm_backward(
    x: Tensor, weight: Tensor, offset: float, scale: Tensor, grad: Tensor, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """scale: from `rms_norm`; grad [T, H] -> gradients of x, in its dtype, and of weight, float32."""
    d_x = x.new_empty(x.shape)
    d_weight = torch.empty(len(weight), dtype=torch.float32) if want_weight else None
    row = weight.detach().contiguous()[None]
    _cpp.rms_norm_backward(x, row, offset, scale, grad, d_x, d_weight, torch.get_num_threads())
    return d_x, d_weight


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up [T, I] -> activation(gate) * up; activation: silu, gelu_tanh."""
    y = gate.new_empty(gate.shape)
    _cpp.gated(gate, up, activation, y, torch.get_num_threads())
    return y


def gated_backward(gate: Tensor, up: Tensor, activation: str, grad: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Writes the gradients of gate and up."""
    _cpp.gated_backward(gate, up, activation, grad, d_gate, d_up, torch.get_num_threads())


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    """x [B, heads, T, D]; cos, sin [B, T, D] -> x cos + rotate_half(x) sin, or the transpose of that map; lies as
    [B, T, heads, D]."""
    y = x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    _cpp.rotary(x, cos, sin, transpose, y, torch.get_num_threads())
    return y


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None, float, float]:
    bias = None if bias is None else bias.detach().float().contiguous()
    return hidden.detach(), weight.detach(), bias, 0.0 if softcap is None else softcap, scale


def _head_grads(weight: Tensor, want_weight: bool, want_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """Memory for dW and db."""
    d_weight = torch.empty(weight.shape, dtype=torch.float32) if want_weight else None
    return d_weight, torch.empty(len(weight), dtype=torch.float32) if want_bias else None


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32)


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


@functools.cache
def _say_once_not_built() -> None:
    log.warning(
        "the C++ kernels of alro_fast are not installed here: the slower eager backend is used (%s)", _import_error
    )
