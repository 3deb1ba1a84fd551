"""Order the candidates of JSON lists with a tuned model: `python -m alro_fast.rank --adapter DIR [FILE]`.

Reads one JSON list, an array of them, or JSON lines, from FILE or standard input:

    {"history": [{"title": "Heat", "category": "Crime", "rating": 4.5}],
     "candidates": [{"id": 7, "title": "Casino", "category": "Crime"},
                    {"title": "Clueless"}]}

`id` and `category` may be left out, `history` too; `list_id` is passed through. For models tuned with signals, an item
may have its `average` rating and the `count` of its ratings, a candidate its predicted rating as `hint`, and `near`. A
candidate's `rating`, and the list's `user` or `user_id`, are not read.
Other keys are an error. `--lists DIR` ranks the lists of a prepared folder instead. Prints a JSON line per list, best
candidate first, while later lists are still coming:
{"list_id": ..., "ranking": [{"rank": 1, "id": 7, "title": "Casino", "score": -0.4}, ...]}.
A list that cannot be ranked ends the command, of a file before anything is printed; with `--on_error skip` it costs a
line on stderr, and exit status 1 in the end.
"""

from __future__ import annotations

from .cli import launch  # before torch: see there

if __name__ == "__main__":
    launch("rank")

# isort: split

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .cli import OneLineParser, Reader, refuse_unread
from .errors import AlroFastError
from .processes.dealing import dealing
from .processes.launch import is_first
from .ranking.documents import catalogue, check_top_k, document_of, parse_list
from .ranking.fusion import Fusion
from .ranking.options import add_model_options, add_ranking_options, check_model_options, settled_options
from .ranking.streams import Asked, Complaints, Parse, announced, answers, begun, in_catalogue, read_lists

if TYPE_CHECKING:
    from .data.records import RankingList
    from .ranking.orders import Ranking

_WITH_LISTS = Reader("with --lists", "a file of lists", lambda options: options.lists is not None)
PREPARED = {"split": _WITH_LISTS, "limit": _WITH_LISTS}


def main(argv: Sequence[str]) -> None:
    """Check, load the model, and print rankings as lists come."""
    options = parser().parse_args(argv)
    check_top_k(options.top_k)
    complaints = Complaints(options.on_error)
    check_model_options(options)
    how = asdict(settled_options(options))
    fusion = Fusion.load(options.adapter) if options.fuse else None
    source: Iterator[Asked] = iter(())
    if is_first():  # of several processes, the only one that reads
        source = begun(asked_of(options, complaints, parse_list if fusion is None else fusion.parse_list))
    from .modeling.quiet import quiet_libraries  # torch takes seconds to import: not before the input is good
    from .ranking.ranker import check_device, loaded_ranker

    with dealing(options.device) as options.device:
        check_device(options.device)
        quiet_libraries()
        ranker = loaded_ranker(options)
        if ranker.prompts.identifiers == "items":
            source = in_catalogue(source, catalogue(options.adapter), complaints)
        if how["method"] not in ("pointwise", "pairwise"):
            source = announced(source, ranker.prompts.max_candidates)

        def rank(lists: Sequence[RankingList]) -> Iterable[Ranking]:
            rankings = ranker.stream(lists, **how)
            return rankings if fusion is None else fusion.rank_all(lists, rankings)

        for line in answers(source, rank, complaints, options.top_k):
            print(line, flush=True)
    complaints.settle()


def asked_of(options: argparse.Namespace, complaints: Complaints, parse: Parse) -> Iterator[Asked]:
    """What is to be ranked: a file's lists, or those of a prepared folder."""
    refuse_unread(options.given, PREPARED, options)
    if options.lists is None:
        return read_lists(options.file, complaints, parse)
    if options.file != "-":
        raise AlroFastError(f"both a file, {options.file}, and --lists {options.lists} are given; leave one out")
    if options.limit is not None and options.limit < 1:
        raise AlroFastError(f"--limit is at least 1; given {options.limit}")
    if options.split not in ("train", "valid", "test"):
        raise AlroFastError(f"--split {options.split!r}: expected train, valid or test")
    from .data.lists import open_prepared  # polars

    lists = open_prepared(options.lists).lists(options.split)
    if not len(lists):
        raise AlroFastError(f"{options.lists} holds no {options.split} lists; choose another --split")
    wanted = (lists[i] for i in range(min(options.limit or len(lists), len(lists))))
    return (Asked(document, parse(document, n)) for n, document in enumerate(map(document_of, wanted), start=1))


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.rank", description=__doc__)
    parser.add_argument("file", nargs="?", default="-", help="JSON or JSON lines; -: standard input (default)")
    parser.add_argument("--lists", metavar="DIR", help="rank the lists of a prepared folder in place of a file")
    parser.add_argument("--split", default="test", metavar="NAME", help="with --lists: train, valid or test")
    parser.add_argument("--limit", type=int, metavar="N", help="with --lists: the first N")
    parser.add_argument(
        "--on_error", default="stop", metavar="HOW", help="stop at a list that cannot be ranked, or skip it with a line"
    )
    parser.add_argument("--top_k", type=int, metavar="K", help="print only the best K")
    add_model_options(parser)
    add_ranking_options(parser)
    return parser
