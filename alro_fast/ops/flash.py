"""FlashAttention's variable-length kernels by one signature: torch's (FA2, FA3, FA4) and the flash-attn package's."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

logger = logging.getLogger("alro_fast.modeling.attention")


class Sequences(Protocol):
    """What of `modeling.packing.Varlen` the kernels read."""

    @property
    def cu_seqlens_q(self) -> Tensor: ...
    @property
    def cu_seqlens_k(self) -> Tensor: ...
    @property
    def max_seqlen_q(self) -> int: ...
    @property
    def max_seqlen_k(self) -> int: ...


# backend(query [Tq, heads, D], key, value [Tk, kv_heads, D], sequences, scale, window, softcap) -> [Tq, heads, D]
VarlenBackend = Callable[[Tensor, Tensor, Tensor, Sequences, float, int | None, float | None], Tensor]


def serves(query: Tensor) -> bool:
    """Whether FlashAttention has a kernel for this dtype, width and device (Ampere or later)."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    width = query.shape[-1]
    return half and width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


class Flash(NamedTuple):
    """A variable-length kernel; `newest`: FlashAttention-3 or later."""

    run: VarlenBackend
    name: str
    newest: bool


@functools.cache
def varlen_backend(softcap: bool, device: torch.device) -> Flash | None:
    """The variable-length kernel for a device; None: there is none for soft-capped scores."""
    if not softcap:
        from torch.nn.attention.varlen import varlen_attn

        name = _activate_newest_flash(device)
        return Flash(torch_varlen(varlen_attn), f"torch.nn.attention.varlen ({name})", name in ("FA3", "FA4"))
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return Flash(flash_attn_varlen(flash_attn_varlen_func), "the flash-attn package", False)
    return None


def torch_varlen(varlen_attn: Callable[..., Any]) -> VarlenBackend:
    """`torch.nn.attention.varlen.varlen_attn`, whose spelling changed: `enable_gqa` came after torch 2.11.

    Without the flag the kernel takes fewer key heads as they are; with it the flag has to be set.
    """
    extra = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        assert softcap is None
        out: Tensor = varlen_attn(
            query,
            key,
            value,
            sequences.cu_seqlens_q,
            sequences.cu_seqlens_k,
            sequences.max_seqlen_q,
            sequences.max_seqlen_k,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **extra,
        )
        return out

    return run


def flash_attn_varlen(flash_attn_varlen_func: Callable[..., Tensor]) -> VarlenBackend:
    """`flash_attn_varlen_func` of the flash-attn package (2.6 and later: soft-capping)."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        return flash_attn_varlen_func(
            query,
            key,
            value,
            sequences.cu_seqlens_q,
            sequences.cu_seqlens_k,
            sequences.max_seqlen_q,
            sequences.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
            softcap=softcap or 0.0,
        )

    return run


def _activate_newest_flash(device: torch.device) -> str:
    """Let torch's FlashAttention dispatch to FA3 (Hopper) or FA4 (Blackwell) where its package is installed."""
    from torch.nn import attention

    current = getattr(attention, "current_flash_attention_impl", lambda: None)()  # not every torch from 2.11 on has it
    if current:
        return str(current)
    major, _ = torch.cuda.get_device_capability(device)
    name, package = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}.get(major, (None, ""))
    if name is None or importlib.util.find_spec(package.split(".")[0]) is None:
        return "FlashAttention-2"
    try:
        attention.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        logger.info("tree attention: %s is not usable here (%s)", name, error)
        return "FlashAttention-2"
    return name
