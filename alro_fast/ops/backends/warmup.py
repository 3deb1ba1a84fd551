"""Compiling the Triton kernels of a run before its first step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...kernels import gather, row_kernel
from . import triton

log = logging.getLogger(__name__)


def warmup(
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rows: Iterable[int] = (64, 128, 256, 512, 1024, 2048),
    candidates: Iterable[int] = (10, 20),
    softcap: float | None = None,
    bias: bool = False,
    trainable: bool = False,
    device: str | torch.device = "cuda",
) -> float:
    """Compiles the kernels a training run will need, with a progress line each; returns the seconds it took.

    rows, candidates (per list): one number for each range of them, as the table and powers of two divide them; numbers
    in between are compiled with them. trainable: the gradient of the head too. Left to their first use: an undetached
    teacher over the vocabulary, the `ratings` form, divergences other than "kl".
    Memory: one weight of [min(vocab_size, two tiles), hidden_size] and hidden states of max(rows).
    """
    began = time.perf_counter()
    rows = list(rows)
    width = 2 * row_kernel.MAX_COLUMNS + vocab_size % row_kernel.MAX_COLUMNS
    weight = torch.zeros(min(vocab_size, width), hidden_size, dtype=dtype, device=device)
    row = weight.new_zeros(len(weight)) if bias else None
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        for done, count in enumerate(rows):
            log.info("warmup %d/%d: kernels for %d rows of %d", done + 1, len(rows), count, hidden_size)
            _warm_head(weight, row, softcap, count, trainable)
        for size in candidates:
            _warm_lists(weight, row, softcap, size, trainable)
        if weight.is_cuda:
            torch.cuda.synchronize()
    log.info("warmup: %d shapes in %.1f s", len(rows), time.perf_counter() - began)
    return time.perf_counter() - began


def _warm_head(weight: Tensor, bias: Tensor | None, softcap: float | None, rows: int, trainable: bool) -> None:
    hidden = weight.new_zeros(rows, weight.shape[1])
    zeros = hidden.new_zeros(rows, dtype=torch.float32)
    first = torch.arange(rows // 2, device=weight.device)
    second = first + rows // 2
    head = hidden, weight, bias, softcap, 1.0
    for want_expected, mass_bound in ((False, 0.0), (True, 0.0), (True, 2.0**-12)):
        triton.vocab_pass(*head, want_expected=want_expected, mass_bound=mass_bound)
        triton.paired_vocab_pass(
            *head, first, second, entropy=True, want_expected=want_expected, want_spread=False, mass_bound=mass_bound
        )
    if trainable:
        wanted: dict[str, Any] = {"want_weight": True, "want_bias": bias is not None}
        of_pairs = torch.zeros_like(first, dtype=torch.float32)
        triton.weight_grad(*head, zeros, zeros, **wanted)
        triton.paired_weight_grad(
            *head, first, second, zeros, of_pairs, zeros, of_pairs, of_pairs, entropy=True, **wanted
        )


def _warm_lists(weight: Tensor, bias: Tensor | None, softcap: float | None, size: int, trainable: bool) -> None:
    """The logits of labels (one of a row) and of a list's candidates, forward and backward, and the list's terms."""
    hidden = weight.new_zeros(size, weight.shape[1])
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None else None
        for tensor in (hidden, weight if trainable else None, bias if trainable else None)
    )
    slots = torch.arange(size, device=weight.device)
    labels = torch.arange(max(size, gather.SEGMENT + 1), device=weight.device)[:, None] % size  # of two segments
    for rows, ids in ((labels, labels), (slots[None], slots[None])):
        ids = ids % len(weight)
        logits = triton.gather_logits(hidden, weight, bias, softcap, 1.0, rows, ids)
        triton.gather_backward(hidden, weight, softcap, 1.0, rows, ids, logits, logits, d_hidden, d_weight, d_bias)
    triton.listwise(
        logits, torch.zeros_like(logits[0]), slots[None] + 1, slots.new_full((1,), size), slots.new_zeros(1), None,
        gamma=1.0, sigma=1.0, normalise=True, divergence="kl", detach=True, mask_emitted=False,
    )  # fmt: skip
