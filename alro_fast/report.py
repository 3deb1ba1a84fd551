"""report.html and its plots, from the files of a run: `python -m alro_fast.report RUN_FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cli import OneLineParser, run
from .errors import AlroFastError
from .evaluation.report import write_report

OF_TRAINING = ("trainer_state.json", "config.yaml")


def main(argv: Sequence[str]) -> None:
    """Make the report of a folder again."""
    options = parser().parse_args(argv)
    if options.run is not None and not any((Path(options.run) / name).is_file() for name in OF_TRAINING):
        raise AlroFastError(
            f"--run {options.run} holds no {' or '.join(OF_TRAINING)}; give a folder of alro_fast.train"
        )
    print(write_report(options.folder, options.run))


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.report", description=__doc__)
    parser.add_argument("folder", help="folder with results.json and predictions.jsonl")
    parser.add_argument("--run", metavar="DIR", help="the training run's folder, where that is another one")
    return parser


if __name__ == "__main__":
    run(main)
