"""Preference files: what a user chose and rejected, as TRL or the DMPO authors write it, read into one record.

| rows with | are read as |
| --- | --- |
| `prompt`, `chosen`, `rejected` | TRL: strings or messages; an answer or a list of answers each |
| `chosen`, `rejected` of messages | TRL with the prompt inside: all messages but the last |
| `instruction`, `input`, `output` | Alpaca: `output` = [chosen, rejected], or one ordering of two items in the text |

Rows of one user become one record: those with the same prompt and chosen answer, and, where each row asks about two
items, those that differ in the rejected item alone (the authors' k rows per user).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AlroFastError
from ..texts import from_json, is_file, read_text

MOST_BYTES, MOST_PIPED = 1 << 30, 1 << 26  # of a file of text, which is held whole, and of a pipe, which may not end
FORMATS = (".json", ".jsonl", ".parquet")
EXPECTED = "expected columns prompt, chosen, rejected (TRL), or instruction, output = [chosen, rejected] (Alpaca)"


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


Prompt = str | tuple[Turn, ...]  # continued as it is, or rendered by the model's chat template


@dataclass(frozen=True, slots=True)
class Preference:
    """One user's answers. One prompt asks for all of them, or prompt i for the pair chosen[i], rejected[i]."""

    list_id: str  # names the record in messages
    user_id: str
    prompts: tuple[Prompt, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]

    @property
    def paired(self) -> bool:
        """True when every rejected answer has a prompt and a chosen answer of its own."""
        return len(self.prompts) > 1


class _Row(NamedTuple):
    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    user: str | None


def read_preferences(path: str | Path, *, need_rejected: bool = True) -> list[Preference]:
    """Records of a .json, .jsonl or .parquet file, in the order of their first rows.

    need_rejected: False also takes rows without a rejected answer, as supervised tuning does.
    Raises AlroFastError naming file and row: not a preference file, no rejected answer, an empty answer, an answer both
    chosen and rejected, an empty prompt, half a character.
    """
    path = Path(path)
    rows = [_row(cells, f"{path.name}, row {number}") for number, cells in enumerate(_cells(path))]
    if not rows:
        raise AlroFastError(f"{path} holds no rows; {EXPECTED}")
    for number, row in enumerate(rows):
        _check(row, f"{path.name}, row {number}", need_rejected)
    records = _merged(rows, path.stem)
    repeated = sum(len(row.rejected) for row in rows) - sum(len(one.rejected) for one in records)
    if repeated:
        print(f"{path}: {repeated:,} rejected answers stand there twice for one user and prompt; each is taken once")
    return records


def with_first(count: int, one: Preference) -> Preference:
    """The record with its first `count` rejected answers, and with the prompts of these alone where each has its own.

    AlroFastError, naming the record, where it has fewer.
    """
    if len(one.rejected) < count:
        raise AlroFastError(
            f"{one.list_id} has {len(one.rejected)} rejected answers, fewer than --num_negatives {count}; lower it, or "
            "leave it out to take what each record has"
        )
    if not one.paired:
        return replace(one, rejected=one.rejected[:count])
    return replace(one, prompts=one.prompts[:count], chosen=one.chosen[:count], rejected=one.rejected[:count])


def two_items(answer: str, prompt: str) -> tuple[str, str] | None:
    """The two items that `answer` puts in order, "A , B", when the prompt names both at its end; None otherwise."""
    for comma in re.finditer(r"\s,\s+", answer):
        first, second = answer[: comma.start()].strip(), answer[comma.end() :].strip()
        if first and second and first != second and first in prompt and second in prompt:
            return first, second
    return None


