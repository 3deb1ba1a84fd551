"""Random heads, and what the head's kernels compute from them in float64 by definition; for the kernel tests.

The tests run the compiled kernels where there is a CUDA device and Triton's interpreter elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_ROUNDING = {  # Triton's interpreter cuts bfloat16 off where devices round
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7,
    torch.float32: 0.0,
}


@dataclass
class Head:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    first: Tensor | None = None
    second: Tensor | None = None

    @property
    def arguments(self) -> tuple:
        return self.hidden, self.weight, self.bias, self.softcap, self.scale

    def logits(self) -> Tensor:
        """z [N, V] float64."""
        z = self.hidden.double() @ self.weight.double().T
        if self.bias is not None:
            z = z + self.bias.double()
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def slope(self) -> Tensor:
        """dz / d(hidden . w) [N, V]."""
        z = self.logits()
        return self.scale * (torch.ones_like(z) if self.softcap is None else 1 - (z / self.softcap) ** 2)

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which pairs are no pads, and their rows."""
        held = self.first >= 0
        return held, self.first[held], self.second[held]

    def cross(self, entropy: bool) -> Tensor:
        z = self.logits()
        held, a, b = self.held()
        value = z.new_zeros(len(self.first))
        value[held] = (z[a].softmax(1) * ((z[a] if entropy else 0) - z[b])).sum(1)
        return value

    def pair_sums(self, entropy: bool) -> tuple[Tensor, Tensor]:
        """mixed and spread [P, H]."""
        z, slope, w = self.logits(), self.slope(), self.weight.double()
        held, a, b = self.held()
        p = z[a].softmax(1)
        mixed, spread = (z.new_zeros(len(self.first), w.shape[1]) for _ in range(2))
        mixed[held] = (p * slope[b]) @ w
        spread[held] = (p * ((z[a] if entropy else 0) - z[b]) * slope[a]) @ w
        return mixed, spread

    def expected(self) -> Tensor:
        return (self.logits().softmax(1) * self.slope()) @ self.weight.double()

    def expected_error(self, dtype: torch.dtype) -> Tensor:
        """What rounding every p to `dtype` may change in `expected` [N, H], and float32 sums besides."""
        size = (self.logits().softmax(1) * self.slope().abs()) @ self.weight.double().abs()
        return size * (HALF_ROUNDING[dtype] + 1e-5) + 1e-6


def head(
    rows: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    pairs: int = 0,
    seed: int = 0,
    spread: float = 2.0,
) -> Head:
    """Logits with a standard deviation of about `spread`; pairs at random, about one in five a pad."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    hidden = draw(rows, hidden_size)
    weight = draw(vocab, hidden_size) * spread / hidden_size**0.5
    first = second = None
    if pairs:
        first, second = torch.randint(0, rows, (2, pairs), generator=generator)
        pad = torch.rand(pairs, generator=generator) < 0.2
        first[pad] = second[pad] = -1
        first, second = first.to(DEVICE), second.to(DEVICE)
    return Head(
        hidden.to(DEVICE, dtype),
        weight.to(DEVICE, dtype),
        draw(vocab).to(DEVICE, dtype) if bias else None,
        softcap,
        scale,
        first,
        second,
    )
