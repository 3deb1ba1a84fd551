"""The C++ backend on the CPU beside bare GEMMs, the eager backend and autograd: `pytest bench/bench_cpp.py -s`.

Head: cross-entropy, forward and backward to d hidden, frozen head; `GEMMs` are the two bare products of that shape by
`torch.mm` (`oneDNN GEMMs`: by oneDNN, faster than MKL on processors that are not Intel's); `peaked` rows have 99.99 %
of their mass in 1 % of the columns and may lose 2^-12 of it. Peak memory is what a process of its own gained over its
tensors. Listwise: 1,000 lists, soft lambda loss and permutation KL, forward and backward. Ratios are of medians,
contestants interleaved in one process. BENCH_QUICK=1: the small shapes alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from alro_fast import linear_logprobs, ops
from alro_fast.losses import reference
from alro_fast.ops.backends import cpp
from bench.common import Contestant, interleave, realistic_head

ROOT = Path(__file__).parents[1]
QUICK = os.environ.get("BENCH_QUICK") == "1"
SHAPES = [(256, 32_000, 64), (256, 32_000, 256), (896, 32_000, 256), (256, 151_936, 256), (896, 151_936, 256)]
VECTORISED = ("avx2", "avx512", "avx512_bf16")
OPTIONS = {"gamma": 1.0, "sigma": 1.0, "normalise": True, "divergence": "kl"}

pytestmark = pytest.mark.skipif(
    cpp.unavailable(torch.device("cpu"), torch.float32) is not None, reason="no C++ kernels in this install"
)


def peaked(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The head, changed so that every row has 99.99 % of its mass in 1 % of the columns, scattered."""
    vocab = len(weight)
    special = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[: vocab // 100]
    hidden, weight = hidden.clone(), weight.clone()
    hidden[:, 0], weight[:, 0] = 30.0, 0.0
    weight[special, 0] = 1.0
    mass = (hidden[:8].float() @ weight.float().T).softmax(dim=1)[:, special].sum(dim=1)
    assert mass.min() > 0.9999, mass
    return hidden, weight


def bare_products(hidden: torch.Tensor, weight: torch.Tensor):
    z, u = hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden)

    def run() -> None:
        torch.mm(hidden, weight.T, out=z)
        torch.mm(z, weight, out=u)

    return run


def onednn_products(hidden: torch.Tensor, weight: torch.Tensor):
    product = torch.ops.mkldnn._linear_pointwise

    def run() -> None:
        z = product(hidden, weight, None, "none", [], "")
        product(z, weight.T, None, "none", [], "")

    return run


def autograd(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor):
    def run() -> torch.Tensor:
        leaf = hidden.detach().requires_grad_()
        F.cross_entropy(F.linear(leaf, weight), labels).backward()
        return leaf.grad

    return run


def ours(backend: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bound: float = 0.0):
    def run() -> torch.Tensor:
        leaf = hidden.detach().requires_grad_()
        logprobs, _ = linear_logprobs(leaf, weight, labels, backend=backend, mass_bound=bound)
        (-logprobs.mean()).backward()
        return leaf.grad

    return run


