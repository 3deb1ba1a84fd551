"""A model's rankings, tuned or as it is, beside the baselines', on the lists of a prepared folder."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import resource
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cli import Reader, refuse_unread
from ..data.lists import PreparedData, open_prepared
from ..data.records import RankingList
from ..errors import AlroFastError
from ..processes.dealing import place
from ..processes.launch import is_first
from ..ranking.fusion import Fusion, check_signals
from ..ranking.generation import generate_and_parse
from ..ranking.options import TASK_METHODS, RankingOptions, Settled
from ..ranking.orders import Ranking
from ..ranking.ranker import Ranker, loaded_ranker
from ..ranking.task_generation import generate_tasks
from ..texts import read_json
from . import metrics
from .baselines import baseline_scores
from .report import report_line
from .targets import evaluate_rankers, has_targets, save_measurement
from .zero_shot import zero_shot_ranker

GRADED = Reader("for graded lists", "a first stage's lists, of one target each", lambda targets: not targets)


def evaluate_rankings(options: argparse.Namespace, how: RankingOptions) -> None:
    """Load, rank with and without the adapter, compare, write; options: those of `alro_fast.evaluate`, checked."""
    prepared = open_prepared(options.lists)
    split = prepared.lists(options.split)
    if not len(split):
        raise AlroFastError(f"{options.lists} holds no {options.split} lists; choose another --split")
    targets = has_targets(prepared, options.split)
    refuse_unread(options.given, {"gain": GRADED}, targets)
    fusion = Fusion.load(options.adapter) if options.fuse else None
    if fusion is not None:
        check_signals(fusion, split.signals, f"{options.lists}, split {options.split},")
    lists = [split[i] for i in range(min(options.limit or len(split), len(split)))]
    if not targets and all(one.all_equal for one in lists):
        raise AlroFastError(nothing_to_rank(options, bool(split.all_equal.all())))
    if options.adapter is None:
        ranker = zero_shot_ranker(options, prepared)
    else:
        ranker = loaded_ranker(options)
    if options.adapter is not None and ranker.prompts.identifiers == "items":
        check_catalogue(Path(options.adapter), prepared)
    if missing := unknown_signals(ranker.prompts, split.signals):
        print(f"note: {options.lists} has no {', '.join(missing)}, which the model was tuned to read: shown as unknown")
    if fusion is not None and options.split == "valid":
        print("note: --fuse was fitted on validation lists: on them, the row `fused` flatters")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    rankings: dict[str, list[Ranking]] = {}
    seconds: dict[str, float] = {}
    if hasattr(ranker.model, "disable_adapter"):
        with ranker.untuned():
            rankings["untuned"], seconds["untuned"] = timed(ranker, lists, how)
    if ranker.answer == "tasks" and options.method is None:  # the hybrid, and a row for each of its tasks
        for task in TASK_METHODS[:-1]:
            rankings[task], seconds[task] = timed(ranker, lists, dataclasses.replace(how, method=task))
    judged = "untuned" if options.adapter is None else "tuned"
    rankings[judged], seconds[judged] = timed(ranker, lists, how)
    if fusion is not None:
        rankings["fused"] = fusion.rank_all(lists, rankings[judged])
    scores = {name: [ranking.scores for ranking in each] for name, each in rankings.items()}
    notes = {"device": str(ranker.device), "peak_memory_gib": peak_memory(ranker.device) / 2**30}
    if place().processes > 1:
        notes["processes"] = place().processes  # device and memory are the first one's
    if not Settled(how.method, ranker.answer).decodes:
        notes["share"] = options.share
    if options.generate:
        start = time.perf_counter()
        if ranker.answer == "tasks":
            generated = generate_tasks(
                ranker, lists, hybrid=how.hybrid, pairing=how.pairing, pair_orders=how.pair_orders, seed=how.seed
            )
        else:
            generated = generate_and_parse(ranker, lists)
        seconds["generate"] = time.perf_counter() - start
        scores["generate"] = generated.scores
        notes["generate_invalid_rate"] = generated.invalid_rate
    if not is_first():
        return
    results = evaluate_rankers(
        lists,
        baseline_scores(prepared, lists, options.baselines, split=options.split) | scores,
        targets=targets,
        prepared=prepared,
        split=options.split,
        gain=options.gain,
        bootstrap=options.bootstrap,
    )
    results = dataclasses.replace(
        results,
        seconds=seconds,
        sensitivity={name: order_sensitivity(each) for name, each in rankings.items()} if options.shuffles > 1 else {},
        about=notes,
    ).noting(rankings=how.described(), **({} if fusion is None else {"fused": fusion.described()}))
    results = save_measurement(folder, results, lists, rankings, targets=targets, prepared=prepared)
    print(results.table())
    if options.generate:
        wrong = "were no permutation of their candidates" if ranker.answer == "ranking" else "could not be read in full"
        print(f"generate: {generated.invalid_rate:.1%} of the answers {wrong}")
    trec = ", run.trec, qrels.trec" if (folder / "qrels.trec").is_file() else ""
    print(f"written to {folder}: results.json, predictions.jsonl{trec}")
    print(report_line(folder, options.adapter))


def nothing_to_rank(options: argparse.Namespace, whole: bool) -> str:
    """The error of lists without two ratings; whole: all of the split's are such, not only the first --limit."""
    which = f"no {options.split} list" if whole else f"none of the first {options.limit} {options.split} lists"
    told = f"{options.lists}: {which} has candidates with different ratings, so there is nothing to measure; "
    if not whole:
        return told + "give a larger --limit, or none"
    return (
        told + "where ratings are all one, as of clicks and purchases, prepare it with --negatives N --ungraded as_zero"
    )


