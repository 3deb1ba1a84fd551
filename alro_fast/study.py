"""A grid of options x seeds over training runs, or a search among them, and one table of paired differences.

`python -m alro_fast.study FILE_OR_NAME [--set option=value ...] [--seeds 0-4]` checks every run before the first one
begins, runs each in a process and a folder of its own, and writes table.md, table.json, table.csv and differences.png.
Begun again, it goes on: a finished run is not run again. docs/studies.md says what a file holds.
"""

from __future__ import annotations

from .cli import launch  # before torch: see there

if __name__ == "__main__":
    launch("study")

# isort: split

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from .cli import OneLineParser
from .errors import AlroFastError
from .run_folder import held
from .studies.plan import Study, as_told, parse_seeds, plan, read_study, study_names
from .studies.progress import Progress
from .studies.report import write_study_report
from .studies.runs import PLAN, check_folder, commands_of, execute
from .studies.search import search
from .studies.table import table, to_markdown, write
from .texts import from_yaml


def main(argv: Sequence[str]) -> None:
    """Plan, check, run, compare; exit status 1 where runs failed."""
    options = parser().parse_args(argv)
    if options.processes < 1:
        raise AlroFastError(f"--processes is at least 1; given {options.processes}")
    given: dict[str, Any] = {
        "changes": changes(options.set),
        "seeds": None if options.seeds is None else parse_seeds(options.seeds),
        "output_dir": options.output_dir,
    }
    document = search(read_study(options.study), given, options.processes, options.dry_run)
    if document is None:
        return
    study = plan(document, **given)
    check_folder(study)
    waiting = [each for each in study.runs if commands_of(study, each)]
    print(f"{study.name}: {len(study.variants)} variants x {len(study.seeds)} seeds in {study.folder}")
    print(f"{len(study.runs) - len(waiting)} of {len(study.runs)} runs are finished", flush=True)
    if options.dry_run:
        for name, each in study.variants.items():
            print(f"  {name}: {as_told(each) or 'base'}")
        return
    with held(study.folder):
        carry_out(study, len(waiting), options.processes)


def carry_out(study: Study, waiting: int, processes: int) -> None:
    """The runs that are left, and the table of all."""
    (study.folder / PLAN).write_text(yaml.safe_dump(study.described(), sort_keys=False), encoding="utf-8")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as by Ctrl-C: the runs under way end with the study
    failed = execute(study, processes, Progress(study, waiting, processes))
    measured, unread = table(study)
    told = {each.title for each in failed}
    for title in (title for title in unread if title not in told):  # finished before
        print(f"{title}: {unread[title]}")
    if measured:
        paths = write(study, measured)
        print(f"\n{to_markdown(study, measured)}\nwritten to {study.folder}: {', '.join(path.name for path in paths)}")
        print(f"report: {write_study_report(study.folder)}")
    titles = [each.title for each in study.runs if each.title in told | unread.keys()]
    if titles:
        print(f"{len(titles)} of {len(study.runs)} runs failed: {'; '.join(titles)}")
        raise SystemExit(1)


def changes(words: Sequence[str]) -> dict[str, Any]:
    """`--set option=value ...`, values as in YAML."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise AlroFastError(f"--set {word!r}; expected option=value, such as learning_rate=1e-3")
        found[name] = from_yaml(value, f"--set {name}")
    return found


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.study", description=__doc__)
    parser.add_argument("study", metavar="FILE_OR_NAME", help=f"a YAML file, or one of {', '.join(study_names())}")
    parser.add_argument(
        "--set", nargs="+", action=_Extend, default=[], metavar="OPTION=VALUE",
        help="what the study needs, and options of alro_fast.train for all of its runs",
    )  # fmt: skip
    parser.add_argument("--seeds", help="in place of the file's: 0-4, or 0,2,5")
    parser.add_argument("--output_dir", help="where runs and tables go; default: out/NAME")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--dry_run", action="store_true", help="check every run, print the plan, run nothing")
    return parser


class _Extend(argparse.Action):
    """Words of every time that an option is given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        earlier = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(earlier if isinstance(earlier, list) else ()), *values])
