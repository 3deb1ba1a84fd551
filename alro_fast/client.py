"""Rank with a served model: `python -m alro_fast.client --adapter DIR --url http://localhost:8000 --model NAME [FILE]`.

Asks an OpenAI-compatible completions server (docs/serving.md has the commands for vLLM) for one token per presented
list, with the log-probabilities of the identifiers; renormalised over the candidates they are the scores of `Ranker`'s
method `first`. Prompts travel as token ids, so that nobody re-tokenises them. Input and output are alro_fast.rank's.
"""

from __future__ import annotations

from .cli import launch  # before torch: see there

if __name__ == "__main__":
    launch("client")

# isort: split

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from .cli import OneLineParser, refuse_unread
from .errors import AlroFastError
from .ranking.documents import check_top_k
from .ranking.options import READERS, RankingOptions, add_presentation_options
from .ranking.served import RankingClient
from .ranking.streams import Complaints, answers, begun, read_lists

API_KEY = "ALRO_FAST_API_KEY"  # of the environment: what stands in a command line, others can read


def main(argv: Sequence[str]) -> None:
    """Read and check everything, ask the server, print rankings as they come."""
    options = parser().parse_args(argv)
    check_top_k(options.top_k)
    how = replace(RankingOptions.of(options), method="first")
    refuse_unread(options.given, READERS | {"seed": READERS["merge"]}, how)
    complaints = Complaints(options.on_error)
    source = begun(read_lists(options.file, complaints))
    client = RankingClient.load(
        options.adapter, options.url, options.model, api_key=options.api_key or os.environ.get(API_KEY),
        parallel=options.parallel, timeout=options.timeout,
    )  # fmt: skip
    if client.prompts.identifiers != "letters":
        raise AlroFastError(f"{options.adapter} names items by tokens added to the model, which servers do not hold")
    ask = partial(client.stream, shuffles=how.shuffles, merge_by=how.merge_by, seed=how.seed)
    for line in answers(source, ask, complaints, options.top_k):
        print(line, flush=True)
    complaints.settle()


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.client", description=__doc__)
    parser.add_argument("file", nargs="?", default="-", help="JSON or JSON lines; -: standard input (default)")
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="folder that alro_fast.train wrote, for its prompt format"
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="the adapter's name on the server")
    parser.add_argument(
        "--on_error", default="stop", metavar="HOW", help="stop at a list that cannot be ranked, or skip it with a line"
    )
    parser.add_argument("--top_k", type=int, metavar="K", help="print only the best K")
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://localhost:8000", help="where it listens")
    server.add_argument("--api_key", metavar="KEY", help=f"sent as a bearer token (default: ${API_KEY}, if set)")
    server.add_argument(
        "--timeout", type=float, default=60, metavar="S", help="seconds for a whole answer of the server"
    )
    server.add_argument("--parallel", type=int, default=16, metavar="N", help="requests in flight at once")
    add_presentation_options(parser.add_argument_group("rankings"))
    return parser
