"""The options of an evaluation, and what is checked of them before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..cli import Reader, refuse_unread
from ..errors import AlroFastError
from ..objectives.base import TEXTS, learned_answers
from ..ranking.options import READERS, RankingOptions, check_model_options, settled_options
from ..run_folder import LEFT_BY_AN_EVALUATION, check_writable, run_options
from . import metrics
from .baselines import check_which
from .zero_shot import check_zero_shot


class Measured(NamedTuple):
    """What an evaluation reads its options by; answer: what the model has learned, of objectives.base.LEARNED."""

    lists: bool  # of --lists, not --preferences
    rankings: bool  # not preferences
    answer: str


OF_RANKINGS = Reader("where rankings are measured", "a measurement of preferences", lambda what: what.rankings)
LISTS_READ = {
    **dict.fromkeys(("method", *READERS, "fuse", "gain", "baselines", "generate"), OF_RANKINGS),
    "split": Reader("with --lists", "--preferences", lambda what: what.lists),
}
ANSWERS_READ = {
    "generate": Reader(
        "for models that answer with an order",
        "a model that answers with grades",
        lambda what: what.answer != "ratings",
    )
}


def check_evaluation(options: argparse.Namespace) -> RankingOptions | None:
    """How the model ranks, or None where preferences are measured; `output_dir` is filled in.

    AlroFastError for a value nobody takes, an option that is not read, or a folder that cannot be written: no weights
    are read for it.
    """
    check_zero_shot(options)
    if options.lists and options.preferences:
        raise AlroFastError("--lists and --preferences are measured apart; give one of them")
    if not options.lists and not options.preferences:
        raise AlroFastError("nothing to measure on: give --lists PREPARED, or --preferences FILE")
    if options.limit is not None and options.limit < 1:
        raise AlroFastError(f"--limit is at least 1; given {options.limit}")
    if options.bootstrap < 0:
        raise AlroFastError(f"--bootstrap is at least 0 (no intervals); given {options.bootstrap}")
    if options.bootstrap > 100_000:
        raise AlroFastError(f"--bootstrap is at most 100,000; given {options.bootstrap}")
    metrics.gains(np.empty(0), options.gain)  # an unknown one is an error now, not after the ranking
    check_which(options.baselines)
    check_model_options(options)
    base = options.adapter is None
    learned = options.answer if base else learned_answers(run_options(options.adapter))
    ranks = not options.preferences and learned not in TEXTS
    for readers in (LISTS_READ, ANSWERS_READ):
        refuse_unread(options.given, readers, Measured(bool(options.lists), ranks, learned))
    answer = learned if base else None
    how = settled_options(options, answer=answer, generate=options.generate) if ranks else None
    default = "out/zero-shot" if base else str(Path(options.adapter) / "evaluation")
    options.output_dir = options.output_dir or default
    check_output(Path(options.output_dir))
    return how


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where that is written."""
    parser.add_argument("--lists", metavar="DIR", help="folder that alro_fast.prepare wrote")
    parser.add_argument(
        "--preferences", nargs="+", metavar="FILE", help="preference files, in place of lists; of any data set"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N lists, or rows of a preference file")
    parser.add_argument(
        "--output_dir", metavar="DIR", help="where the files go (default: evaluation in --adapter, or out/zero-shot)"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples of an interval; 0: none")
    lists = parser.add_argument_group("lists")
    lists.add_argument("--split", default="test", metavar="NAME", help="train, valid or test")
    lists.add_argument(
        "--gain", default="exp2", metavar="NAME", help="graded lists: exp2 (2^rating - 1) or linear (the rating)"
    )
    lists.add_argument(
        "--baselines",
        default="cheap",
        metavar="WHICH",
        help="cheap (fitted in a few seconds), all (LambdaMART, SASRec too) or none (random alone)",
    )
    lists.add_argument("--generate", action="store_true", help="also rank by generated text, parsed: the ordinary way")


def check_output(folder: Path) -> None:
    """AlroFastError unless `folder` can be written to and holds nothing but an earlier evaluation."""
    check_writable(folder)
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in found if name not in LEFT_BY_AN_EVALUATION and not name.startswith(".")]
    if foreign:
        raise AlroFastError(
            f"--output_dir {folder} holds {foreign[0]}, which no evaluation wrote; give another folder: files there "
            "would be replaced"
        )
