"""report.html and its plots, from the files of a run: `python -m alro_fast.report RUN_FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence

from .cli import OneLineParser, run
from .evaluation.report import write_report


def main(argv: Sequence[str]) -> None:
    """Make the report of a folder again."""
    parser = OneLineParser(prog="python -m alro_fast.report", description=__doc__)
    parser.add_argument("folder", help="folder with results.json and predictions.jsonl")
    parser.add_argument("--run", help="the training run's folder, when that is another one")
    options = parser.parse_args(argv)
    print(write_report(options.folder, options.run))


if __name__ == "__main__":
    run(main)
