"""Preparing made ratings in partitions: peak memory, time and disk.

    python -m bench.large.bench_partitions        100 million ratings of a million users, in 16 partitions
    pytest bench/large/bench_partitions.py        the same claim on 2 million
    options: --rows 100000000  --partitions 16  --threads 2  --folder DIR (a temporary one by default)

Claim: less than 8 GiB, whatever the number of ratings. The input is 100 Parquet files in the order of time, so that a
user is in many files; items are drawn by Zipf's law. The run is a process of its own, and memory the peak resident
set as the kernel counts it.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path

import numpy as np
import polars as pl

from bench.bench_prepare import measured

LIMIT_GIB = 8.0
FILES, ITEMS, EXPONENT = 100, 200_000, 0.8


def make_parts(folder: Path, rows: int, seed: int = 0) -> None:
    """FILES Parquet files: user_id, item_id, rating, timestamp; about 100 ratings a user."""
    folder.mkdir(parents=True, exist_ok=True)
    share = np.cumsum(np.arange(1, ITEMS + 1) ** -EXPONENT)
    for part in range(FILES):
        draw, size = np.random.default_rng([seed, part]), rows // FILES
        table = {
            "user_id": draw.integers(0, max(rows // 100, 1), size, dtype=np.int32),
            "item_id": np.searchsorted(share, draw.random(size) * share[-1]).astype(np.int32),
            "rating": (draw.integers(1, 11, size) / 2).astype(np.float32),
            "timestamp": 10**9 + np.sort(draw.integers(part * 10**6, (part + 1) * 10**6, size)),
        }
        pl.DataFrame(table).write_parquet(folder / f"part-{part:05}.parquet")


class Disk:
    """The most bytes that files of a folder took, looked at twice a second while the context is open."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.over = folder, 0, threading.Event()

    def __enter__(self) -> Disk:
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.over.wait(0.5):
            self.most = max(self.most, size(self.folder))


def size(folder: Path) -> int:
    """Bytes of all files that are there; one with two names counts once."""
    found = {}
    for file in folder.rglob("*.parquet"):
        try:
            seen = file.stat()
        except FileNotFoundError:
            continue
        found[seen.st_ino] = seen.st_size
    return sum(found.values())


def run(rows: int, partitions: int, threads: int, folder: Path) -> dict[str, float]:
    """What `measured` gives, and the GiB of disk: of the input, at most beside it, of the lists."""
    make_parts(folder / "ratings", rows)
    words = ["--dataset", "parquet", "--ratings_file", str(folder / "ratings"), "--duplicates", "drop"]
    with Disk(folder / "lists") as disk:
        found = measured([*words, "--output_dir", str(folder / "lists"), "--partitions", str(partitions)], threads)
    found |= {"input": size(folder / "ratings") / 2**30, "most": disk.most / 2**30}
    found["lists"] = size(folder / "lists") / 2**30
    print(
        "{rows:,} ratings in {partitions} partitions: {seconds:.0f} s, {cpu_seconds:.0f} s CPU, peak {gib:.2f} GiB; "
        "input {input:.2f} GiB, disk beside it at most {most:.2f} GiB, lists {lists:.2f} GiB".format(
            rows=rows, partitions=partitions, **found
        ),
        flush=True,
    )
    return found


def test_partitions_are_lean(tmp_path):
    assert run(2_000_000, 4, 2, tmp_path)["gib"] < LIMIT_GIB / 8  # a limit that leaves room for 100 million


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--partitions", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        found = run(arguments.rows, arguments.partitions, arguments.threads, Path(temporary))
    assert found["gib"] < LIMIT_GIB


if __name__ == "__main__":
    main()
