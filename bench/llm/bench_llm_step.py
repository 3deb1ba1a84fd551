"""ALRO's step at the shapes of Qwen3-0.6B and Llama-3.2-1B: `pytest bench/llm/bench_llm_step.py -s`.

*step*: ours beside Hugging Face and PEFT, padded; lists per second, peak memory, and the share that ours reaches of
the rate of large matrix products (`utilisation`: FLOPs by alro_fast.training.speed.flops, the peak measured between
rounds).
*ablation*: ours beside ours with one lever left out (`cases.LEVERS`), at 8 layers of 512. Contestants alternate;
ratios are medians of rounds of CPU seconds (threads added up), which a busy machine disturbs less. Losses are compared.
As many layers as the ordinary way leaves time and memory for: the fewer, the larger the share of the head, where ours
saves most. BENCH_LAYERS: that many instead. BENCH_THREADS: threads of torch.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from alro_fast.modeling.memory import keep_freed_memory
from alro_fast.modeling.products import product
from alro_fast.training.speed import gemm_peak
from alro_fast.training.speed.meter import Meter
from bench.bench_step import resident_bytes
from bench.common import DRY, machine
from bench.llm.cases import (
    DATA,
    DTYPES,
    LAYERS,
    LEVERS,
    Ordinary,
    Ours,
    adamw,
    examples,
    make_model,
    make_objective,
    step,
    token_arithmetic,
)

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no ml-latest-small at {DATA}")
ROOT = Path(__file__).parents[2]
STEPS = {  # name: layers, lists, rounds
    "tiny": (2, 2, 1),
    "8 x 512": (8, 4, 5),
    "Qwen3-0.6B": (4, 2, 3),
    "Llama-3.2-1B": (2, 2, 3),
}
if layers := os.environ.get("BENCH_LAYERS"):
    STEPS = {name: (int(layers), *others) for name, (_, *others) in STEPS.items()}
NAMES = ["tiny"] if DRY else ["8 x 512", "Qwen3-0.6B", "Llama-3.2-1B"]
ABLATION = ("tiny", 2, 2, 1) if DRY else ("8 x 512", 8, 4, 5)
WAYS = {"ours": Ours, "ordinary": Ordinary}


def build(way: str, name: str, dtype: str):
    """(the way over its own model, its optimiser, whether it is run under autocast)."""
    layers, lists, _ = STEPS[name]
    keep_freed_memory()
    objective = make_objective()
    model = make_model(name, layers, DTYPES[dtype])
    return WAYS[way](model, objective, examples(objective, lists)), adamw(model), dtype != "float32"


def peak_memory(way: str, name: str, dtype: str) -> int:
    """Peak resident bytes that two steps add over the built model, in a process of their own."""
    code = f"from bench.llm.bench_llm_step import measure_memory; measure_memory({way!r}, {name!r}, {dtype!r})"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return int(run.stdout.split()[-1])


def measure_memory(way: str, name: str, dtype: str) -> None:
    built = build(way, name, dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    before = resident_bytes("VmRSS")
    for _ in range(2):
        step(*built)
    print(resident_bytes("VmHWM") - before)


def flops_of(ours: Ours, autocast: bool) -> float:
    """Of one step, which is taken for it."""
    meter = Meter(ours.model)
    meter.take(ours.batch.packed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), meter.forward(ours.batch.packed):
        loss = ours.loss()
    loss.backward()
    return meter.flops().total


def peak_now(dtype: torch.dtype) -> float:
    """FLOPs a CPU second of large products, measured anew: clocks and neighbours change."""
    best = 0.0
    for rows, columns, depth in gemm_peak.SHAPES["cpu"]:
        x, weight = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
        for _ in range(4):
            started = time.process_time()
            product(x, weight)
            best = max(best, 2 * rows * columns * depth / (time.process_time() - started))
    return best


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", before)))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group="alro step at an LLM's shape")
def test_llm_step(benchmark, name: str, dtype: str) -> None:
    layers, lists, rounds = STEPS[name]
    memory = dict.fromkeys(WAYS) if DRY else {way: peak_memory(way, name, dtype) for way in WAYS}  # while there is room
    ways = {way: build(way, name, dtype) for way in WAYS}
    losses = {way: step(*built) for way, built in ways.items()}
    ours, _, autocast = ways["ours"]
    flops = flops_of(ours, autocast)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = []
    for _ in range(rounds):
        for way, built in ways.items():
            started = time.process_time()
            step(*built)
            seconds[way].append(time.process_time() - started)
        peaks.append(peak_now(DTYPES[dtype]))
        print({way: round(taken[-1], 2) for way, taken in seconds.items()}, memory, flush=True)
    shares = [flops / s / peak for s, peak in zip(seconds["ours"], peaks)]
    objective = make_objective()
    benchmark.extra_info |= {
        "contestant": f"{name}, {layers} of {LAYERS[name]} layers, {dtype}",
        "machine": machine(),
        "median_s": statistics.median(seconds["ours"]),
        "ordinary_s": statistics.median(seconds["ordinary"]),
        "times_faster": statistics.median(o / m for m, o in zip(seconds["ours"], seconds["ordinary"])),
        "peak_bytes": memory["ours"],
        "ordinary_peak_bytes": memory["ordinary"],
        "utilisation": statistics.median(shares),
        "gflops_of_peak": statistics.median(peaks) / 1e9,
        "tokens": token_arithmetic(examples(objective, lists)),
        "lists": lists,
        "losses": losses,
    }
    show(benchmark)
    benchmark.pedantic(time.sleep, args=(0,), rounds=1)
    assert losses["ours"] == pytest.approx(losses["ordinary"], rel=1e-4 if dtype == "float32" else 2e-2)


@pytest.mark.benchmark(group="alro step without a lever")
def test_ablation(benchmark) -> None:
    name, layers, lists, rounds = ABLATION
    keep_freed_memory()
    objective = make_objective()
    chosen = examples(objective, lists)
    ways = {}
    for without in ("", *LEVERS):
        model = make_model(name, layers)
        ways[without] = Ours(model, objective, chosen, without), adamw(model), False
    losses = {without: step(*built) for without, built in ways.items()}
    seconds: dict[str, list[float]] = {without: [] for without in ways}
    for _ in range(rounds):
        for without, built in ways.items():
            started = time.process_time()
            step(*built)
            seconds[without].append(time.process_time() - started)
    ratios = {
        without: statistics.median(slow / fast for slow, fast in zip(taken, seconds[""]))
        for without, taken in seconds.items()
        if without
    }
    benchmark.extra_info |= {
        "contestant": f"{name}: ours",
        "machine": machine(),
        "median_s": statistics.median(seconds[""]),
        "tokens": token_arithmetic(chosen),
        **{f"without {LEVERS[without]}": ratio for without, ratio in ratios.items()},
    }
    show(benchmark)
    benchmark.pedantic(time.sleep, args=(0,), rounds=1)
    for loss in losses.values():
        assert loss == pytest.approx(losses[""], rel=1e-5)


def show(benchmark) -> None:
    for key, value in benchmark.extra_info.items():
        print(f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value}")
