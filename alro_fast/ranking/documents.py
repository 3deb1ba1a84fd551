"""JSON lists in, JSON rankings out: what `alro_fast.rank` and `alro_fast.client` read and print.

One JSON list, an array of them, or JSON lines; the keys are those of `alro_fast.rank --help`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.records import Item, RankingList, Signal
from ..data.signal_table import SIGNALS
from ..errors import AlroFastError
from ..run_folder import run_options
from ..texts import RepeatedKey, encoding_of, once

if TYPE_CHECKING:
    from .orders import Ranking

LONGEST_ITEM = 10_000  # characters of a title and a category
LONGEST = 1 << 26  # characters of one JSON text: a line, or a file that is one value over many lines
LIST_KEYS = ("list_id", "user", "user_id", "history", "candidates")

ITEM_KEYS = ("id", "title", "category", "rating", *SIGNALS)


def documents(file: str) -> Iterator[Any]:
    """The JSON values in a file or on standard input (`-`): one, an array of them, or one per line, as they come.

    A line that is not JSON is an AlroFastError in its place. Raises AlroFastError for a file that cannot be read, or
    holds nothing. Lines are read one at a time unless the first alone is no JSON text.
    """
    name = "standard input" if file == "-" else file
    if file != "-" and not Path(file).exists():  # a pipe of the shell's is no regular file
        raise AlroFastError(f"{file}: no such file; expected JSON lists to rank")
    if Path(file).is_dir():
        raise AlroFastError(f"{file} is a folder; expected a file of JSON lists (of a prepared folder: --lists {file})")
    with contextlib.nullcontext(sys.stdin) if file == "-" else Path(file).open(encoding="utf-8", newline="\n") as text:
        lines = enumerate(iter(lambda: text.readline(LONGEST + 1), ""), start=1)
        full = ((n, _bounded(line, name)) for n, line in lines if line.strip("\ufeff \t\r\n"))
        try:
            yield from _values(full, name)
        except UnicodeDecodeError as error:
            raise AlroFastError(f"{name} is {encoding_of(error.object[:64])}; expected JSON lists to rank") from None


def _bounded(text: str, name: str) -> str:
    if len(text) > LONGEST:
        raise AlroFastError(
            f"{name} holds a JSON text of more than {LONGEST >> 20} million characters; give one list a line"
        )
    return text


def _values(lines: Iterator[tuple[int, str]], name: str) -> Iterator[Any]:
    """Of numbered lines that are not empty."""
    number, first = next(lines, (0, ""))
    if not number:
        raise AlroFastError(f"{name} is empty; expected a JSON list to rank")
    first = first.removeprefix("\ufeff")
    value = _of_line(first, number, name)
    if isinstance(value, AlroFastError):  # a text over several lines, or a line with a mistake
        rest, size = [], len(first)
        while size <= LONGEST and (following := next(lines, None)) is not None:
            rest.append(following)
            size += len(following[1])
        try:
            value = _json("".join([first, *(line for _, line in rest)]), name)
        except json.JSONDecodeError as error:
            if not rest:
                yield AlroFastError(f"{name} is not JSON: {error}")
                return
            yield value
            yield from (_of_line(line, at, name) for at, line in itertools.chain(rest, lines))
            return
        lines = iter(())
    if isinstance(value, list):
        if (following := next(lines, None)) is None:
            if not value:
                raise AlroFastError(f"{name} holds an empty array; expected at least one list to rank")
            yield from value
            return
        lines = itertools.chain([following], lines)
    yield value
    yield from (_of_line(line, at, name) for at, line in lines)


def _of_line(line: str, number: int, name: str) -> Any:
    try:
        return _json(line, f"{name}, line {number}")
    except json.JSONDecodeError as error:
        return AlroFastError(f"{name}, line {number} is not JSON: {error.msg} at column {error.colno}")
    except AlroFastError as error:
        return error


def _json(text: str, place: str) -> Any:
    """A JSON value; JSONDecodeError for what is none, AlroFastError for what Python does not hold."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError:
        raise
    except RepeatedKey as error:
        raise AlroFastError(f"{place} has the key {error.args[0]!r:.80} twice; leave one out") from None
    except ValueError:  # whole numbers of more digits than Python converts
        raise AlroFastError(f"{place} holds a number of thousands of digits; expected JSON lists to rank") from None
    except RecursionError:
        raise AlroFastError(f"{place} is nested too deeply; expected JSON lists to rank") from None


