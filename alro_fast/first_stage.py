"""Raw ratings -> a first stage's lists with hints: `python -m alro_fast.first_stage ...`.

Fits a retriever on training likes, samples users for training lists, and gives every held-out like
the retriever's best candidates.
"""

from __future__ import annotations

from .cli import launch  # before torch: see there

if __name__ == "__main__":
    launch("first_stage")

# isort: split

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .cli import OneLineParser
from .data.first_stage.build import Hinted, prepare_hinted
from .data.first_stage.options import HintOptions
from .data.first_stage.retrieval import DEFAULTS, RETRIEVERS, RetrieverOptions
from .data.prepared import FileOptions, add_file_options
from .errors import AlroFastError
from .evaluation.plots import sampling_plot


def main(argv: Sequence[str]) -> None:
    """Download if need be, read, fit, sample, write; one line per stage."""
    arguments = parser().parse_args(argv)
    of_retriever = RetrieverOptions(**{f.name: getattr(arguments, f.name) for f in fields(RetrieverOptions)})
    names = [f.name for f in fields(HintOptions) if f.name != "of_retriever"]
    options = HintOptions(**{name: getattr(arguments, name) for name in names}, of_retriever=of_retriever)
    built, stage = prepare_hinted(FileOptions.of(arguments), options)
    try:
        sampling_plot(Path(arguments.output_dir) / "sampling.png", built)
    except AlroFastError as error:
        stage.notice(str(error))
    stage.done(f"wrote {arguments.output_dir}")
    print(table(built))


def parser() -> OneLineParser:
    """The command's options."""
    defaults = HintOptions()
    parser = OneLineParser("python -m alro_fast.first_stage", description=__doc__)
    add_file_options(parser)
    lists = parser.add_argument_group("lists")
    for name, what in (
        ("num_candidates", "candidates of a list"),
        ("num_samples", "users drawn for training lists"),
        ("like", "ratings from here on are likes"),
        ("min_likes", "a user with fewer has no targets"),
        ("dislike", "ratings up to here are dislikes"),
        ("history_length", "ratings shown of a user"),
        ("folds", "of the training ratings, for their hints"),
        ("seed", "of everything that is drawn"),
    ):
        default = getattr(defaults, name)
        lists.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help=what)
    lists.add_argument(
        "--sampling", default=defaults.sampling, metavar="PARTS",
        help=f"what decides which users are drawn: some of {defaults.sampling}; none: all alike",
    )  # fmt: skip
    lists.add_argument("--choice_lists_only", action="store_true", help="no training lists of rated items alone")
    fit = parser.add_argument_group("retriever")
    fit.add_argument(
        "--retriever", choices=RETRIEVERS, default=defaults.retriever, metavar="NAME", help=", ".join(RETRIEVERS)
    )
    for option in fields(RetrieverOptions):
        has = ", ".join(f"{name} {known[option.name]:g}" for name, known in DEFAULTS.items() if option.name in known)
        kind = int if option.name in ("factors", "iterations", "neighbours", "layers") else float
        fit.add_argument(f"--{option.name}", type=kind, metavar="N", help=f"default: {has}")
    return parser


def table(built: Hinted) -> str:
    """The retriever's figures as a Markdown table, one row per split."""
    heads = [name for name in built.retrieval["test"] if "@" in name]
    rows = [f"| {built.retriever['name']} | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for split, figures in built.retrieval.items():
        rows.append(f"| {split} | " + " | ".join(f"{figures[name]:.4f}" for name in heads) + " |")
    return "\n".join(rows)
