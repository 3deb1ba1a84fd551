"""How good a tuned model's rankings are, beside the baselines, on the same lists.

`python -m alro_fast.evaluate --adapter DIR --lists PREPARED [--split test]` prints NDCG@1/3/5/10 with intervals, states
every convention behind them, and writes results.json, predictions.jsonl, run.trec, qrels.trec and report.html.
"""

from __future__ import annotations

from .cli import OneLineParser, run  # before torch: see there

# isort: split

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import AlroFastError
from .evaluation import metrics
from .evaluation.baselines import baseline_scores
from .evaluation.preferences import answers_with_texts, evaluate_preferences
from .evaluation.rankings import evaluate_rankings
from .evaluation.results import evaluate_lists
from .ranking.options import add_ranking_options
from .ranking.ranker import check_device, check_options
from .ranking.tasks import check_tasks
from .run_folder import check_writable, run_options

__all__ = ["baseline_scores", "evaluate_lists", "main"]
WRITTEN = {  # what an evaluation leaves, and a later one may replace
    "results.json",
    "predictions.jsonl",
    "run.trec",
    "qrels.trec",
    "report.html",
    "plots",
    "preference_results.json",
    "preference_predictions.jsonl",
}


def main(argv: Sequence[str]) -> None:
    """Check, then measure rankings or preferences."""
    options = parser().parse_args(argv)
    if options.lists and options.preferences:
        raise AlroFastError("--lists and --preferences are measured apart; give one of them")
    if not options.lists and not options.preferences:
        raise AlroFastError("nothing to measure on: give --lists PREPARED, or --preferences FILE")
    if options.limit is not None and options.limit < 1:
        raise AlroFastError(f"--limit is at least 1; given {options.limit}")
    if options.bootstrap < 0:
        raise AlroFastError(f"--bootstrap is at least 0 (no intervals); given {options.bootstrap}")
    check_options(options.method, options.shuffles, options.merge, options.beams, options.seed, options.token_budget)
    check_device(options.device)
    options.output_dir = options.output_dir or str(Path(options.adapter) / "evaluation")
    check_output(Path(options.output_dir))
    if options.preferences or answers_with_texts(run_options(options.adapter)):
        evaluate_preferences(options)
        return
    check_tasks(options.hybrid or "code", options.pairing)
    metrics.gains(np.empty(0), options.gain)  # an unknown one is an error now, not after the ranking
    evaluate_rankings(options)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = OneLineParser(
        prog="python -m alro_fast.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_ranking_options(parser)
    parser.add_argument("--lists", help="folder that alro_fast.prepare wrote")
    parser.add_argument("--preferences", nargs="+", help="preference files, in place of lists; of any data set")
    parser.add_argument("--split", default="test", help="train, valid or test (default)")
    parser.add_argument("--limit", type=int, help="only the first N lists")
    parser.add_argument("--output_dir", help="where the files go; default: `evaluation` in the adapter's folder")
    parser.add_argument("--gain", default="exp2", help="exp2: 2^rating - 1 (default); linear: the rating")
    parser.add_argument("--generate", action="store_true", help="also rank by generated text, parsed: the ordinary way")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples behind an interval (default 1000)")
    return parser


def check_output(folder: Path) -> None:
    """AlroFastError unless `folder` can be written to and holds nothing but an earlier evaluation."""
    check_writable(folder)
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in found if name not in WRITTEN and not name.startswith(".")]
    if foreign:
        raise AlroFastError(
            f"--output_dir {folder} holds {foreign[0]}, which no evaluation wrote; give another folder: files there "
            "would be replaced"
        )


if __name__ == "__main__":
    run(main)
