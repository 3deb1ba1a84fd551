"""Random heads, random tries, and what the kernels compute from them in float64 by definition; for the kernel tests.

The tests run the compiled kernels where there is a CUDA device and Triton's interpreter elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
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


@dataclass
class TrieCase:
    until: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    scale: float
    window: int | None
    softcap: float | None

    def visible(self) -> np.ndarray:
        """[U, T] bool."""
        rows, keys = self.rows[:, None], np.arange(len(self.until))
        seen = (keys <= rows) & (rows < self.until)
        return seen if self.window is None else seen & (self.positions[rows] - self.positions < self.window)

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The output and the gradients of query, key and value, float64."""
        leaves = [tensor.detach().double().requires_grad_() for tensor in (self.query, self.key, self.value)]
        query, key, value = leaves
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        hidden = torch.from_numpy(~self.visible()).to(scores.device)
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)
        out.backward(self.upstream.double())
        return out.detach(), [leaf.grad for leaf in leaves]


def grow_trie(rows: int, seed: int, *, longest: int = 40, roots: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """until [T] and positions [T] of a random forest of about `rows` rows: nodes of 1 to `longest`, of 0 to 4 children,
    at any depth."""
    draw = np.random.default_rng(seed)
    until: list[int] = []
    positions: list[int] = []

    def node(position: int, share: float) -> None:
        length, begin = int(draw.integers(1, longest + 1)), len(until)
        until.extend([0] * length)
        positions.extend(range(position, position + length))
        children = int(draw.integers(0, 5))
        rest = share - length
        for _ in range(children):
            if rest > 0:
                node(position + length, rest / children)
        until[begin : begin + length] = [len(until)] * length

    while len(until) < rows:
        node(0, rows / roots)
    return np.array(until), np.array(positions)


def trie_case(
    rows: int = 45,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    *,
    heads: tuple[int, int] = (2, 1),
    answers: float = 1.0,
    window: int | None = None,
    softcap: float | None = None,
    seed: int = 0,
    longest: int = 24,
    roots: int = 2,
) -> TrieCase:
    """Attention of a share `answers` of the rows; the tensors are laid out as a layer does, [1, heads, T, D]."""
    until, positions = grow_trie(rows, seed, longest=longest, roots=roots)
    chosen = np.arange(len(until))
    if answers < 1:
        picked = np.random.default_rng(seed).choice(len(until), max(1, int(answers * len(until))), replace=False)
        chosen = np.sort(picked)
    generator = torch.Generator().manual_seed(seed)
    count = len(until)

    def made(length: int, heads: int) -> Tensor:
        whole = torch.randn(1, heads, length, width, generator=generator).to(DEVICE, dtype)
        return whole[0].transpose(0, 1)

    query, upstream = made(len(chosen), heads[0]), made(len(chosen), heads[0])
    key, value = made(count, heads[1]), made(count, heads[1])
    scale = 1.5 * width**-0.5
    return TrieCase(until, positions, chosen, query, key, value, upstream, scale, window, softcap)


def with_changed(case: TrieCase, rows: np.ndarray) -> TrieCase:
    """The same with other keys, values and queries at some rows of the stream (all rows are queries)."""
    place = torch.from_numpy(rows).to(case.key.device)
    made = [tensor.clone() for tensor in (case.query, case.key, case.value)]
    for tensor in made:
        tensor[place] = 3 - 2 * tensor[place]
    return replace(case, query=made[0], key=made[1], value=made[2])