@pytest.mark.parametrize("hidden_size, vocab, rows", SHAPES[:2] if QUICK else SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_head(hidden_size, vocab, rows, dtype):
    hidden, weight, labels, entropy, top1 = realistic_head(rows, hidden_size, vocab, dtype=dtype)
    sharp = peaked(hidden, weight)
    outcome = interleave(
        [
            Contestant("GEMMs", lambda: bare_products(hidden, weight)),
            Contestant("oneDNN GEMMs", lambda: onednn_products(hidden, weight)),
            Contestant("cpp", lambda: ours("cpp", hidden, weight, labels)),
            Contestant("cpp, bound 2^-12", lambda: ours("cpp", hidden, weight, labels, 2.0**-12)),
            Contestant("cpp, peaked", lambda: ours("cpp", *sharp, labels, 2.0**-12)),
            Contestant("eager", lambda: ours("eager", hidden, weight, labels)),
            Contestant("autograd", lambda: autograd(hidden, weight, labels)),
        ],
        rounds=5,
        warmup=1,
        seconds=30.0,
    )
    floor = outcome["GEMMs"].median
    print(
        f"\nH {hidden_size} V {vocab} N {rows} {dtype} (entropy {entropy:.1f}, top-1 {top1:.2f}), "
        f"{torch.get_num_threads()} threads, GEMMs {1e3 * floor:.0f} ms = 2 units; "
        + ", ".join(f"{name} {one.median / floor:.2f}" for name, one in outcome.items() if name != "GEMMs")
    )
    wanted = outcome["autograd"].result.float()
    error = (outcome["cpp"].result.float() - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 2e-2)
    assert outcome["cpp"].median <= 1.05 * outcome["eager"].median
    half = dtype == torch.bfloat16  # its products are so fast that the op's own millisecond shows
    if cpp._cpp.instruction_set() in (("avx512_bf16",) if half else VECTORISED):
        assert outcome["cpp"].median <= (1.2 if half else 1.1) * floor
        assert outcome["cpp, peaked"].median <= (0.8 if half else 0.75) * floor


PEAK = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads({threads})
from bench.bench_cpp import autograd, ours

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

hidden, weight = torch.randn({rows}, {hidden_size}), torch.randn({vocab}, {hidden_size}) / {hidden_size} ** 0.5
labels = torch.randint(0, {vocab}, ({rows},))
run = autograd if {kind!r} == "autograd" else lambda *head: ours({kind!r}, *head)
run(hidden[:40], weight[:500], labels[:40] % 500)()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
run(hidden, weight, labels)()
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("hidden_size, vocab, rows", [(256, 32_000, 512), (896, 151_936, 512)][: 1 if QUICK else 2])
def test_head_memory(hidden_size, vocab, rows):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc to read peaks from")
    gained = {}
    for kind in ("cpp", "eager", "autograd"):
        script = PEAK.format(
            root=str(ROOT), threads=torch.get_num_threads(), rows=rows, hidden_size=hidden_size, vocab=vocab, kind=kind
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        gained[kind] = int(done.stdout)
    share = gained["cpp"] / gained["autograd"]
    print(
        f"\nH {hidden_size} V {vocab} N {rows}: "
        + ", ".join(f"{kind} {size / 2**20:.0f} MiB" for kind, size in gained.items())
        + f"; cpp {share:.1%} of autograd"
    )
    assert share <= 0.05


@pytest.mark.parametrize("lists, size", [(1000, 10), (1000, 25)])
def test_listwise(lists, size):
    generator = torch.Generator().manual_seed(0)
    half = lists // 2
    ratings = torch.randint(1, 6, (half, size), generator=generator).float().repeat(2, 1)
    order = torch.sort(ratings, dim=1, descending=True, stable=True).indices
    ranks = torch.argsort(order, dim=1, stable=True) + 1
    logits = 3 * torch.randn(lists, size, size, generator=generator)
    sizes, twin = torch.full((lists,), size), torch.cat([torch.full((half,), -1), torch.arange(half)])
    mask = torch.ones(lists, size, dtype=torch.bool)

    def by(backend: str):
        def run() -> torch.Tensor:
            leaf = logits.detach().requires_grad_()
            terms = ops.listwise(leaf, ratings, ranks, sizes, twin, **OPTIONS, backend=backend)
            (terms.soft_lambda.mean() + terms.permutation.mean()).backward()
            return leaf.grad

        return run

    def by_reference() -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        scores = leaf.log_softmax(dim=2)
        loss, _ = reference.soft_lambda(scores, ratings, mask, ranks=ranks, gamma=1.0, sigma=1.0)
        original, permuted = scores.chunk(2)
        teacher = original.detach()[:, :-1]
        divergence = (teacher.exp() * (teacher - permuted[:, :-1])).sum(dim=2).mean(dim=1)
        (loss.mean() + divergence.sum() / lists).backward()
        return leaf.grad

    outcome = interleave(
        [
            Contestant("reference", lambda: by_reference),
            Contestant("eager", lambda: by("eager")),
            Contestant("cpp", lambda: by("cpp")),
        ],
        rounds=21,
        seconds=20.0,
    )
    mine = outcome["cpp"].median
    print(
        f"\n{lists} lists of {size}: cpp {1e3 * mine:.2f} ms; "
        + ", ".join(f"{name} {outcome[name].median / mine:.1f}x" for name in ("reference", "eager"))
    )
    torch.testing.assert_close(outcome["cpp"].result, outcome["reference"].result, rtol=1e-4, atol=1e-7)
    assert outcome["reference"].median >= 10 * mine
