"""What the files of a report must hold, said once: shapes of JSON, and `check`, which names the file and the field.

A shape is a `Kind`; a list of one shape, for any number of it; or a mapping of fields to shapes, in which a name that
ends in "?" may be absent and "*" stands for every other name (without it, others are of no interest).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...data.records import LARGEST_RATING
from ...errors import AlroFastError
from .numbers import headline

LARGEST = 1e100  # of numbers that are drawn: arithmetic on them stays finite


class Kind(NamedTuple):
    """A value that holds no others of interest: what it is called, and whether one is it."""

    words: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def _null_or_number(value: Any) -> bool:
    return value is None or _number(value)


TEXT = Kind("a text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number from 0", lambda value: type(value) is int and 0 <= value <= LARGEST)
HEADLINE = Kind(
    "a metric such as ndcg@3", lambda value: isinstance(value, str) and bool(re.fullmatch(r"ndcg@[1-9]\d{0,3}", value))
)
NUMBER = Kind("a number", _number)
MEASURED = Kind("a number or null", _null_or_number)
GRADE = Kind(
    "a rating from 0, or null", lambda value: value is None or (_number(value) and 0 <= value <= LARGEST_RATING)
)
LOGGED = Kind("a number", lambda value: _number(value) or type(value) is float)  # also NaN, of a loss that was none
NUMBERS = Kind("a list of numbers", lambda value: isinstance(value, list) and all(map(_number, value)))
INTERVAL = Kind(
    "a list of two numbers or nulls",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_null_or_number, value)),
)
SEGMENT = Kind(
    "a list of one or three numbers or nulls",
    lambda value: isinstance(value, list) and len(value) in (1, 3) and all(map(_null_or_number, value)),
)
ORDER = Kind(
    "the numbers of all candidates, from 0, each once",
    lambda value: (
        isinstance(value, list) and all(type(one) is int for one in value) and sorted(value) == list(range(len(value)))
    ),
)

STATE = {"log_history?": [{"step?": NUMBER, "*": LOGGED}]}
COMPARED = dict.fromkeys(("first", "second", "metric"), TEXT)
ABOUT = {
    "split": TEXT, "lists?": COUNT, "headline?": HEADLINE, "conventions": {"*": TEXT},
    "comparisons?": [COMPARED | dict.fromkeys(("difference", "low", "high", "p_value"), NUMBER)],
    "breakdown?": {"*": [{"range": TEXT, "lists": COUNT, "users": COUNT, "*": SEGMENT}]},
    "peak_memory_gib?": MEASURED, "generate_invalid_rate?": MEASURED,
}  # fmt: skip
OF_LISTS = {"lists_ranked": COUNT, "users_ranked": COUNT, "lists_all_equal": COUNT}
OF_TARGETS = {"lists": COUNT, "lists_with_their_target": COUNT, "ceiling": MEASURED}
RANKING = {"order": ORDER, "scores": NUMBERS, "presentations?": [{"shown": ORDER, "scores": NUMBERS}]}
LINE = {
    "list_id": TEXT, "user_id": TEXT, "candidates": [{"id": TEXT, "title": TEXT, "rating": GRADE}],
    "rankings": {"*": RANKING}, "history?": [{"title": TEXT, "rating": MEASURED}], "history_length?": COUNT,
}  # fmt: skip


def check(value: Any, shape: Any, path: Path, place: str = "") -> None:
    """AlroFastError naming file and field where `value` has not the shape; place: where it stands in the file."""
    if isinstance(shape, Kind):
        if not shape.holds(value):
            raise damage(path, place, shape.words, value)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise damage(path, place, "a list", value)
        for at, one in enumerate(value):
            check(one, shape[0], path, f"{place}[{at}]")
    else:
        if not isinstance(value, dict):
            raise damage(path, place, "an object", value)
        for name in (name for name in shape if not name.endswith("?") and name != "*" and name not in value):
            raise AlroFastError(f"{path} is damaged: {_within(place, name)} is missing; restore the file")
        for name, one in value.items():
            expected = shape.get(name, shape.get(f"{name}?", shape.get("*")))
            if expected is not None:
                check(one, expected, path, _within(place, name))


def check_results(results: Any, path: Path) -> None:
    """results.json: every ranker with the figures of the first, and `about`, which speaks of those rankers alone."""
    check(results, {"about": ABOUT}, path)
    about = results["about"]
    check(about, OF_TARGETS if "ceiling" in about else OF_LISTS, path, "about")
    rankers = [name for name in results if name != "about"]
    if not rankers:
        raise AlroFastError(f"{path} is damaged: it holds no ranker; restore the file")
    for name in rankers:
        check(results[name], {"*": MEASURED} | dict.fromkeys(_intervals(results[name]), INTERVAL), path, name)
    first = results[rankers[0]]
    shown = {key: MEASURED for key in first if f"{key}_interval" in first or key.startswith("within_")}
    shown |= dict.fromkeys(_intervals(first), INTERVAL)
    shown[headline(results)] = MEASURED
    for name in rankers:
        check(results[name], shown, path, name)
    one_of = Kind("a ranker of the file", lambda value: value in rankers)
    check(about, {"comparisons?": [{"first": one_of, "second": one_of}]}, path, "about")
    for cut, segments in about.get("breakdown", {}).items():
        if not segments:
            raise damage(path, f"about.breakdown.{cut}", "a segment", segments)
        check(segments, [{name: SEGMENT for name in segments[0] if name not in ("range", "lists", "users")}], path,
              f"about.breakdown.{cut}")  # fmt: skip


def check_line(line: Any, path: Path, number: int, first: Mapping[str, Any]) -> None:
    """A line of predictions.jsonl: every ranker of the first line, with a score for each candidate."""
    place = f"line {number}"
    check(line, LINE, path, place)
    count = len(line["candidates"])
    if not count or not line["rankings"]:
        raise AlroFastError(f"{path} is damaged: {place} has no candidates or no rankings; restore the file")
    check(line["rankings"], {name: {} for name in first["rankings"]}, path, f"{place}.rankings")
    for name, ranking in line["rankings"].items():
        parts: Sequence[tuple[str, list]] = [(f".{key}", ranking[key]) for key in ("order", "scores")]
        for at, shown in enumerate(ranking.get("presentations", ())):
            parts = [*parts, *((f".presentations[{at}].{key}", shown[key]) for key in ("shown", "scores"))]
        for where, values in parts:
            if len(values) != count:
                raise damage(path, f"{place}.rankings.{name}{where}", f"{count} values, one per candidate", values)


def damage(path: Path, place: str, expected: str, found: Any) -> AlroFastError:
    """The error of a field."""
    return AlroFastError(f"{path} is damaged: {place or 'it'}: expected {expected}, found {found!r:.40}")


def _within(place: str, name: str) -> str:
    return f"{place}.{name:.60}" if place else f"{name:.60}"


def _intervals(ranker: Any) -> list[str]:
    return [key for key in ranker if key.endswith("_interval")] if isinstance(ranker, dict) else []
