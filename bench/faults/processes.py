"""Commands in processes of their own, wounded. What they import is imported once, before they are forked.

`python -m bench.faults.processes WOUND TRACE COMMAND [options]` is one in a process that a launcher starts.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from alro_fast import cli

PATIENCE = 300.0  # seconds
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended: `status` as a shell says it (137 for SIGKILL), and the last line it wrote."""

    status: int
    said: str
    output: str


class Laboratory:
    """A folder for runs, and the processes in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def run(self, command: str, words: Sequence[Any], wound: dict[str, Any] | None = None, trace: str = "") -> Ended:
        """Run a command to its end. trace: name of the run, whose lists are noted by process."""
        self.count += 1
        log = self.folder / f"log-{self.count}.txt"
        noted = self.folder / f"{trace or 'none'}.trace-{self.count:03}.jsonl"
        child = os.fork()
        if not child:
            _be(command, [str(word) for word in words], wound or {}, noted, log)
        return _ended(_wait(child), log)

    def launch(self, processes: int, words: Sequence[Any], wound: dict[str, Any], trace: str) -> Ended:
        """The same of `train`, in several processes that torchrun starts."""
        self.count += 1
        log = self.folder / f"log-{self.count}.txt"
        noted = self.folder / f"{trace}.trace-{self.count:03}.jsonl"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        told = ["-m", "bench.faults.processes", json.dumps(wound), str(noted), "train", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            done = subprocess.run([*launcher, *told], stdout=out, stderr=out, env=environment, timeout=PATIENCE)
        return _ended(done.returncode, log)

    def trained(self, trace: str) -> dict[int, list[str]]:
        """Which lists each optimiser step of a run trained; of a step that was done again, the last time."""
        steps: dict[int, list[str]] = {}
        for run in self.runs(trace):
            steps |= run
        return {step: sorted(lists) for step, lists in steps.items()}

    def runs(self, trace: str) -> list[dict[int, list[str]]]:
        """The same of every time that a run was begun or gone on with, over all its processes."""
        runs: dict[str, dict[int, list[str]]] = {}
        for file in sorted(self.folder.glob(f"{trace}.trace-*.jsonl")):
            run = runs.setdefault(file.name.split(".")[1], {})
            for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
                run.setdefault(line["step"], []).extend(line["lists"])
        return list(runs.values())


def _be(command: str, words: list[str], wound: dict[str, Any], trace: Path, log: Path) -> NoReturn:
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        wounded(command, words, wound, trace)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wounded(command: str, words: list[str], wound: dict[str, Any], trace: Path) -> None:
    """A command of alro_fast, to its end."""
    from .wounds import inflict

    main = importlib.import_module(f"alro_fast.{command}").main
    inflict(wound, trace)
    cli.run(main, words)


def _wait(child: int) -> int:
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a run did not end within {PATIENCE:g} s")


def _ended(status: int, log: Path) -> Ended:
    output = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return Ended(128 - status if status < 0 else status, lines[-1] if lines else "", output)


if __name__ == "__main__":
    noted = Path(sys.argv[2]).with_suffix(f".{os.environ.get('RANK', 0)}.jsonl")
    wounded(sys.argv[3], sys.argv[4:], json.loads(sys.argv[1]), noted)