def _cells(path: Path) -> Iterable[dict[str, Any]]:
    if not is_file(path):
        raise AlroFastError(f"no preference file {path}; expected a {', '.join(FORMATS)} file")
    if path.suffix == ".parquet":
        import polars as pl

        try:
            return pl.read_parquet(path, glob=False).to_dicts()
        except pl.exceptions.PolarsError as error:
            raise AlroFastError(f"{path} is no Parquet file ({str(error).splitlines()[0]})") from None
    if path.suffix not in FORMATS and path.is_file():  # a pipe has no name of its own
        raise AlroFastError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'}; expected {', '.join(FORMATS)}"
        )
    text = read_text(path, MOST_BYTES if path.is_file() else MOST_PIPED)
    if path.suffix == ".json" or (path.suffix != ".jsonl" and text.lstrip().startswith("[")):
        rows = from_json(text, str(path))
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [from_json(line, f"{path}, line {n}") for n, line in lines if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise AlroFastError(f"{path} is no list of rows; {EXPECTED}")
    return rows


def _row(cells: dict[str, Any], place: str) -> _Row:
    user = cells.get("user_id")
    user = None if user is None else str(user)
    if "instruction" in cells:
        return _alpaca(cells, place, user)
    if "chosen" not in cells:
        raise AlroFastError(f"{place} has the columns {', '.join(map(str, cells)) or 'none'}; {EXPECTED}")
    prompt, chosen, rejected = cells.get("prompt"), cells["chosen"], cells.get("rejected")
    if prompt is None:
        turns = _turns(chosen, place)
        if turns is None or len(turns) < 2:
            raise AlroFastError(f"{place} has no prompt; {EXPECTED}")
        prompt, begins = turns[:-1], len(turns) - 1
        for other in _each(rejected):
            if (_turns(other, place) or ())[:begins] != prompt:
                raise AlroFastError(
                    f"{place}: chosen and rejected begin with different messages; give the prompt apart"
                )
        chosen, rejected = chosen[begins:], [other[begins:] for other in _each(rejected)]
    elif not isinstance(prompt, str):
        prompt = _turns(prompt, place)
        if prompt is None:
            raise AlroFastError(f"{place}: prompt is neither a text nor a list of messages with role and content")
    chosen, rejected = (tuple(_answer(one, place) for one in _each(answers)) for answers in (chosen, rejected))
    return _Row(prompt, chosen, rejected, user)


def _alpaca(cells: dict[str, Any], place: str, user: str | None) -> _Row:
    for name in ("instruction", "input", "system"):
        if not isinstance(cells.get(name, ""), str) and (name == "instruction" or cells[name] is not None):
            raise AlroFastError(f"{place}: {name} is {cells[name]!r:.60}; expected a text")
    text = cells["instruction"]
    if cells.get("input"):
        text += "\n" + cells["input"]
    turns = [Turn("system", cells["system"])] if cells.get("system") else []
    history = cells.get("history") or []
    if not isinstance(history, list) or not all(map(_exchange, history)):
        raise AlroFastError(f"{place}: history is {history!r:.60}; expected a list of [question, answer] texts")
    for asked, answered in history:
        turns += [Turn("user", asked), Turn("assistant", answered)]
    prompt = (*turns, Turn("user", text))
    output = cells.get("output")
    if "chosen" in cells:
        output = [cells["chosen"], cells.get("rejected")]
    if isinstance(output, str):
        items = two_items(output, text)
        return _Row(prompt, (output,), (_swapped(output, *items),) if items else (), user)
    if not isinstance(output, list) or not output or len(output) > 2:
        raise AlroFastError(f"{place}: output is {output!r:.60}; expected a text, or the two texts [chosen, rejected]")
    chosen, rejected = output if len(output) == 2 else (output[0], None)
    return _Row(prompt, (_answer(chosen, place),), tuple(_answer(one, place) for one in _each(rejected)), user)


def _exchange(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _swapped(answer: str, first: str, second: str) -> str:
    """The other ordering, with the spaces and the comma of this one."""
    start, end = answer.index(first), answer.rindex(second)
    return answer[:start] + second + answer[start + len(first) : end] + first + answer[end + len(second) :]


def _each(answers: Any) -> list[Any]:
    """One answer or several: a list of strings, or of lists of messages, is several."""
    if answers is None:
        return []
    return answers if isinstance(answers, list) and not (answers and isinstance(answers[0], dict)) else [answers]


def _turns(messages: Any, place: str) -> tuple[Turn, ...] | None:
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        return None
    try:
        turns = tuple(Turn(one["role"], one["content"]) for one in messages)
    except KeyError as error:
        raise AlroFastError(f"{place}: a message lacks {error}; expected role and content") from None
    if not all(isinstance(part, str) for turn in turns for part in turn):
        raise AlroFastError(f"{place}: a message's role and content must be texts")
    return turns


def _answer(answer: Any, place: str) -> str:
    if isinstance(answer, str):
        return answer
    turns = _turns(answer, place)
    if turns is None or len(turns) != 1 or turns[0].role != "assistant":
        raise AlroFastError(f"{place}: an answer is {answer!r:.60}; expected a text, or one message of the assistant")
    return turns[0].content


def _check(row: _Row, place: str, need_rejected: bool) -> None:
    if not row.chosen:
        raise AlroFastError(f"{place} has no chosen answer; {EXPECTED}")
    if need_rejected and not row.rejected:
        raise AlroFastError(
            f"{place} has no rejected answer, which a preference loss compares with; {EXPECTED}, or train with "
            "--objective sft"
        )
    asked = (row.prompt,) if isinstance(row.prompt, str) else tuple(turn.content for turn in row.prompt)
    if _empty("".join(asked)):
        raise AlroFastError(f"{place}: the prompt is empty; a model needs something to answer")
    for text in (*asked, *row.chosen, *row.rejected):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise AlroFastError(f"{place}: {text!r:.60} holds half of a surrogate pair, which is no character; mend it")
    for kind, answers in (("chosen", row.chosen), ("rejected", row.rejected)):
        if any(map(_empty, answers)):
            raise AlroFastError(f"{place}: a {kind} answer is empty; every answer needs a text")
    both = set(row.chosen) & set(row.rejected)
    if both:
        raise AlroFastError(f"{place}: {both.pop()!r:.60} is chosen and rejected; an answer can be one of them only")


def _empty(text: str) -> bool:
    """True where nothing can be seen: spaces, and characters without width (Unicode category Cf)."""
    return all(letter.isspace() or unicodedata.category(letter) == "Cf" for letter in text)


def _merged(rows: Sequence[_Row], stem: str) -> list[Preference]:
    groups: dict[Any, list[_Row]] = {}
    stems: dict[Any, str | None] = {}
    for row in rows:
        asks = _pair_question(row)
        key = (row.user, row.prompt, row.chosen) if asks is None else (row.user, *asks)
        groups.setdefault(key, []).append(row)
        stems[key] = None if asks is None else asks[0]
    return [_record(stem, number, group, stems[key]) for number, (key, group) in enumerate(groups.items())]


def _pair_question(row: _Row) -> tuple[str, str] | None:
    """(the prompt before the two items, the chosen item) of a row that asks to order two items."""
    if len(row.chosen) != 1 or len(row.rejected) != 1:
        return None
    text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1].content
    items = two_items(row.chosen[0], text)
    if items is None or two_items(row.rejected[0], text) != items[::-1]:
        return None
    head = text[: min(text.rfind(item) for item in items)]
    earlier = "" if isinstance(row.prompt, str) else repr(row.prompt[:-1])
    return earlier + head, items[0]


def _record(stem: str, number: int, rows: Sequence[_Row], history: str | None) -> Preference:
    """One prompt shared by all answers, or, where rows ask about two items, a prompt per pair."""
    rows = list(dict.fromkeys(rows))
    prompts = tuple(dict.fromkeys(row.prompt for row in rows))
    rejected = tuple(answer for row in rows for answer in row.rejected)
    rejected = tuple(dict.fromkeys(rejected)) if len(prompts) == 1 else rejected
    chosen = rows[0].chosen if len(prompts) == 1 else tuple(row.chosen[0] for row in rows)
    if len(prompts) > 1:
        prompts = tuple(row.prompt for row in rows)
    user = rows[0].user
    if user is None:
        known = history if history is not None else repr(prompts[0])
        user = hashlib.blake2b(known.encode(), digest_size=8).hexdigest()
    return Preference(f"{stem}-{number}", user, prompts, chosen, rejected)
