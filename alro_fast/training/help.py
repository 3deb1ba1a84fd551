"""`python -m alro_fast.train --help`: the groups of options, and `--help GROUP` the options of one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from ..objectives.base import descriptions, objective_arguments
from ..options import DataArguments, ModelArguments, RankerTrainingArguments, Where
from .unread import WITHOUT_MEANING

WIDTH, COLUMN = 80, 28  # of a terminal; where what an option is begins
USAGE = "python -m alro_fast.train [--config FILE_OR_RECIPE] [--option value ...]"


def help_text(group: str | None, recipes: Sequence[str]) -> str:
    """The overview, or the options of one group, or of `all`."""
    known = groups()
    if group == "all":
        return "\n\n".join(_group(name, *entry) for name, entry in known.items())
    if group in known:
        return _group(group, *known[group])
    lines = [
        f"usage: {USAGE}",
        "",
        "Tunes a ranker. No arguments: the demo, on the CPU, in half a minute. An option",
        "is also a key of the file that --config names; the command line wins. An option",
        "that a run does not read is an error: --help GROUP says where each is read.",
        "",
        "objectives (--objective NAME, or --stages NAME,NAME one after the other):",
        *(_row(one.name, one.summary) for one in descriptions().values() if not one.stands_for),
        "",
        "options (--help GROUP lists a group, --help all every one):",
        *(_row(name, f"{title} ({len(entries)})") for name, (title, entries) in known.items()),
        "",
        *textwrap.wrap(f"recipes (--config NAME): {', '.join(recipes)}", WIDTH, subsequent_indent="  "),
    ]
    return "\n".join(lines)


def groups() -> dict[str, tuple[str, list[dataclasses.Field[Any]]]]:
    """Name -> title and options. What several objectives read is in each of their groups."""
    model, data, objective, training = (
        {entry.name: entry for entry in dataclasses.fields(part) if entry.init} for part in _parts()
    )
    found: dict[str, list[dataclasses.Field[Any]]] = {}
    for one in descriptions().values():
        mine = found.setdefault(one.stands_for or one.name, [])
        mine += [(data | objective)[name] for name in one.reads if (data | objective)[name] not in mine]
    of_objectives = {entry.name for entries in found.values() for entry in entries}
    ours = RankerTrainingArguments.__annotations__
    common = [entry for name, entry in objective.items() if name not in of_objectives]
    shared = [entry for name, entry in data.items() if name not in of_objectives]
    named = {
        "model": ("the base model and its adapter", list(model.values())),
        "data": ("ranking lists, preferences and prompts", shared),
    }
    named |= {name: (f"what --objective {name} reads", entries) for name, entries in sorted(found.items())}
    own = [entry for name, entry in training.items() if name in ours and name not in WITHOUT_MEANING]
    theirs = [entry for name, entry in training.items() if name not in ours and name not in WITHOUT_MEANING]
    named["training"] = ("the objective, batches, stages and the output", common + own)
    named["transformers"] = ("as in transformers.TrainingArguments", theirs)
    return named


def _group(name: str, title: str, entries: list[dataclasses.Field[Any]]) -> str:
    if name == "transformers":
        return "\n".join([f"{name}: {title}", *(f"  --{entry.name} {values_of(entry)}" for entry in entries)])
    reads: dict[str, Where | None] = {}
    for one in descriptions().values():
        reads |= one.reads if name in (one.name, one.stands_for) else {}
    lines = (_lines(entry, entry.metadata.get("read") or reads.get(entry.name)) for entry in entries)
    return "\n".join([f"{name}: {title}", *itertools.chain(*lines)])


def _lines(entry: dataclasses.Field[Any], read: Where | None) -> Iterator[str]:
    """One option: its name and values, what it is, where it is read, its default."""
    head = f"--{entry.name} {values_of(entry)}"
    said = [str(entry.metadata["help"]), f"Read {read.said}." if read else "", default_of(entry)]
    wrapped = textwrap.wrap(" ".join(filter(None, said)), WIDTH - COLUMN)
    first = f"  {head}"
    if len(first) > COLUMN - 2:
        yield from textwrap.wrap(first, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
        first = ""
    for number, line in enumerate(wrapped):
        yield f"{first if number == 0 else '':<{COLUMN}}{line}"


def values_of(entry: dataclasses.Field[Any]) -> str:
    """Its choices, or the type of its value."""
    if entry.metadata.get("choices"):
        return "{" + ",".join(entry.metadata["choices"]) + "}"
    kind = _types(_parts())[entry.name]
    names = [part.__name__ if isinstance(part, type) else str(part) for part in typing.get_args(kind) or (kind,)]
    names = [name.removeprefix("typing.") for name in names if name != "NoneType"]
    listed = typing.get_origin(kind) is list
    return "|".join(dict.fromkeys(names)).upper() + (" ..." if listed else "")


def default_of(entry: dataclasses.Field[Any]) -> str:
    """Its default in brackets; nothing where it has none."""
    value: Any = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    if value in (None, "", []):
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    return f"[{' '.join(map(str, value)) if isinstance(value, list) else value}]"


def _row(name: str, text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16, break_on_hyphens=False
    )


def _parts() -> tuple[type, ...]:
    return ModelArguments, DataArguments, objective_arguments(), RankerTrainingArguments


@functools.cache
def _types(parts: tuple[type, ...]) -> dict[str, Any]:
    return {name: kind for part in parts for name, kind in typing.get_type_hints(part).items()}
