"""report.html and its plots, from the files of a run, an evaluation or a study: `python -m alro_fast.report FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cli import OneLineParser, run
from .errors import AlroFastError
from .evaluation.report import write_report
from .studies.report import is_study, write_study_report

OF_TRAINING = ("trainer_state.json", "config.yaml")


def main(argv: Sequence[str]) -> None:
    """Make the report of a folder again."""
    options = parser().parse_args(argv)
    if options.run is not None and not any((Path(options.run) / name).is_file() for name in OF_TRAINING):
        raise AlroFastError(
            f"--run {options.run} holds no {' or '.join(OF_TRAINING)}; give a folder of alro_fast.train"
        )
    if Path(options.folder).is_file():
        raise AlroFastError(
            f"{options.folder} is a file; expected a folder with results.json and predictions.jsonl, or of a study"
        )
    study = is_study(options.folder)
    if study and options.run is not None:
        raise AlroFastError(f"--run is no option of a study ({options.folder} is one); leave it out")
    print(write_study_report(options.folder) if study else write_report(options.folder, options.run))


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.report", description=__doc__)
    parser.add_argument("folder", help="folder with results.json and predictions.jsonl, or of a study")
    parser.add_argument("--run", metavar="DIR", help="the training run's folder, where that is another one")
    return parser


if __name__ == "__main__":
    run(main)
