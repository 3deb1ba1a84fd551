"""The options that `rank` and `evaluate` have in common."""

from __future__ import annotations

import argparse


def add_ranking_options(parser: argparse.ArgumentParser, adapter_required: bool = True) -> None:
    """What `rank` and `evaluate` have in common."""
    parser.add_argument("--adapter", required=adapter_required, help="folder that alro_fast.train wrote")
    parser.add_argument("--base_model", help="base model in place of the one the adapter names")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    parser.add_argument(
        "--method",
        help="first, expected, greedy or beam; default: first (expected for grades). A model of objective recranker: "
        "pointwise, pairwise, listwise or hybrid (default)",
    )
    parser.add_argument("--hybrid", help="constants of method hybrid: code or paper; default: as trained")
    parser.add_argument("--pairing", default="matching", help="pairs compared: matching (default: one each) or all")
    parser.add_argument("--shuffles", type=int, default=1, help="presentations of each list, merged (default 1)")
    parser.add_argument("--merge", default="mean", help="how they are merged: mean (of scores), borda or kemeny")
    parser.add_argument("--beams", type=int, default=4, help="partial orders kept by method beam (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffles")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    parser.add_argument(
        "--token_budget", type=int, default=8192, help="tokens of one forward pass; 0: lists one by one"
    )