def unknown_signals(prompts: Any, carried: Collection[str]) -> list[str]:
    """Signals that tokens of the prompts stand for, and lists do not carry."""
    vocabulary = getattr(prompts, "vocabulary", None)
    return [] if vocabulary is None else [name for name in vocabulary.names if name not in carried]


def check_catalogue(adapter: Path, prepared: PreparedData) -> None:
    """AlroFastError unless the lists' items are those the model was trained on: its tokens are numbers of items."""
    path = adapter / "data_manifest.json"
    if not path.is_file():
        raise AlroFastError(
            f"{adapter} names items by tokens of their own, but its data_manifest.json, which says what items, is gone"
        )
    try:
        trained = read_json(path)["files"]["items.parquet"]["sha256"]
    except (LookupError, TypeError):
        raise AlroFastError(f"{path} is damaged: it does not say what the items were") from None
    if prepared.manifest["files"]["items.parquet"]["sha256"] != trained:
        raise AlroFastError(
            f"{adapter} names items by tokens of their own, and {prepared.path} holds other items than it was trained "
            "on; give lists of the same catalogue"
        )


def timed(ranker: Ranker, lists: Sequence[RankingList], how: RankingOptions) -> tuple[list[Ranking], float]:
    """Rankings, and the seconds they took: prompts, forward passes and sorting, no loading."""
    start = time.perf_counter()
    rankings = ranker.rank(lists, **dataclasses.asdict(how))
    return rankings, time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a CUDA device, or that this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def order_sensitivity(rankings: Sequence[Ranking]) -> float:
    """Mean Kendall tau between the presentations of a list, over all pairs and lists; 1: order never matters.

    NaN when no list was presented twice.
    """
    most = max((len(ranking.presentation_scores) for ranking in rankings), default=0)
    taus = []
    for first, second in itertools.combinations(range(most), 2):
        both = [ranking.presentation_scores[[first, second]] for ranking in rankings if len(ranking.presented) > second]
        taus.append(metrics.kendall_tau(*(metrics.pad([pair[side] for pair in both]) for side in (0, 1))))
    values = np.concatenate(taus) if taus else np.array([])
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
