"""What the benchmarks share: realistic heads, interleaved timing, and records in pytest-benchmark's JSON.

A case is measured for all of its contestants at once: every round runs each of them in turn, so that clocks and
temperature hit all alike; the medians go to `extra_info` of the benchmark entry, one entry per contestant. A contestant
that is not installed, or fails, has an entry as well, with the reason. `python -m bench.report` reads the file.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DRY = os.environ.get("BENCH_DRY") == "1"  # tiny shapes and interpreted kernels: the same code, and no measurement


class Contestant(NamedTuple):
    """`prepare()` returns the function to time, or raises Absent; what that returns is compared with float64."""

    name: str
    prepare: Callable[[], Callable[[], object]]


def compiled(function: Callable) -> Callable:
    """torch.compile as it is at its best for one shape: nothing remembered of the shapes before, nothing dynamic."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="aot_eager" if DRY else "inductor")


class Absent(Exception):
    """Why a contestant cannot run here."""


class Head(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N], -100 where ignored
    entropy: float  # mean over rows, nats
    top1: float  # mean probability of the likeliest token


def realistic_head(
    rows: int, hidden_size: int, vocab: int, *, ignored: float = 0.0, dtype: torch.dtype | None = None, seed: int = 0
) -> Head:
    """Rows that point at a few columns each: mean entropy about 2 nats, top-1 about 0.5, labels drawn from them.

    Each row is a sum of eight columns' directions with falling weights; one factor for all rows is found by bisection
    so that the mean entropy of a sample is 2 nats.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weight = torch.randn(vocab, hidden_size, generator=generator, device=DEVICE) / hidden_size**0.5
    tokens = torch.randint(0, vocab, (rows, 8), generator=generator, device=DEVICE)
    share = torch.tensor([0.55, 0.18, 0.09, 0.06, 0.04, 0.03, 0.03, 0.02], device=DEVICE)
    level = share.log() + 1.3 * torch.log(torch.tensor(float(vocab)))
    hidden = torch.zeros(rows, hidden_size, device=DEVICE)
    for place in range(8):
        hidden += level[place] * weight[tokens[:, place]]
    sample = hidden[:: max(rows // 64, 1)][:64]
    low, high = 0.1, 4.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(middle * sample @ weight.T) > 2.0 else (low, middle)
    hidden *= high
    z = high * sample @ weight.T
    likely = torch.multinomial(share.expand(rows, 8), 1, generator=generator)
    labels = tokens.gather(1, likely)[:, 0]
    labels[torch.rand(rows, generator=generator, device=DEVICE) < ignored] = -100
    dtype = dtype or (torch.bfloat16 if CUDA else torch.float32)
    return Head(
        hidden.to(dtype), weight.to(dtype), labels, _entropy(z), float(z.softmax(1).amax(1).mean())
    )  # fmt: skip


def _entropy(z: Tensor) -> float:
    log_p = z.log_softmax(1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


class Measurement(NamedTuple):
    median: float  # seconds
    fastest: float
    slowest: float
    peak: int | None  # bytes above what was held before, CUDA only
    result: object


def interleave(
    contestants: list[Contestant], *, rounds: int, warmup: int = 2, seconds: float = 60.0
) -> dict[str, Measurement | str]:
    """Medians of every contestant, or the reason why none. After `seconds` no further round, but three at least.

    A dry run takes one round and warms nothing up.
    """
    rounds, warmup = (1, 0) if DRY else (rounds, warmup)
    ready, outcome, peaks = {}, {}, {}
    for name, prepare in contestants:
        try:
            run = prepare()
            for _ in range(warmup):
                run()
            peaks[name] = _peak(run)
        except Absent as reason:
            outcome[name] = f"absent: {reason}"
        except Exception as error:  # a peer's own failure is a result, not ours to hide
            outcome[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        else:
            ready[name] = run
        _release()
    times = {name: [] for name in ready}
    began = time.perf_counter()
    for done in range(rounds):
        for name, run in ready.items():
            times[name].append(_time(run))
        if done >= 2 and time.perf_counter() - began > seconds:
            break
    for name, run in ready.items():
        taken = times[name]
        outcome[name] = Measurement(statistics.median(taken), min(taken), max(taken), peaks[name], run())
        _release()
    return {contestant.name: outcome[contestant.name] for contestant in contestants}


def _time(run: Callable[[], object]) -> float:
    if not CUDA:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _peak(run: Callable[[], object]) -> int | None:
    if not CUDA:
        run()
        return None
    _release()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _release() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def machine() -> dict[str, str | None]:
    """Device, driver and versions, for every record."""
    import triton  # a benchmark machine has it

    driver = None
    if CUDA:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "nvidia-smi gave no answer"
    return {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "driver, clocks, power": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "threads": None if CUDA else str(torch.get_num_threads()),
        "not a measurement": "kernels interpreted, shapes tiny" if DRY else None,
    }


def record(benchmark, case: dict, name: str, outcome: Measurement | str, **extra: float | None) -> None:
    """One contestant's entry in the JSON: the case, its interleaved times, and `extra`."""
    entry: dict = {**case, "contestant": name, "machine": machine()}
    if isinstance(outcome, str):
        entry["absent"] = outcome
        benchmark.name += " [absent]"
        benchmark.pedantic(lambda: None, rounds=1)
    else:
        entry |= {
            "median_s": outcome.median,
            "fastest_s": outcome.fastest,
            "slowest_s": outcome.slowest,
            "spread": (outcome.slowest - outcome.fastest) / outcome.median,
            "peak_bytes": outcome.peak,
            **extra,
        }
        benchmark.pedantic(time.sleep, args=(outcome.median,), rounds=1)  # keeps pytest-benchmark's own table in line
    benchmark.extra_info.update(entry)
