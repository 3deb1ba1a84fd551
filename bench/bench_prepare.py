"""Preparing made ratings in the form of ml-32m: peak memory and time by number of rows.

    python bench/bench_prepare.py                    3, 10 and 30 million ratings, a table, the two claims checked
    pytest bench/bench_prepare.py                    the same check on 1 and 3 million
    options: --rows 3000000 30000000  --threads 2  --folder DIR (of the made files; a temporary one by default)

Claims: 30 million ratings need less than 6 GiB; time grows linearly with rows. Each size runs in a process of its own;
memory is the peak resident set of that process, as the kernel counts it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

LIMIT_GIB = 6.0
CHUNK = 5_000_000


def make_ratings(path: Path, rows: int, seed: int = 0) -> None:
    """ratings.csv and movies.csv: about 160 ratings per user, popular movies rated often, users one after another."""
    users, movies = max(rows // 160, 1), 80_000
    rng = np.random.default_rng(seed)
    (path / "movies.csv").write_text(
        "movieId,title,genres\n" + "".join(f'{m},"Film {m}, The ({1950 + m % 70})",Drama|War\n' for m in range(movies))
    )
    with (path / "ratings.csv").open("wb") as file:
        file.write(b"userId,movieId,rating,timestamp\n")
        for first in range(0, rows, CHUNK):
            row = np.arange(first, min(first + CHUNK, rows), dtype=np.int64)
            skewed = (rng.random(len(row)) ** 3 * movies / 200).astype(np.int64) * 200
            columns = {
                "userId": row * users // rows,
                "movieId": (skewed + row % 200) % movies,  # a user's 160 rows differ in row % 200: no movie twice
                "rating": rng.integers(1, 11, len(row)) / 2,
                "timestamp": 10**9 + rng.integers(0, 7 * 10**8, len(row)),
            }
            file.write(pl.DataFrame(columns).write_csv(include_header=False).encode())


def measure(folder: Path, threads: int) -> dict[str, float]:
    """Seconds passed, seconds of processor time and peak GiB of `alro_fast.prepare` on the files of `folder`."""
    words = ["--dataset", "ml-32m", "--allow_altered", "--raw_dir", str(folder)]
    return measured([*words, "--output_dir", str(folder / "lists"), "--overwrite_output_dir"], threads)


def measured(words: list[str], threads: int) -> dict[str, float]:
    """Seconds passed, seconds of processor time and peak GiB of `alro_fast.prepare` with these words."""
    command = [sys.executable, "-m", "alro_fast.prepare", *words]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | {"POLARS_MAX_THREADS": str(threads)}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"prepare failed with exit status {process.returncode}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "gib": usage.ru_maxrss / 2**20}


def run(sizes: list[int], threads: int, folder: Path) -> list[dict[str, float]]:
    """One row per size, smallest first."""
    results = []
    for rows in sorted(sizes):
        place = folder / str(rows)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "ratings.csv").exists():
            make_ratings(place, rows)
        results.append({"rows": rows, **measure(place, threads)})
        print(
            "{rows:>12,} ratings  {seconds:7.1f} s  {cpu_seconds:7.1f} s CPU  {gib:5.2f} GiB".format(**results[-1]),
            flush=True,
        )
    return results


def check(results: list[dict[str, float]]) -> None:
    """The two claims. Linear: processor time per row of the largest size is at most 1.5 times that of the smallest."""
    assert max(r["gib"] for r in results) < LIMIT_GIB
    per_row = [r["cpu_seconds"] / r["rows"] for r in results]
    assert per_row[-1] < 1.5 * per_row[0], f"seconds per row grow: {per_row}"


@pytest.mark.parametrize("sizes", [(1_000_000, 3_000_000)])
def test_prepare_is_linear_and_lean(sizes, tmp_path):
    check(run(list(sizes), threads=2, folder=tmp_path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[3_000_000, 10_000_000, 30_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        check(run(arguments.rows, arguments.threads, arguments.folder or Path(temporary)))


if __name__ == "__main__":
    main()
