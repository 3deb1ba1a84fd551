"""Order the candidates of JSON lists with a tuned model: `python -m alro_fast.rank --adapter DIR [FILE]`.

Reads one JSON list, an array of them, or JSON lines, from FILE or standard input:

    {"history": [{"title": "Heat", "category": "Crime", "rating": 4.5}],
     "candidates": [{"id": 7, "title": "Casino", "category": "Crime"}, {"title": "Clueless"}]}

`id` and `category` may be left out, `history` too; `list_id` is passed through. For models tuned with signals, an item
may have its `average` rating and the `count` of its ratings, a candidate its predicted rating as `hint`, and `near`. A
candidate's `rating`, and the list's `user` or `user_id`, are not read.
Other keys are an error. `--lists DIR` ranks the lists of a prepared folder instead. Prints a JSON line per list, best
candidate first: {"list_id": ..., "ranking": [{"rank": 1, "id": 7, "title": "Casino", "score": -0.4}, ...]}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .cli import OneLineParser, Reader, refuse_unread, run
from .errors import AlroFastError
from .ranking.documents import answer, catalogue, check_top_k, document_of, numbered, parse_list, read_documents
from .ranking.options import add_model_options, add_ranking_options, check_model_options, settled_options

_WITH_LISTS = Reader("with --lists", "a file of lists", lambda options: options.lists is not None)
PREPARED = {"split": _WITH_LISTS, "limit": _WITH_LISTS}


def main(argv: Sequence[str]) -> None:
    """Read and check everything, load the model, print rankings as they come."""
    options = parser().parse_args(argv)
    check_top_k(options.top_k)
    documents = documents_of(options)
    lists = [parse_list(document, number) for number, document in enumerate(documents, start=1)]
    check_model_options(options)
    how = settled_options(options)
    from .modeling.quiet import quiet_libraries  # torch takes seconds to import: not before the input is good
    from .ranking.ranker import Ranker, check_device

    check_device(options.device)
    quiet_libraries()
    ranker = Ranker.load(
        options.adapter,
        device=options.device,
        base_model=options.base_model,
        trust_remote_code=options.trust_remote_code,
        token_budget=options.token_budget,
    )
    if ranker.prompts.identifiers == "items":
        items = catalogue(options.adapter)
        lists = [numbered(*pair, items) for pair in zip(lists, documents, strict=True)]
    most = ranker.prompts.max_candidates
    long = sum(len(entry.candidates) > most for entry in lists)
    if long and how.method not in ("pointwise", "pairwise"):
        print(f"{long} lists have more than {most} candidates: ranked by sliding windows of {most}", file=sys.stderr)
    for document, ranking in zip(documents, ranker.stream(lists, **asdict(how)), strict=True):
        print(json.dumps(answer(document, ranking, options.top_k), ensure_ascii=False), flush=True)


def documents_of(options: argparse.Namespace) -> list[Any]:
    """What is to be ranked: a file's documents, or the lists of a prepared folder as such."""
    refuse_unread(options.given, PREPARED, options)
    if options.lists is None:
        return read_documents(options.file)
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
    return [document_of(lists[i]) for i in range(min(options.limit or len(lists), len(lists)))]


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.rank", description=__doc__)
    parser.add_argument("file", nargs="?", default="-", help="JSON or JSON lines; -: standard input (default)")
    parser.add_argument("--lists", metavar="DIR", help="rank the lists of a prepared folder in place of a file")
    parser.add_argument("--split", default="test", metavar="NAME", help="with --lists: train, valid or test")
    parser.add_argument("--limit", type=int, metavar="N", help="with --lists: the first N")
    parser.add_argument("--top_k", type=int, metavar="K", help="print only the best K")
    add_model_options(parser)
    add_ranking_options(parser)
    return parser


if __name__ == "__main__":
    run(main)