def parse_list(document: Any, number: int) -> RankingList:
    """One JSON object -> a ranking list without labels; AlroFastError naming the list and the place."""
    place = place_of(document, number)
    if not isinstance(document, dict):
        raise AlroFastError(f'{place}: expected an object with "history" and "candidates", found {_kind(document)}')
    _check_keys(document, LIST_KEYS, place)
    _check_characters(document, place)
    candidates = document.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        found = "no candidates" if candidates in (None, []) else f'{_kind(candidates)} as "candidates"'
        raise AlroFastError(f'{place}: {found}; expected a non-empty array of objects with a "title"')
    history = [] if document.get("history") is None else document["history"]
    if not isinstance(history, list):
        raise AlroFastError(f'{place}: {_kind(history)} as "history"; expected an array of objects')
    past = [_item(entry, f"{place}, history {at}", f"past {at}") for at, entry in enumerate(history, start=1)]
    ratings = [_rating(entry, f"{place}, history {at}") for at, entry in enumerate(history, start=1)]
    shown = [_item(entry, f"{place}, candidate {at}", f"new {at}") for at, entry in enumerate(candidates, start=1)]
    first: dict[str, int] = {}
    for at, item in enumerate(shown, start=1):
        if first.setdefault(item.item_id, at) != at:
            raise AlroFastError(
                f"{place}: candidates {first[item.item_id]} and {at} have the same id "
                f"{candidates[at - 1]['id']!r:.80}; give every candidate once"
            )
    unknown = (math.nan,) * len(shown)
    of_past, of_shown = _signals(history, f"{place}, history"), _signals(candidates, f"{place}, candidate")
    hints = of_shown.pop("hint", ())
    names = [name for name in SIGNALS if name != "hint" and {name} & (of_past.keys() | of_shown.keys())]
    signals = tuple(Signal(name, of_past.get(name, ()), of_shown.get(name, ())) for name in names)
    name = document.get("list_id", number)
    if isinstance(name, list | dict | bool) or (isinstance(name, float) and not math.isfinite(name)):
        raise AlroFastError(f'{place}: "list_id" is {_kind(name)}; expected a text or a number')
    name = str(name)
    return RankingList(name, name, tuple(past), tuple(ratings), tuple(shown), unknown, hints, signals)


def place_of(document: Any, number: int) -> str:
    """What a message calls the list at a place, counted from 1: by its own list_id too, where that is another."""
    name = document.get("list_id") if isinstance(document, dict) else None
    other = isinstance(name, str | int) and not isinstance(name, bool) and str(name) != str(number)
    return f"list {number} (list_id {name!r:.80})" if other else f"list {number}"


def keys_of(document: dict[str, Any]) -> set[str]:
    """Keys that a candidate at least of a list has, whatever their values."""
    return set().union(*document["candidates"])


@functools.cache
def catalogue(folder: str) -> dict[str, Item]:
    """Items by id, of the prepared data that the model in `folder` was trained on."""
    from ..data.lists import open_prepared

    data = Path(run_options(folder).get("data_dir") or Path(folder) / "data")
    if not data.is_dir():
        raise AlroFastError(
            f"{folder} names items by tokens of their own, but its prepared data {data} is gone; put it back there"
        )
    return {item.item_id: item for item in open_prepared(data).items}


def numbered(entry: RankingList, document: Any, items: dict[str, Item]) -> RankingList:
    """The list with the catalogue's items, for a model that names items by tokens of their own."""
    found: dict[str, list[Item]] = {}
    for part in ("history", "candidates"):
        found[part] = []
        for at, given in enumerate(document.get(part) or [], start=1):
            name = given.get("id")
            if str(name) not in items:
                raise AlroFastError(
                    f"list {entry.list_id:.80}, {part} {at}: id {name!r:.80} is not in the catalogue this model was "
                    "trained on; it names items by tokens of their own, so every item needs its id"
                )
            found[part].append(items[str(name)])
    return dataclasses.replace(entry, history=tuple(found["history"]), candidates=tuple(found["candidates"]))


