"""Raw ratings -> ranking lists: `python -m alro_fast.prepare --dataset ml-latest-small --output_dir lists`."""

from __future__ import annotations

from .cli import launch  # before torch: see there

if __name__ == "__main__":
    launch("prepare")

# isort: split

from collections.abc import Sequence
from dataclasses import fields

from .cli import OneLineParser, Reader, refuse_unread
from .data.partitions.build import prepare_partitions
from .data.prepared import FileOptions, add_file_options, prepare_lists
from .data.signal_table import PREPARED
from .data.signals import FOLDS, SignalOptions
from .data.windows import UNGRADED, ListOptions

_DRAWN = Reader("with --negatives 1 or more", "lists without negatives", lambda options: options.negatives)
READERS = {
    "negatives_by": _DRAWN,
    "ungraded": _DRAWN,
    "signal_folds": Reader("with --signals", "lists without signals", lambda options: options.signals is not None),
    "signals": Reader("without --partitions", "partitioned lists", lambda options: options.partitions is None),
}


def main(argv: Sequence[str]) -> None:
    """Download if need be, read, cut into lists, write; one line per stage."""
    arguments = parser().parse_args(argv)
    options = ListOptions(**{f.name: getattr(arguments, f.name) for f in fields(ListOptions)})
    refuse_unread(arguments.given, READERS, arguments)
    signals = SignalOptions.of(arguments.signals, arguments.signal_folds)
    files = FileOptions.of(arguments)
    if arguments.partitions is not None:
        prepare_partitions(files, options, arguments.partitions)
    else:
        prepare_lists(files, options, signals)


def parser() -> OneLineParser:
    """The command's options."""
    defaults = ListOptions()
    parser = OneLineParser("python -m alro_fast.prepare", description=__doc__)
    add_file_options(parser)
    cut = parser.add_argument_group("lists")
    for name, what in (
        ("history_length", "rated items before a list"),
        ("list_size", "rated candidates of a list"),
        ("min_history", "no list with fewer before it"),
        ("train_stride", "ratings from one training list to the next (default: list_size)"),
        ("max_train_lists_per_user", "keep the latest ones (default: all)"),
        ("test_lists", "test lists of a user"),
        ("negatives", "unrated candidates added to a list"),
        ("seed", "of ties, presented order and negatives"),
    ):
        cut.add_argument(f"--{name}", type=int, default=getattr(defaults, name), metavar="N", help=what)
    cut.add_argument(
        "--negatives_by",
        choices=("uniform", "popularity"),
        default=defaults.negatives_by,
        metavar="HOW",
        help="--negatives 1 or more: drawn by uniform or popularity",
    )
    cut.add_argument(
        "--ungraded",
        choices=UNGRADED,
        default=defaults.ungraded,
        metavar="HOW",
        help="--negatives 1 or more: unrated, or as_zero, for clicks and purchases, whose ratings are all one",
    )
    cut.add_argument(
        "--partitions",
        type=int,
        metavar="N",
        help="of the users, prepared one after the other in less memory; a run that ended goes on (default: at once)",
    )
    beside = parser.add_argument_group("signals")
    beside.add_argument(
        "--signals", metavar="NAMES", help=f"numbers beside every item, such as {','.join(PREPARED)} (default: none)"
    )
    beside.add_argument("--signal_folds", type=int, default=FOLDS, metavar="N", help="--signals: folds of the users")
    return parser
