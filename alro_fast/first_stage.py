"""Raw ratings -> a first stage's lists with hints: `python -m alro_fast.first_stage --dataset ml-latest-small ...`.

A retriever is fitted on training likes; users are sampled for training lists; every held-out like gets a list of the
retriever's best candidates. The folder is read like one of alro_fast.prepare.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from .cli import OneLineParser, run
from .data.first_stage.build import Hinted, prepare_hinted
from .data.first_stage.options import HintOptions
from .data.first_stage.retrieval import DEFAULTS, RETRIEVERS, RetrieverOptions
from .data.prepared import FileOptions, add_file_options
from .errors import AlroFastError
from .evaluation.plots import Plots, sampling_plot


def main(argv: Sequence[str]) -> None:
    """Download if need be, read, fit, sample, write; one line per stage."""
    arguments = parse(argv)
    of_retriever = RetrieverOptions(**{f.name: getattr(arguments, f.name) for f in fields(RetrieverOptions)})
    names = [f.name for f in fields(HintOptions) if f.name != "of_retriever"]
    options = HintOptions(**{name: getattr(arguments, name) for name in names}, of_retriever=of_retriever)
    built, stage = prepare_hinted(FileOptions.of(arguments), options)
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


if __name__ == "__main__":
    run(main)
