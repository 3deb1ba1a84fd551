"""Order the candidates of JSON lists with a tuned model: `python -m alro_fast.rank --adapter DIR [FILE]`.

Reads one JSON list, an array of them, or JSON lines, from FILE or standard input:

    {"history": [{"title": "Heat", "category": "Crime", "rating": 4.5}],
     "candidates": [{"id": 7, "title": "Casino", "category": "Crime"}, {"title": "Clueless"}]}

`id` and `category` may be left out, `history` too; `list_id` is passed through. For models tuned with signals, an item
may have its `average` rating and the `count` of its ratings, a candidate its predicted rating as `hint`, and `near`. A
candidate's `rating`, and the list's `user` or `user_id`, are not read.
Other keys are an error. Prints a JSON line per list, best
candidate first: {"list_id": ..., "ranking": [{"rank": 1, "id": 7, "title": "Casino", "score": -0.4}, ...]}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from .cli import OneLineParser, run
from .ranking.documents import answer, catalogue, check_top_k, keys_of, numbered, parse_list, read_documents
from .ranking.fusion import Fusion, check_signals
from .ranking.options import add_model_options, add_ranking_options, check_model_options, settled_options


def main(argv: Sequence[str]) -> None:
    """Read and check everything, load the model, print rankings as they come."""
    options = parser().parse_args(argv)
    check_top_k(options.top_k)
    documents = read_documents(options.file)
    lists = [parse_list(document, number) for number, document in enumerate(documents, start=1)]
    check_model_options(options)
    how = settled_options(options)
    fusion = Fusion.load(options.adapter) if options.fuse else None
    if fusion is not None:
        for number, document in enumerate(documents, start=1):
            check_signals(fusion, keys_of(document), f"list {number}")
    from .ranking.ranker import Ranker, check_device  # torch takes seconds to import: not before the input is good

    check_device(options.device)
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
    for document, entry, ranking in zip(documents, lists, ranker.stream(lists, **asdict(how)), strict=True):
        if fusion is not None:
            ranking = fusion.rank(entry, ranking)
        print(json.dumps(answer(document, ranking, options.top_k), ensure_ascii=False), flush=True)


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.rank", description=__doc__)
    parser.add_argument("file", nargs="?", default="-", help="JSON or JSON lines; -: standard input (default)")
    parser.add_argument("--top_k", type=int, metavar="K", help="print only the best K")
    add_model_options(parser)
    add_ranking_options(parser)
    return parser


if __name__ == "__main__":
    run(main)
