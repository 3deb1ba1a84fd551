"""report.html of a run, an evaluation or a study; of two runs, of what they differ in.

`python -m alro_fast.report FOLDER`, or `FOLDER FOLDER`. Tables of the page lie beside it as CSV.
"""

from __future__ import annotations

from .cli import launch  # before torch: see there

if __name__ == "__main__":
    launch("report")

# isort: split

import argparse
from collections.abc import Sequence
from pathlib import Path

from .cli import OneLineParser
from .errors import AlroFastError
from .evaluation.report import write_comparison, write_report
from .run_folder import check_writable
from .studies.report import is_study, write_study_report

OF_TRAINING = ("trainer_state.json", "config.yaml")


def main(argv: Sequence[str]) -> None:
    """Make the report of a folder again, or compare two."""
    options = parser().parse_args(argv)
    for folder in (options.folder, options.other):
        if folder is not None and Path(folder).is_file():
            raise AlroFastError(
                f"{folder} is a file; expected a folder with results.json and predictions.jsonl, or of a study"
            )
    if options.other is not None:
        compare(options)
        return
    if options.output_dir is not None:
        raise AlroFastError("--output_dir is of two folders compared; the report of one is written into it")
    if options.run is not None and not any((Path(options.run) / name).is_file() for name in OF_TRAINING):
        raise AlroFastError(
            f"--run {options.run} holds no {' or '.join(OF_TRAINING)}; give a folder of alro_fast.train"
        )
    study = is_study(options.folder)
    if study and options.run is not None:
        raise AlroFastError(f"--run is no option of a study ({options.folder} is one); leave it out")
    print(write_study_report(options.folder) if study else write_report(options.folder, options.run))


def compare(options: argparse.Namespace) -> None:
    """The second folder beside the first: a table, and where its page is."""
    if options.run is not None:
        raise AlroFastError("--run is of one folder; leave it out where two are compared")
    folder = Path(options.output_dir or Path(options.other) / "comparison")
    check_writable(folder)
    page, text = write_comparison(options.folder, options.other, folder)
    print(f"{text}\n\nreport: {page}")


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.report", description=__doc__)
    parser.add_argument("folder", help="folder with results.json and predictions.jsonl, or of a study")
    parser.add_argument("other", nargs="?", help="a second one of the same lists, to be compared with the first")
    parser.add_argument("--run", metavar="DIR", help="one folder: the training run's, where that is another")
    parser.add_argument(
        "--output_dir", metavar="DIR", help="two folders: where the page goes (default: comparison in the second)"
    )
    return parser
