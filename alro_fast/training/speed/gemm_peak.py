"""The rate at which this machine multiplies matrices, measured once per device, dtype and number of threads."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from ...modeling.products import product

SECONDS = 0.15  # spent on the CPU; a GPU takes its calls below
SHAPES = {  # rows, columns, depth; the CPU's are those of linear layers of small models
    "cpu": ((1024, 1024, 1024), (3072, 1536, 512), (2048, 2048, 2048)),
    "cuda": ((8192, 8192, 8192), (16_384, 4096, 4096)),
}


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large product of two matrices, by the library that linear layers use, in `dtype`.

    The best of repeated calls of a few shapes: what the machine can, not what it does while others use it. With as many
    threads as torch has; on CUDA with its settings for TF32.
    """
    return _gemm_peak(device.type, device.index, dtype, torch.get_num_threads())


@functools.cache
def _gemm_peak(kind: str, index: int | None, dtype: torch.dtype, threads: int) -> float:
    device, best = torch.device(kind if index is None else f"{kind}:{index}"), 0.0
    shapes = SHAPES.get(kind, SHAPES["cuda"])
    for rows, columns, depth in shapes:
        x = torch.randn(rows, depth, device=device).to(dtype)
        weight = torch.randn(columns, depth, device=device).to(dtype)
        run = functools.partial(_timed, functools.partial(product, x, weight), device)
        fastest, spent = run(), 0.0
        while spent < SECONDS / len(shapes):
            seconds = run()
            fastest, spent = min(fastest, seconds), spent + seconds
        best = max(best, 2 * rows * columns * depth / fastest)
    return best


@torch.no_grad()
def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; the device has nothing else to do before and after."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
