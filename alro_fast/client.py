"""Rank with a served model: `python -m alro_fast.client --adapter DIR --url http://localhost:8000 --model NAME [FILE]`.

Asks an OpenAI-compatible completions server (docs/serving.md has the commands for vLLM) for one token per presented
list, with the log-probabilities of the identifiers; renormalised over the candidates they are the scores of `Ranker`'s
method `first`. Prompts travel as token ids, so that nobody re-tokenises them. Input and output are alro_fast.rank's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace

from .cli import OneLineParser, refuse_unread, run
from .errors import AlroFastError
from .ranking.documents import answer, check_top_k, parse_list, read_documents
from .ranking.options import READERS, RankingOptions, add_presentation_options
from .ranking.served import RankingClient

API_KEY = "ALRO_FAST_API_KEY"  # of the environment: what stands in a command line, others can read


def main(argv: Sequence[str]) -> None:
    """Read and check everything, ask the server, print rankings as they come."""
    options = parser().parse_args(argv)
    check_top_k(options.top_k)
    how = replace(RankingOptions.of(options), method="first")
    refuse_unread(options.given, READERS | {"seed": READERS["merge"]}, how)
    documents = read_documents(options.file)
    lists = [parse_list(document, number) for number, document in enumerate(documents, start=1)]
    client = RankingClient.load(
        options.adapter, options.url, options.model, api_key=options.api_key or os.environ.get(API_KEY),
        parallel=options.parallel, timeout=options.timeout,
    )  # fmt: skip
    if client.prompts.identifiers != "letters":
        raise AlroFastError(f"{options.adapter} names items by tokens added to the model, which servers do not hold")
    rankings = client.stream(lists, shuffles=how.shuffles, merge_by=how.merge_by, seed=how.seed)
    for document, ranking in zip(documents, rankings, strict=True):
        print(json.dumps(answer(document, ranking, options.top_k), ensure_ascii=False), flush=True)


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.client", description=__doc__)
    parser.add_argument("file", nargs="?", default="-", help="JSON or JSON lines; -: standard input (default)")
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="folder that alro_fast.train wrote, for its prompt format"
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="the adapter's name on the server")
    parser.add_argument("--top_k", type=int, metavar="K", help="print only the best K")
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://localhost:8000", help="where it listens")
    server.add_argument("--api_key", metavar="KEY", help=f"sent as a bearer token (default: ${API_KEY}, if set)")
    server.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds for a whole answer of the server")
    server.add_argument("--parallel", type=int, default=16, metavar="N", help="requests in flight at once")
    add_presentation_options(parser.add_argument_group("rankings"))
    return parser


if __name__ == "__main__":
    run(main)
