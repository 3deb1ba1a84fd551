"""Console entry points: `alro-fast train` is `python -m alro_fast.train`, and so on."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .errors import AlroFastError

# Torch's threads read this once, when torch is imported. Beside other work, threads that spin while they wait slow the
# commands down tenfold; alone, threads that sleep cost next to nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "prepare": "ratings -> ranking lists",
    "first_stage": "ratings -> a retriever's lists with hints (RecRanker)",
    "train": "tune a ranker (no arguments: the demo, on the CPU, in half a minute)",
    "evaluate": "how good its rankings are, beside the baselines",
    "rank": "order the candidates of a JSON list",
    "report": "report.html of a run or an evaluation",
    "study": "a grid of options x seeds over training runs, and one table of paired differences",
    "client": "rank through an inference server",
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like every other mistake's; options are written in full."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise AlroFastError(f"{message}; {self.prog} --help lists the options")


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake, or a file that cannot be used, becomes one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except AlroFastError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"error: {' '.join(reason.split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def main() -> None:
    """`alro-fast COMMAND [options]`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in {"-h", "--help"}:
        print("usage: alro-fast COMMAND [options]\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<11} {purpose}")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] not in COMMANDS:
        print(f"error: unknown command {arguments[0]!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    run(importlib.import_module(f"alro_fast.{arguments[0]}").main, arguments[1:])