def document_of(entry: RankingList) -> dict[str, Any]:
    """The JSON document of a list: what `parse_list` reads, its candidates' ratings left out."""
    sides = {"history": (entry.history, "history"), "candidates": (entry.candidates, "candidates")}
    document: dict[str, Any] = {"list_id": entry.list_id}
    for key, (items, side) in sides.items():
        document[key] = [{"id": item.item_id, "title": item.title, "category": item.category} for item in items]
        columns = {signal.name: getattr(signal, side) for signal in entry.signals}
        columns |= {"rating": entry.history_ratings} if side == "history" else {"hint": entry.hints}
        for name, values in columns.items():
            for shown, value in zip(document[key], values):
                if not math.isnan(value):
                    shown[name] = value
    return document


def answer(document: Any, ranking: Ranking, top_k: int | None) -> dict[str, Any]:
    """The output line of one list."""
    ordered = []
    for rank, i in enumerate(ranking.order[:top_k], start=1):
        entry = document["candidates"][i]
        ordered.append(
            {"rank": rank, "id": entry.get("id"), "title": entry["title"], "score": float(ranking.scores[i])}
        )
    return {"list_id": document.get("list_id"), "ranking": ordered}


def check_top_k(top_k: int | None) -> None:
    """AlroFastError for less than one."""
    if top_k is not None and top_k < 1:
        raise AlroFastError(f"--top_k is at least 1; given {top_k}")


def _item(entry: Any, place: str, unnamed: str) -> Item:
    if not isinstance(entry, dict):
        raise AlroFastError(f'{place}: expected an object with a "title", found {_kind(entry)}')
    _check_keys(entry, ITEM_KEYS, place)
    title, category, known = entry.get("title"), entry.get("category") or "", entry.get("id")
    if not isinstance(title, str) or not title.strip():
        raise AlroFastError(f'{place}: expected a "title" that is a non-empty text, found {_kind(title)}')
    if not isinstance(category, str):
        raise AlroFastError(f'{place}: "category" is {_kind(category)}; expected a text')
    if len(title) + len(category) > LONGEST_ITEM:
        raise AlroFastError(f"{place}: its texts are longer than {LONGEST_ITEM:,} characters; shorten them")
    if known is not None and (isinstance(known, bool) or not isinstance(known, str | int)):
        raise AlroFastError(f'{place}: "id" is {_kind(known)}; expected a text or a whole number')
    return Item(0, unnamed if known is None else f"id {known}", title, category)


def _check_keys(given: dict[str, Any], known: Sequence[str], place: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key[:80], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected some of {', '.join(known)}"
            raise AlroFastError(f"{place}: unknown key {key!r:.80}; {hint}")


def _check_characters(document: dict[str, Any], place: str) -> None:
    """Half a surrogate pair, such as a JSON text cut within an escape leaves, is no character that can be written."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise AlroFastError(
            f"{place}: {error.object[error.start]!a} is half a character; write it whole, as UTF-8 or as both escapes"
        ) from None
    except RecursionError:
        raise AlroFastError(f"{place} is nested too deeply; expected texts and numbers") from None


def _rating(entry: Any, place: str) -> float:
    return _number(entry.get("rating"), "rating", place)


def _signals(entries: Sequence[dict[str, Any]], place: str) -> dict[str, tuple[float, ...]]:
    """Values by name of the signals that are given for one of the items at least; NaN for the others."""
    given = [name for name in SIGNALS if any(entry.get(name) is not None for entry in entries)]
    return {
        name: tuple(
            math.nan if entry.get(name) is None else _number(entry[name], name, f"{place} {at}")
            for at, entry in enumerate(entries, start=1)
        )
        for name in given
    }


def _number(value: Any, name: str, place: str) -> float:
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number beyond any float
            number = float(value)
    if not math.isfinite(number):
        huge = isinstance(value, int) and not isinstance(value, bool)
        found = "one of hundreds of digits" if huge else _kind(value)
        raise AlroFastError(f'{place}: expected a "{name}" that is a number, found {found}')
    return number


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {value!r:.40}" if value.strip() else "an empty text"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    names = {bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names[type(value)]
