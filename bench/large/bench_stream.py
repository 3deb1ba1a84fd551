"""Ranking a stream of lists: peak memory of `alro_fast.rank` by their number.

    python -m bench.large.bench_stream            1,000, 10,000 and 100,000 lists through a pipe, and the claim checked
    pytest bench/large/bench_stream.py            the same claim on 1,000 and 4,000
    options: --lists 1000 100000  --adapter DIR (a run's folder; the demo, trained for two steps, by default)

Claim: ten times the lists take at most 160 MiB more, and every list is answered. Libraries keep something for every
size of matrix they meet, which ends growing. Lists are short (two items read, three to rank), and made while they are
asked for. Memory is the peak resident set, as the kernel counts it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

MORE_MIB = 160.0
TITLES = ("Cardboard Bishop", "Tangled Reef", "Silver Voyage", "Idle Bridge", "Last Kettle", "Paper Comet")


def train(folder: Path) -> Path:
    """A run of two steps of the demo."""
    words = ["--output_dir", str(folder), "--max_steps", "2", "--max_test_lists", "4", "--disable_tqdm", "true"]
    command = [sys.executable, "-m", "alro_fast.train", *words, "--eval_strategy", "no", "--baselines", "none"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def write(pipe: IO[bytes], lists: int) -> None:
    """Lists of five different titles, as many as asked for."""
    draw = random.Random(0)
    with pipe:
        for number in range(lists):
            titles = [{"title": title} for title in draw.sample(TITLES, 5)]
            history = [one | {"rating": draw.randint(1, 5)} for one in titles[:2]]
            document = {"list_id": number, "history": history, "candidates": titles[2:]}
            pipe.write(json.dumps(document).encode() + b"\n")


def measure(adapter: Path, lists: int) -> dict[str, float]:
    """Seconds passed, MiB at the peak and answers of one process that ranks so many lists."""
    command = [sys.executable, "-m", "alro_fast.rank", "--adapter", str(adapter), "--top_k", "1", "--device", "cpu"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writer = threading.Thread(target=write, args=(process.stdin, lists))
    writer.start()
    answers = sum(1 for _ in process.stdout)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    writer.join()
    if process.returncode:
        raise RuntimeError(f"rank failed with exit status {process.returncode}")
    return {"seconds": time.perf_counter() - started, "mib": usage.ru_maxrss / 1024, "answers": answers}


def run(sizes: list[int], adapter: Path | None) -> None:
    """One row per number of lists, fewest first; the claim."""
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        adapter = adapter or train(Path(temporary) / "run")
        for lists in sorted(sizes):
            results[lists] = found = measure(adapter, lists)
            print("{lists:>9,} lists  {seconds:7.1f} s  {mib:6.0f} MiB".format(lists=lists, **found), flush=True)
            assert found["answers"] == lists
    for fewer, more in itertools.pairwise(results.values()):
        assert more["mib"] - fewer["mib"] < MORE_MIB


def test_a_stream_is_flat():
    run([1000, 4000], None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--adapter", type=Path)
    options = parser.parse_args()
    run(options.lists, options.adapter)


if __name__ == "__main__":
    main()
