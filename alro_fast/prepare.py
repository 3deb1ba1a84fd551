"""Raw ratings -> ranking lists: `python -m alro_fast.prepare --dataset ml-latest-small --output_dir lists`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from .cli import OneLineParser, run
from .data.prepared import FileOptions, add_file_options, prepare_lists
from .data.signal_table import SIGNALS
from .data.signals import FOLDS, SignalOptions
from .data.windows import ListOptions


def main(argv: Sequence[str]) -> None:
    """Download if need be, read, cut into lists, write; one line per stage."""
    arguments = parse(argv)
    options = ListOptions(**{f.name: getattr(arguments, f.name) for f in fields(ListOptions)})
    prepare_lists(FileOptions.of(arguments), options, SignalOptions.of(arguments.signals, arguments.signal_folds))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line -> namespace."""
    defaults = ListOptions()
    parser = OneLineParser("python -m alro_fast.prepare", description=__doc__.splitlines()[0])
    add_file_options(parser)
    cut = parser.add_argument_group("lists")
    cut.add_argument("--history_length", type=int, default=defaults.history_length, help="rated items before a list")
    cut.add_argument("--list_size", type=int, default=defaults.list_size, help="rated candidates of a list")
    cut.add_argument("--min_history", type=int, default=defaults.min_history, help="no list with fewer before it")
    cut.add_argument("--train_stride", type=int, help="ratings from one training list to the next (default: list_size)")
    cut.add_argument("--max_train_lists_per_user", type=int, help="keep the latest ones (default: all)")
    cut.add_argument("--test_lists", type=int, default=defaults.test_lists, help="test lists of a user (default 1)")
    cut.add_argument("--negatives", type=int, default=defaults.negatives, help="unrated candidates added to a list")
    cut.add_argument("--negatives_by", choices=("uniform", "popularity"), default=defaults.negatives_by)
    cut.add_argument("--seed", type=int, default=defaults.seed, help="of ties, presented order and negatives")
    beside = parser.add_argument_group("signals")
    beside.add_argument("--signals", help=f"numbers beside every item, such as {','.join(SIGNALS)}; default: none")
    beside.add_argument("--signal_folds", type=int, default=FOLDS, help=f"of the users (default {FOLDS})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
