"""How lists are ranked, as one value; and the options of the commands that rank with the model of a run's folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ..cli import Reader, refuse_unread
from ..errors import AlroFastError
from ..run_folder import ADAPTER_CONFIG, run_options
from .hybrid import HYBRIDS, PAIR_ORDERS, PAIRINGS, SPELLED, constants_of, pairs_of, ways_of
from .orders import MERGES, check_presentations

METHODS = ("first", "expected", "greedy", "beam")
TASK_METHODS = ("pointwise", "pairwise", "listwise", "hybrid")
RANKED = {  # answers that a model has learned (objectives.base.LEARNED) -> the form in which a ranking is read
    "ranking": "ranking",
    "identifiers": "ranking",
    "ratings": "ratings",
    "tasks": "tasks",
}
METHODS_OF = {"ranking": METHODS, "ratings": ("expected",), "tasks": TASK_METHODS}  # by the form of a model's answers
DEFAULT_METHOD = {"ranking": "first", "ratings": "expected", "tasks": "hybrid"}


@dataclass(frozen=True, slots=True)
class RankingOptions:
    """How lists are ranked; AlroFastError for a value that no ranker takes.

    method: of METHODS (ranker.py has what they read) or, of a model of RecRanker's tasks, of TASK_METHODS; None: by
    the model's answers, DEFAULT_METHOD. shuffles: presentations of each list, the stored one first; the others depend
    on (seed, list_id) alone. merge_by: how they are merged, of orders.MERGES. beams: partial orders that `beam` keeps.
    hybrid: constants of `hybrid`, as hybrid.constants_of takes them; None: the model's own. pairing: which candidates
    are compared, of hybrid.PAIRINGS; a random one is drawn from (seed, list_id). pair_orders: in what orders the two
    are named, of hybrid.PAIR_ORDERS; one: the order in which a random pairing drew them, or that of the list.
    """

    method: str | None = None
    shuffles: int = 1
    merge_by: str = "mean"
    beams: int = 4
    seed: int = 0
    hybrid: str | None = None
    pairing: str = "matching"
    pair_orders: str = "both"

    def __post_init__(self) -> None:
        known = (*METHODS, *TASK_METHODS)
        if self.method is not None and self.method not in known:
            raise AlroFastError(f"unknown method {self.method!r}; expected one of {', '.join(known)}")
        check_presentations(self.shuffles, self.merge_by, self.seed)
        if self.beams < 1:
            raise AlroFastError(f"beams is at least 1; given {self.beams}")
        constants_of(self.hybrid or "code")
        ways_of(pairs_of(0, self.pairing, np.random.default_rng(0)), self.pair_orders)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """Those of a command line parsed with `add_ranking_options`, or with some of them."""
        given = vars(options) | {"merge_by": options.merge}
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})

    def settled(self, answer: str, hybrid: str = "code") -> RankingOptions:
        """The same for a model that gives answers of this form and was tuned with these constants, nothing left None.

        AlroFastError for a method that asks for other answers.
        """
        check_answer(answer)
        own = METHODS_OF[answer]
        if self.method is not None and self.method not in own:
            if answer == "ratings" and self.method in METHODS:
                raise AlroFastError(
                    f"method {self.method!r} reads identifiers, but this model answers with grades: use 'expected'"
                )
            raise AlroFastError(
                f"method {self.method!r} asks otherwise than this model was tuned to answer (--objective recranker "
                f"answers {', '.join(TASK_METHODS)}); use {', '.join(own)}"
            )
        return replace(self, method=self.method or DEFAULT_METHOD[answer], hybrid=self.hybrid or hybrid)

    @property
    def presents(self) -> bool:
        """Whether scores depend on the order in which candidates are shown, or on a pairing drawn for each."""
        return self.method != "pointwise" and not (self.method == "pairwise" and self.pairing == "all")

    @property
    def draws(self) -> bool:
        """Whether anything is random."""
        pairs = self.method in ("pairwise", "hybrid") and self.pairing == "matching"
        return pairs or (self.shuffles > 1 and self.presents)

    def described(self) -> str:
        """In words, for whoever reads the rankings; of settled options."""
        method, pairing = self.method, f"pairing {self.pairing}"
        pairing += ", pairs asked in one order" if self.pair_orders == "one" else ""
        if method == "hybrid":
            method += f" ({self.hybrid} constants, {pairing})"
        elif method == "pairwise":
            method += f" ({pairing})"
        elif method == "beam":
            method += f" ({self.beams} beams)"
        presented = f", {self.shuffles} presentations merged by {self.merge_by}" if self.shuffles > 1 else ""
        return f"method {method}{presented}, seed {self.seed}"


READERS = {  # options that not every method reads; settings are settled RankingOptions
    "beams": Reader("by method beam", "method {0.method}", lambda how: how.method == "beam"),
    "hybrid": Reader("by method hybrid", "method {0.method}", lambda how: how.method == "hybrid"),
    "pairing": Reader(
        "by methods pairwise and hybrid", "method {0.method}", lambda how: how.method in ("pairwise", "hybrid")
    ),
    "pair_orders": Reader(
        "by methods pairwise and hybrid", "method {0.method}", lambda how: how.method in ("pairwise", "hybrid")
    ),
    "shuffles": Reader(
        "by every method but pointwise, and pairwise with --pairing all", "method {0.method}", lambda how: how.presents
    ),
    "merge": Reader("with --shuffles 2 or more", "--shuffles {0.shuffles}", lambda how: how.shuffles > 1),
    "seed": Reader(
        "with --shuffles 2 or more, and by --pairing matching of methods pairwise and hybrid",
        "method {0.method} with --shuffles {0.shuffles}",
        lambda how: how.draws,
    ),
}


class Settled(NamedTuple):
    """A settled method, and the form of the answers that it reads."""

    method: str | None
    answer: str | None

    @property
    def decodes(self) -> bool:
        """Whether answers are decoded slot after slot, prompt by prompt, and not read from packed trees."""
        return self.method in ("greedy", "beam") or (self.method, self.answer) == ("expected", "ranking")


PASS_READERS = {
    "share": Reader("by methods that read all answers in one pass", "method {0.method}", lambda how: not how.decodes)
}
FUSE_READERS = dict.fromkeys(  # what a fusion was not fitted for
    ("method", "hybrid", "pairing", "pair_orders"),
    Reader("without --fuse", "--fuse, whose weights are for scores as the run was tuned", lambda o: not o.fuse),
)
MODEL_READERS = {
    "base_model": Reader(
        "with an adapter",
        "{0.adapter}, which holds whole weights",
        lambda options: options.adapter is None or not _whole_weights(Path(options.adapter)),
    ),
}


def _whole_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file()


def ranked_answers(folder: str | Path, run: Mapping[str, Any]) -> str:
    """The form of answers in which rankings are read from the model of a run, from the run's options.

    AlroFastError for one that has learned to answer with texts.
    """
    from ..objectives.base import learned_answers  # imports torch

    learned = learned_answers(run)
    if learned not in RANKED:
        raise AlroFastError(
            f"{folder} was tuned on answers that are titles, not identifiers, which a ranking is read from; "
            "measure it with alro_fast.evaluate, or tune with --preference_answer identifiers"
        )
    return RANKED[learned]


def settled_options(
    options: argparse.Namespace, *, answer: str | None = None, generate: bool = False
) -> RankingOptions:
    """How a command line's model ranks, from its run's config.yaml: no weights are read.

    answer: the form of its answers, where there is no run to ask. generate: RecRanker's texts are generated too, and
    read as its hybrid. A folder without config.yaml settles nothing. AlroFastError for a method that asks for answers
    the model has not learned, or an option that it does not read.
    """
    refuse_unread(options.given, FUSE_READERS, options)
    how, run = RankingOptions.of(options), run_options(options.adapter) if answer is None else {}
    if run:
        answer = ranked_answers(options.adapter, run)
    if answer is None:
        return how
    how = how.settled(answer, run.get("hybrid") or "code")
    texts = [replace(how, method="hybrid", shuffles=1)] if generate and answer == "tasks" else []
    refuse_unread(options.given, READERS, how, *texts)
    refuse_unread(options.given, PASS_READERS, Settled(how.method, answer))
    return how


def add_model_options(parser: argparse.ArgumentParser, adapter_required: bool = True) -> None:
    """The model of a run's folder, and where it computes."""
    parser.add_argument("--adapter", required=adapter_required, metavar="DIR", help="folder that alro_fast.train wrote")
    model = parser.add_argument_group("model")
    model.add_argument("--base_model", metavar="NAME", help="base model in place of the one the adapter names")
    model.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    model.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    model.add_argument(
        "--token_budget", type=int, default=8192, metavar="N", help="tokens of one forward pass; 0: lists one by one"
    )
    model.add_argument(
        "--share",
        choices=("batch", "list", "none"),
        default="batch",
        help="prompts that begin alike are read once: of all lists of a forward pass (default), of each list, or never",
    )


