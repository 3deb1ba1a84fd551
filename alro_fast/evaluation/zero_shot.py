"""A base model as it is, without an adapter: how it ranks before any tuning."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..cli import Reader, refuse_unread
from ..data.lists import PreparedData
from ..errors import AlroFastError
from ..modeling.loading import base_path, load_base, load_tokenizer
from ..prompts import PromptBuilder
from ..ranking.ranker import Ranker

OPTIONS = {"template": "movies", "identifiers": "letters", "answer": "ranking"}  # of a base alone, and their defaults


OF_RUN = Reader("with --adapter", "--model_name_or_path, a base as it is", lambda options: options.adapter is not None)
OF_BASE = Reader(
    "with --model_name_or_path", "--adapter, whose folder records it", lambda options: options.adapter is None
)
READERS = {"preferences": OF_RUN, "base_model": OF_RUN, "fuse": OF_RUN, **dict.fromkeys(OPTIONS, OF_BASE)}


def add_zero_shot_options(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` needs to know of a base that no run has written prompt settings for."""
    group = parser.add_argument_group("a base model without an adapter")
    group.add_argument(
        "--model_name_or_path", metavar="NAME", help="folder or hub id of a base, in place of --adapter; or demo"
    )
    template, identifiers, answer = OPTIONS.values()
    group.add_argument(
        "--template", default=template, metavar="NAME", help="prompt template: the name of a ready one, or a YAML file"
    )
    group.add_argument(
        "--identifiers", choices=("letters", "items"), default=identifiers, help="how candidates are named"
    )
    group.add_argument("--answer", choices=("ranking", "ratings"), default=answer, help="form of the answer")


def check_zero_shot(options: argparse.Namespace) -> None:
    """AlroFastError unless there is either an adapter or a base, and all that is given is read of it."""
    if (options.adapter is None) == (options.model_name_or_path is None):
        raise AlroFastError(
            "nothing to measure, or two things: give --adapter DIR for a tuned model, or --model_name_or_path BASE for "
            "a base as it is"
        )
    refuse_unread(options.given, READERS, options)


def zero_shot_ranker(options: argparse.Namespace, prepared: PreparedData) -> Ranker:
    """The base of `--model_name_or_path` with the prompts that its options ask for."""
    name, trust = options.model_name_or_path, options.trust_remote_code
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(name, trust)
    prompts = PromptBuilder(tokenizer, options.template, identifiers=options.identifiers, items=prepared.items)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = load_base(base_path(name), dtype, trust, place=f"--model_name_or_path {name}")
    return Ranker(
        model.to(device).eval(), tokenizer, prompts, answer=options.answer, token_budget=options.token_budget,
        share=options.share,
    )  # fmt: skip
