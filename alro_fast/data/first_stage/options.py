"""Options of a first stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import AlroFastError
from ..signals import MOST_FOLDS
from ..windows import MOST
from .likes import MIN_LIKES
from .retrieval import RetrieverOptions, resolve
from .sampling import PARTS, parse_parts

MOST_SAMPLES = 10_000_000


@dataclass(frozen=True, slots=True)
class HintOptions:
    """How a first stage is run and its lists are made."""

    retriever: str = "als"
    num_candidates: int = 10  # of a list
    num_samples: int = 5000  # draws of users, a draw is one choice list
    sampling: str = ",".join(PARTS)  # what decides who is drawn, of sampling.PARTS; none: all users alike
    like: float = 4.0  # ratings from here on are likes
    min_likes: int = MIN_LIKES  # a user with fewer has no targets
    dislike: float = 2.0  # ratings up to here are dislikes (shown as such in prompts)
    history_length: int = 50
    folds: int = 5  # of the training ratings, for hints
    choice_lists_only: bool = False
    seed: int = 0
    of_retriever: RetrieverOptions = field(default_factory=RetrieverOptions)

    def __post_init__(self) -> None:
        lowest = {"num_candidates": 2, "num_samples": 1, "history_length": 1, "min_likes": 2, "folds": 2, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise AlroFastError(f"--{name} {getattr(self, name)} is too small; at least {least} is needed")
            most = {"folds": MOST_FOLDS + 1, "num_samples": MOST_SAMPLES + 1, "num_candidates": 10_001}.get(name, MOST)
            if getattr(self, name) >= most:
                raise AlroFastError(f"--{name} {getattr(self, name)} is too large; it must be below {most:,}")
        if not self.dislike < self.like:
            raise AlroFastError(f"--dislike {self.dislike:g} is not below --like {self.like:g}")
        object.__setattr__(self, "sampling", ",".join(parse_parts(self.sampling)) or "none")
        resolve(self.retriever, self.of_retriever)

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest says of these options; a retriever's `layers` where given: older ones do not have it."""
        known = asdict(self)
        if self.of_retriever.layers is None:
            del known["of_retriever"]["layers"]
        return known
