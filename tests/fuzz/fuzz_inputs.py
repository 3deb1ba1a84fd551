"""Whatever is read from a user's files or a server's answers, made hostile: a result or an AlroFastError, never
another exception, in bounded time and memory.

    make fuzz FUZZ_SECONDS=600                                          everything, in turn
    python tests/fuzz/fuzz_inputs.py --seconds 60 --seed 7 --only csv   one kind; --seed is of the first case

A case is a kind and a seed; a failure says both, and is run again by --only KIND --seed SEED --cases 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mutate import mutated
from readers import KINDS

from alro_fast.errors import AlroFastError

SECONDS, GIB = 20.0, 1.5  # of one case: the most it may take, and add to the peak of the process


class Kind(NamedTuple):
    """make: writes valid files into a folder; check: reads them; names: which are made hostile."""

    make: Callable[[Path], None]
    check: Callable[[Path], object]
    names: tuple[str, ...]


class Failure(AssertionError):
    """What a case did that no input may do."""


def attempt(name: str, seed: int, pristine: Path, work: Path) -> str:
    """Run one case; "refused" or "read", Failure for anything else. pristine: what the kind's `make` wrote."""
    kind, draw = Kind(*KINDS[name]), random.Random(f"{name}/{seed}")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work)
    file = work / draw.choice(kind.names)
    file.write_bytes(mutated(draw, file.read_bytes()))
    before, started = _peak(), time.monotonic()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            kind.check(work)
        answer = "read"
    except AlroFastError as error:
        if not str(error).strip():
            raise Failure(f"{name}, seed {seed}: an error without a word") from error
        answer = "refused"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of polars is no Exception
        raise Failure(f"{name}, seed {seed}, {file.name}:\n{''.join(traceback.format_exception(error)[-6:])}") from None
    seconds, more = time.monotonic() - started, (_peak() - before) / 2**20
    if seconds > SECONDS or more > GIB:
        raise Failure(f"{name}, seed {seed}, {file.name}: {seconds:.0f} s, {more:.1f} GiB more at the peak")
    return answer


def _peak() -> float:
    """KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--cases", type=int, help="of each kind (default: as many as the seconds allow)")
    parser.add_argument(
        "--keep_going", action="store_true", help="count failures, and end with the first of each place"
    )
    options = parser.parse_args()
    until, found, places = time.monotonic() + options.seconds, Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            (Path(folder) / name).mkdir()
            Kind(*KINDS[name]).make(Path(folder) / name)
        seed = options.seed
        while time.monotonic() < until and (options.cases is None or seed < options.seed + options.cases):
            for name in options.only:
                try:
                    found[name, attempt(name, seed, Path(folder) / name, Path(folder) / "work")] += 1
                except Failure as failure:
                    if not options.keep_going:
                        raise
                    found[name, "FAILED"] += 1
                    places.setdefault((name, str(failure)[-300:]), str(failure))
            seed += 1
    print(json.dumps({f"{name} {what}": count for (name, what), count in sorted(found.items())}, indent=1))
    for failure in places.values():
        print(failure)
    sys.exit(1 if places else 0)


if __name__ == "__main__":
    main()