def check_model_options(options: argparse.Namespace) -> None:
    """AlroFastError for a token budget below 0, or a base model that nothing reads."""
    check_token_budget(options.token_budget)
    refuse_unread(options.given, MODEL_READERS, options)


def check_answer(answer: str) -> None:
    """AlroFastError for a form of answers that no ranker reads."""
    if answer not in METHODS_OF:
        raise AlroFastError(f"unknown answer form {answer!r}; expected 'ranking', 'ratings' or 'tasks'")


def check_token_budget(tokens: int) -> None:
    """AlroFastError for less than 0."""
    if tokens < 0:
        raise AlroFastError(f"token_budget is at least 0; given {tokens}")


def add_ranking_options(parser: argparse.ArgumentParser) -> None:
    """How lists are ranked: `RankingOptions`."""
    defaults = RankingOptions()
    rankings = parser.add_argument_group("rankings")
    rankings.add_argument(
        "--method",
        metavar="NAME",
        help=f"{', '.join(METHODS)} (default: first; expected for grades); of a model of objective recranker: "
        f"{', '.join(TASK_METHODS)} (default: hybrid)",
    )
    rankings.add_argument(
        "--beams", type=int, default=defaults.beams, metavar="N", help="method beam: partial orders kept"
    )
    rankings.add_argument(
        "--hybrid",
        metavar="CONSTANTS",
        help=f"method hybrid: {' or '.join(HYBRIDS)}, or constants of your own: {SPELLED} (default: as trained)",
    )
    rankings.add_argument(
        "--pairing",
        default=defaults.pairing,
        metavar="NAME",
        help=f"methods pairwise and hybrid: pairs compared, {' (one each) or '.join(PAIRINGS)}",
    )
    rankings.add_argument(
        "--pair_orders",
        default=defaults.pair_orders,
        metavar="NAME",
        help=f"methods pairwise and hybrid: orders in which a pair is asked about, {' or '.join(PAIR_ORDERS)}",
    )
    rankings.add_argument(
        "--fuse", action="store_true", help="add the lists' signals to the scores, by the weights of train --fuse true"
    )
    add_presentation_options(rankings, seeds="of the shuffles, and of --pairing matching")


def add_presentation_options(parser: argparse._ArgumentGroup, seeds: str = "--shuffles 2 or more: their seed") -> None:
    """Presentations of a list, and how they are merged; seeds: help of --seed."""
    defaults = RankingOptions()
    parser.add_argument(
        "--shuffles", type=int, default=defaults.shuffles, metavar="N", help="presentations of each list, merged"
    )
    parser.add_argument(
        "--merge",
        default=defaults.merge_by,
        metavar="NAME",
        help=f"--shuffles 2 or more: how they are merged, {', '.join(MERGES)}; mean: of scores",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help=seeds)
