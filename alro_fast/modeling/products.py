"""Matrix products of linear layers, by the faster of the two libraries that torch carries on a CPU.

torch.mm in float32 goes to MKL, which runs its AVX2 kernels on processors that are not Intel's: 38 % of the peak on an
AVX-512 Zen 5, where oneDNN reaches 85 % (Zen with AVX2 alone: 75 % and 83 %). bfloat16 goes to oneDNN anyway.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] weight^T [K, N] + bias [N] -> [T, N], for any strides; float32 sums. Not differentiable by itself."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and prefers_onednn() and x.numel() and weight.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


@functools.cache
def prefers_onednn() -> bool:
    """Whether float32 products are faster by oneDNN than by torch.mm on this machine."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and platform.machine() in ("x86_64", "AMD64")
        and "GenuineIntel" not in _processor()
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else platform.processor()
