"""Checks of what the ops and losses are given. Errors name the argument; values are read only where that is free."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import AlroFastError

log = logging.getLogger("alro_fast.ops")


def is_number(value: Any) -> bool:
    """Whether `value` is one real number, of Python, numpy or torch, and no truth value."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def check_number(name: str, value: Any, ok: Callable[[Any], bool], expected: str) -> None:
    if not is_number(value):
        raise AlroFastError(f"{name} is {value!r:.60}; expected {expected}")
    if not ok(value):
        raise AlroFastError(f"{name} is {value}; expected {expected}")


def check_tensor(name: str, given: Any) -> Tensor:
    """What was given; AlroFastError for what is no tensor, or a sparse one."""
    if not isinstance(given, Tensor):
        raise AlroFastError(f"{name} is a {type(given).__name__}; expected a tensor")
    if given.layout != torch.strided:
        raise AlroFastError(f"{name} has layout {given.layout}; expected a dense tensor (to_dense() makes one)")
    return given


def check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        check_number(name, value, lambda n: 0 < n < math.inf, "a positive finite number")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str = "hidden") -> Tensor:
    """Shapes, dtypes and devices of the head; returns hidden, cast to weight's dtype under autocast."""
    for label, tensor, dim in ((name, hidden, 2), ("weight", weight, 2), ("bias", bias, 1)):
        if tensor is None and label == "bias":
            continue
        tensor = check_tensor(label, tensor)
        if tensor.dim() != dim:
            raise AlroFastError(f"{label} has {tensor.dim()} dimensions; expected {dim} ([N, H], [V, H] and [V])")
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise AlroFastError(f"{label} has dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64")
        check_device(label, tensor, hidden, name)
    if 0 in weight.shape:
        raise AlroFastError(f"weight has shape {tuple(weight.shape)}; expected at least one token and one column")
    if hidden.shape[1] != weight.shape[1]:
        raise AlroFastError(
            f"{name} has {hidden.shape[1]} columns and weight {weight.shape[1]}; expected one hidden size H"
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise AlroFastError(f"bias has {bias.shape[0]} entries; expected one per row of weight, {weight.shape[0]}")
    for label, dtype in ((name, hidden.dtype), ("bias", weight.dtype if bias is None else bias.dtype)):
        if dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise AlroFastError(f"{label} has dtype {dtype} and weight {weight.dtype}; expected one dtype")
    kind = hidden.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if weight.dtype == torch.float32 and casts and not torch.compiler.is_compiling():
        _say_once_wide(torch.get_autocast_dtype(kind))
    return hidden.to(weight.dtype)


@functools.cache
def _say_once_wide(autocast: torch.dtype) -> None:
    log.warning(
        "the LM head is float32, and so are its products, under autocast to %s as well; load the model in that type "
        "(--dtype bfloat16) for products on tensor cores",
        str(autocast).removeprefix("torch."),
    )


def check_index(name: str, index: Tensor, other: Tensor, other_name: str = "hidden") -> None:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise AlroFastError(f"{name} has dtype {index.dtype}; expected an integer dtype")
    check_device(name, index, other, other_name)


def check_floats(name: str, tensor: Tensor, other: Tensor, other_name: str = "hidden") -> None:
    if not tensor.is_floating_point():
        raise AlroFastError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
    check_device(name, tensor, other, other_name)


def check_values(name: str, tensor: Tensor, ok: Tensor, expected: str) -> None:
    """Raises where `ok` is false anywhere; only where reading it costs no synchronisation (CPU, not compiling)."""
    if not values_are_free(tensor) or bool(ok.all()):
        return
    bad = tensor[~ok].flatten()[0].item()
    place = tuple((~ok).nonzero()[0].tolist())
    raise AlroFastError(f"{name} holds {bad} at {place}; expected values {expected}")


def values_are_free(tensor: Tensor) -> bool:
    """Whether Python may look at values of `tensor` without a device synchronisation or a graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_ranks(ranks: Tensor, sizes: Tensor) -> None:
    """Each list's first sizes[l] ranks must be a permutation of 1 .. sizes[l]."""
    if not values_are_free(ranks):
        return
    slot = torch.arange(1, ranks.shape[1] + 1)
    valid = slot <= sizes[:, None]
    sorted_ranks = torch.where(valid, ranks.long(), ranks.shape[1] + 1).sort(dim=1).values
    wrong = (valid & (sorted_ranks != slot)).any(dim=1)
    if wrong.any():
        place = int(wrong.nonzero()[0, 0])
        raise AlroFastError(
            f"ranks of list {place} are {ranks[place, : sizes[place]].tolist()}; expected a permutation of 1 .. n"
        )


def check_scores(scores: Tensor, mask: Tensor) -> None:
    if scores.dim() != 3 or scores.shape[1] != scores.shape[2] or not scores.is_floating_point():
        raise AlroFastError(
            f"scores has shape {tuple(scores.shape)} and dtype {scores.dtype}; expected floats [L, M slots, M items]"
        )
    if mask.dtype != torch.bool or mask.shape != scores.shape[:2]:
        raise AlroFastError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; expected bool {list(scores.shape[:2])}"
        )
    check_device("mask", mask, scores, "scores")
    if values_are_free(mask) and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise AlroFastError("mask has a candidate after a pad; expected each list's candidates first, then its pads")


def check_relabel(relabel: tuple[Tensor, Tensor], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    ids_p, ids_q = relabel
    for name, ids in (("relabel[0]", ids_p), ("relabel[1]", ids_q)):
        check_index(name, ids, hidden)
        if ids.dim() != 2 or len(ids) != len(hidden) or ids.shape != ids_p.shape:
            raise AlroFastError(
                f"{name} has shape {tuple(ids.shape)}; expected [N, C] with N = {len(hidden)}, both alike"
            )
        check_values(name, ids, (ids < weight.shape[0]) & (ids >= -1), f"below {weight.shape[0]}, or -1 on pads")
    if values_are_free(ids_p):
        sorted_p, sorted_q = ids_p.sort(dim=1).values, ids_q.sort(dim=1).values
        repeated = (sorted_p[:, 1:] == sorted_p[:, :-1]) & (sorted_p[:, 1:] >= 0)
        wrong = (sorted_p != sorted_q).any(dim=1) | repeated.any(dim=1) | ((ids_p < 0) != (ids_q < 0)).any(dim=1)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise AlroFastError(
                f"relabel pairs tokens {ids_p[row].tolist()} with {ids_q[row].tolist()} in row {row}; "
                "expected the same distinct tokens on both sides"
            )
    return ids_p.long(), ids_q.long()


def check_device(name: str, tensor: Tensor, other: Tensor, other_name: str = "hidden") -> None:
    if tensor.device != other.device:
        raise AlroFastError(f"{name} is on {tensor.device} and {other_name} on {other.device}; expected one device")
