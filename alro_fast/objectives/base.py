"""What an objective is, what it says of itself, and where to ask.

An objective is a file beside this one, and a `Description` in it: that is found by itself, and whoever wants to know
anything of an objective asks `describe(name)`.

An objective turns ranking lists into token trees (`examples`), the batch's trees into targets (`targets`, on the CPU,
in a loader worker), and the hidden states of the answer rows into loss terms (`loss`, on the device). A term is a mean
over `count` things; the trainer re-weights terms by their share of the whole accumulated step, so that accumulation is
exact.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.records import RankingList
from ..errors import AlroFastError
from ..modeling.packing import PackedBatch, Tree
from ..options import ObjectiveArguments, Where

if TYPE_CHECKING:
    from ..data.preferences import Preference
    from ..modeling.lm_head import Head
    from ..prompts import PromptBuilder
    from ..prompts.preference import PreferencePrompts
    from ..prompts.recranker import RecRankerPrompts

ALWAYS = None  # an option that an objective reads under any circumstance
OF_THE_TABLE = (
    "baselines",
    "fuse",
)  # of the rankings' table at the end: read by every objective that ranks lists
LEARNED = {  # what a model may have learned to answer -> in words
    "ranking": "the identifiers of all candidates in order",
    "identifiers": "the identifier of one candidate",
    "ratings": "a grade for each candidate",
    "tasks": "grades, Yes or No, and the best five",
    "titles": "the title of one candidate",
    "pairs": "the titles of two candidates in order",
    "given": "the answers of preference files",
}
TEXTS = ("titles", "pairs", "given")  # of these: texts, which no ranking is read from


@dataclass(frozen=True)
class Description:
    """What is known of an objective, once: parsing, training, ranking, measuring and the report ask it.

    name, summary: `--objective` and its line in --help.
    objective: the class of this protocol, called as `objective(arguments, prompts, answer=..., seed=...)`.
    run: what it is trained on, for `training/kinds.py`: "lists" (ranking lists), "preferences" (chosen and rejected
        answers, out of ranking lists or of files) or "tasks" (RecRanker's questions about ranking lists).
    prompts: the class that writes, saves and loads the prompts of ranking lists.
    answers: forms that `--answer` may ask it for.
    reads: its options, and where it reads them (ALWAYS, or a `Where`). What no objective names, all of them read.
    logs: its loss terms, and what a plot calls them.
    learns: options of a run -> what its model learns to answer, of LEARNED.
    options: a dataclass of options that are its own beside those of `ObjectiveArguments`; it reads all of them.
    ranks_lists: whether training ends with a table of rankings.
    compares: whether it needs rejected answers, and a reference.
    stands_for: the objective in whose place it is taken where answers are trained on: it has no name of its own then.
    instead: an option that is easily mistaken for one of its own -> that one.
    """

    name: str
    summary: str
    objective: type
    run: str
    prompts: type[Any]
    reads: Mapping[str, Where | None]
    logs: Mapping[str, str]
    learns: Callable[[Mapping[str, Any]], str]
    answers: tuple[str, ...] = ()
    options: type | None = None
    ranks_lists: bool = True
    compares: bool = False
    stands_for: str = ""
    instead: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = [entry.name for entry in fields(self.options)] if self.options else []
        own += OF_THE_TABLE if self.ranks_lists else ()
        object.__setattr__(self, "reads", dict.fromkeys(own, ALWAYS) | dict(self.reads))

    @property
    def title(self) -> str:
        """The name as a user knows it."""
        return f"{self.stands_for} on answers" if self.stands_for else self.name


@functools.cache
def descriptions() -> dict[str, Description]:
    """Every objective's, by name: the module-level `Description`s of the files beside this one."""
    package = importlib.import_module(__package__)
    found: dict[str, Description] = {}
    for file in pkgutil.iter_modules(package.__path__):
        for one in vars(importlib.import_module(f"{__package__}.{file.name}")).values():
            if isinstance(one, Description) and found.setdefault(one.name, one) is not one:
                raise AlroFastError(f"two objectives are named {one.name!r}; rename one of them")
    return found


def describe(name: str) -> Description:
    """The description of `--objective name`; AlroFastError where there is none."""
    known = descriptions()
    if name not in known:
        named = [one.name for one in known.values() if not one.stands_for]
        raise AlroFastError(f"--objective {name!r} is unknown; expected one of {', '.join(named)}")
    return known[name]


def describe_on_answers(name: str) -> Description:
    """The description of what is taken for `--objective name` where answers are trained on: mostly itself."""
    stand_ins = (one for one in descriptions().values() if one.stands_for == name)
    return next(stand_ins, None) or describe(name)


def describe_run(options: Mapping[str, Any]) -> Description:
    """Of the objective of a run; options: those that its config.yaml holds."""
    return describe(options.get("objective", ObjectiveArguments.objective))


def objective_arguments() -> type[ObjectiveArguments]:
    """ObjectiveArguments with the options that objectives have of their own."""
    return _objective_arguments(tuple(one.options for one in descriptions().values() if one.options))


@functools.cache
def _objective_arguments(own: tuple[type, ...]) -> type[ObjectiveArguments]:
    return make_dataclass("AllObjectiveArguments", (), bases=(*own, ObjectiveArguments)) if own else ObjectiveArguments


def learned_answers(options: Mapping[str, Any]) -> str:
    """What the model of a run has learned to answer, of LEARNED; options: those that its config.yaml holds."""
    found = options.get("learned_answers")
    if found is None:  # of a version that did not record it
        found = describe_run(options).learns(options)
    if found not in LEARNED:
        raise AlroFastError(f"the run has learned to answer {found!r}; expected one of {', '.join(LEARNED)}")
    return found


class Example(NamedTuple):
    """One ranking list, ready to train on: its tree, and what the objective needs to read the answers back."""

    tree: Tree  # of all presentations
    views: tuple[Any, ...]  # the presentations, in branch order
    source: RankingList | Preference


class LossTerm(NamedTuple):
    """`value` (a scalar) is the mean of this term over `count` things; the loss adds `weight * value`."""

    name: str
    value: Tensor
    weight: float
    count: int  # type: ignore[assignment]  # a tuple has a method of that name


@dataclass
class Batch:
    """What the loader hands to the trainer: the packed tokens, the objective's targets and what to count."""

    packed: PackedBatch
    targets: Any
    counts: dict[str, int]  # per loss term: how many things its mean runs over in this batch
    lists: int
    sources: list[RankingList | Preference]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.packed.to(device, non_blocking=non_blocking), move(self.targets, device, non_blocking),
            self.counts, self.lists, self.sources,
        )  # fmt: skip

    def pin_memory(self) -> Batch:
        """The same batch with its tensors in page-locked memory, which a device copies while the host goes on."""
        return Batch(
            self.packed.pin_memory(), mapped(self.targets, Tensor.pin_memory), self.counts, self.lists, self.sources
        )


