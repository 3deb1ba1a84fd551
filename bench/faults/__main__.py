"""Strike small runs on the CPU, let them go on, and compare: a table of what was lost.

    python -m bench.faults [--only step,save] [--times N] [--seed S] [--folder DIR] [--table FILE]

Exit status 1 where anything was lost. Some four minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads do not outlive a fork
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

import alro_fast.evaluate
import alro_fast.prepare
import alro_fast.report
import alro_fast.train  # noqa: F401  # all imported once, before processes are forked

from .cases import CASES, Outcome, outcomes


def main() -> None:
    """Parse, strike, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--times", type=int, help="how often each (default: as in the table of the docs)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: they are removed)")
    parser.add_argument("--table", type=Path, help="write the table here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--only: {unknown[0]} is no fault; expected some of {', '.join(CASES)}")
    started, found = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="faults-") as made:
        for outcome in outcomes((options.folder or Path(made)).absolute(), names, options.times, options.seed):
            found.append(outcome)
            told = outcome.wrong or f"{outcome.steps} steps again, weights off by {outcome.weights or 0.0:.1e}"
            print(f"{time.monotonic() - started:5.0f} s  {outcome.fault}: {told}", file=sys.stderr, flush=True)
    text = table(found)
    print(text)
    if options.table is not None:
        options.table.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(any(outcome.wrong for outcome in found))


def table(found: list[Outcome]) -> str:
    """A row for each fault."""
    lines = ["| fault | times | exit status | steps done again | weights off by at most | lists lost | failed |"]
    lines.append("| --- | --: | --: | --: | --: | --: | --: |")
    for fault in dict.fromkeys(outcome.fault for outcome in found):
        mine = [outcome for outcome in found if outcome.fault == fault]
        status = ", ".join(map(str, sorted({outcome.ended.status for outcome in mine})))
        weights = [outcome.weights for outcome in mine if outcome.weights is not None]
        most = f"{max(weights):.0e}" if any(weights) else "0" if weights else "-"
        steps = sum(outcome.steps for outcome in mine) if weights else "-"
        lists = sum(outcome.lists for outcome in mine)
        wrong = sum(bool(outcome.wrong) for outcome in mine)
        lines.append(f"| {fault} | {len(mine)} | {status} | {steps} | {most} | {lists} | {wrong} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
