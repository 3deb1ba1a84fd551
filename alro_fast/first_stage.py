"""Raw ratings -> a first stage's lists with hints: `python -m alro_fast.first_stage --dataset ml-latest-small ...`.

A retriever is fitted on training likes; users are sampled for training lists; every held-out like gets a list of the
retriever's best candidates. The folder is read like one of alro_fast.prepare.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from .cli import OneLineParser, run
from .data.first_stage.build import EVAL_RULE, HINT_RULE, TRAIN_RULE, Hinted, HintOptions, build_hinted, sample_figures
from .data.first_stage.likes import LIKE_SPLIT_RULE
from .data.lists import seen_frame, write_prepared
from .data.first_stage.retrieval import DEFAULTS, RETRIEVERS, RetrieverOptions, need_libraries
from .data.windows import TIE_RULE
from .errors import AlroFastError
from .evaluation.plots import Plots
from .prepare import Stages, add_file_options, check_output, origin, rating_values, read_files, recorded_file_options


def main(argv: Sequence[str]) -> None:
    """Download if need be, read, fit, sample, write; one line per stage."""
    arguments = parse(argv)
    of_retriever = RetrieverOptions(**{f.name: getattr(arguments, f.name) for f in fields(RetrieverOptions)})
    names = [f.name for f in fields(HintOptions) if f.name != "of_retriever"]
    options = HintOptions(**{name: getattr(arguments, name) for name in names}, of_retriever=of_retriever)
    need_libraries()
    recorded = asdict(options) | recorded_file_options(arguments)
    check_output(arguments.output_dir, {"dataset": arguments.dataset, "options": recorded}, arguments)

    stage = Stages()
    interactions = read_files(arguments, stage)
    built = build_hinted(interactions, options, stage.notice, stage.done)
    lists = ", ".join(f"{split} {count:,}" for split, count in built.counts["lists"].items())
    stage.done(f"made lists: {lists}")
    manifest = {
        **origin(arguments.dataset, interactions),
        "options": recorded,
        "seed": options.seed,
        "tie_rule": TIE_RULE,
        "split_rule": LIKE_SPLIT_RULE,
        "train_rule": TRAIN_RULE,
        "order_rule": EVAL_RULE,
        "hint_rule": HINT_RULE,
        "time_unit": interactions.time_unit,
        "rating_values": rating_values(interactions.rating),
        "counts": interactions.counts | built.counts,
        "retriever": built.retriever,
        "retrieval": built.retrieval,
        "hint_rmse": built.hint_error,
        "sampling": sample_figures(built),
    }
    seen = seen_frame(interactions.user, interactions.item, interactions.user_ids)
    write_prepared(arguments.output_dir, built.items, built.lists, manifest, built.targets, seen)
    try:
        Plots(arguments.output_dir).draw("sampling", "likes of all users and of the sampled", sampling_plot, built)
    except AlroFastError as error:
        stage.notice(str(error))
    stage.done(f"wrote {arguments.output_dir}")
    print(table(built))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line -> namespace."""
    defaults = HintOptions()
    parser = OneLineParser("python -m alro_fast.first_stage", description=__doc__.splitlines()[0])
    add_file_options(parser)
    lists = parser.add_argument_group("lists")
    lists.add_argument("--num_candidates", type=int, default=defaults.num_candidates, help="candidates of a list")
    lists.add_argument("--num_samples", type=int, default=defaults.num_samples, help="users drawn for training lists")
    lists.add_argument("--like", type=float, default=defaults.like, help="ratings from here on are likes")
    lists.add_argument("--min_likes", type=int, default=defaults.min_likes, help="a user with fewer has no targets")
    lists.add_argument("--dislike", type=float, default=defaults.dislike, help="ratings up to here are dislikes")
    lists.add_argument("--history_length", type=int, default=defaults.history_length, help="ratings shown of a user")
    lists.add_argument("--folds", type=int, default=defaults.folds, help="of the training ratings, for their hints")
    lists.add_argument(
        "--choice_lists_only", action="store_true", help="no training lists of rated items alone beside the others"
    )
    lists.add_argument("--seed", type=int, default=defaults.seed, help="of everything that is drawn")
    fit = parser.add_argument_group("retriever")
    fit.add_argument("--retriever", choices=RETRIEVERS, default=defaults.retriever)
    for option in fields(RetrieverOptions):
        has = ", ".join(f"{name} {known[option.name]:g}" for name, known in DEFAULTS.items() if option.name in known)
        kind = int if option.name in ("factors", "iterations", "neighbours") else float
        fit.add_argument(f"--{option.name}", type=kind, help=f"default: {has}")
    return parser.parse_args(argv)


def table(built: Hinted) -> str:
    """The retriever's figures as a Markdown table, one row per split."""
    heads = [name for name in built.retrieval["test"] if "@" in name]
    rows = [f"| {built.retriever['name']} | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for split, figures in built.retrieval.items():
        rows.append(f"| {split} | " + " | ".join(f"{figures[name]:.4f}" for name in heads) + " |")
    return "\n".join(rows)


def sampling_plot(axes: Any, built: Hinted) -> bool:
    """Share of users by number of likes: all that can be drawn, the pool, and the users drawn."""
    likes = built.like_count
    everyone = np.flatnonzero(built.sample.cluster >= 0)
    pool = np.repeat(np.arange(len(likes)), built.sample.pool)
    bins = np.geomspace(likes[everyone].min(), likes[everyone].max() + 1, 25)
    groups = {"all users": everyone, "pool": pool, "drawn": built.sample.drawn}
    for (label, users), colour in zip(groups.items(), ("#9aa0a6", "#5b8fd0", "#1a9850"), strict=True):
        weights = np.full(len(users), 1 / len(users))
        axes.hist(likes[users], bins=bins, weights=weights, histtype="step", linewidth=1.8, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("training likes of a user")
    axes.set_ylabel("share of users")
    axes.legend(frameon=False, fontsize=9)
    return True


if __name__ == "__main__":
    run(main)