class Objective(Protocol):
    """The interface of the files beside this one.

    An objective may also have `complete(model, batch, forward) -> Batch`, called before the forward pass: what it needs
    of the model beyond the hidden states, such as log-probabilities of a reference; `forward(packed)` runs the model.
    """

    def examples(self, lists: Sequence[RankingList], indices: Sequence[int], epoch: int) -> list[Example]:
        """Trees of `lists`; whatever is drawn depends only on the seed, the epoch and each list's index."""

    def targets(self, packed: PackedBatch, examples: Sequence[Example]) -> tuple[Any, dict[str, int]]:
        """What the loss needs besides hidden states, and the count behind each of its terms."""

    def loss(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: Any) -> list[LossTerm]:
        """Loss terms of one packed batch; `hidden` [U, H] holds its distinct answer rows, each of which may predict
        several of its labels (`packed.label_table`)."""


def build_objective(
    arguments: ObjectiveArguments,
    builder: PromptBuilder | PreferencePrompts | RecRankerPrompts,
    *,
    answer: str,
    seed: int,
    **more: Any,
) -> Objective:
    """The objective named by `arguments.objective`; AlroFastError for a name that no description has."""
    made: Objective = describe(arguments.objective).objective(arguments, builder, answer=answer, seed=seed, **more)
    return made


def move(value: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """A tensor, or a (named) tuple of tensors and other things, with its tensors on `device`."""
    return mapped(value, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or a (named) tuple of tensors and other things, with `function` applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        moved = [mapped(entry, function) for entry in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
