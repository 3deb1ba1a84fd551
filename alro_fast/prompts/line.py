"""The line of one item, cut into pieces that are encoded once and used again."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from ..data.records import Item, RankingList
from ..data.signal_table import SIGNALS
from .template import PromptTemplate, placeholders, signal_text

BYTE_TOKEN = "<0x[0-9A-F]{2}>"  # how SentencePiece vocabularies name a byte, a newline among them


def marker_pattern(markers: Iterable[str] = ()) -> re.Pattern[str]:
    """Matches the names of byte tokens and these markers, in any case."""
    longest_first = sorted(markers, key=len, reverse=True)
    return re.compile("|".join([BYTE_TOKEN, *map(re.escape, longest_first)]), re.IGNORECASE)


def clean(text: str, markers: re.Pattern[str] = marker_pattern()) -> str:  # noqa: B008 (immutable)
    """One line of visible text in which no marker is left.

    Whitespace, line and control characters become single spaces. Format characters (Unicode Cf: zero-width,
    bidirectional, tag characters) and lone surrogates, which carry nothing a reader sees and could hide text from
    one, vanish. A marker gets a space before its last character, also where only compatibility forms (full-width
    brackets, say) spell it.
    """
    if not text.isprintable():
        kept = []
        for character in text:
            category = unicodedata.category(character)
            if category not in {"Cf", "Cs"}:
                kept.append(" " if category == "Cc" or category[0] == "Z" else character)
        text = "".join(kept)
    text = " ".join(text.split())
    folded = unicodedata.normalize("NFKC", text)
    while markers.search(folded):
        text = folded = markers.sub(lambda match: f"{match[0][:-1]} {match[0][-1]}", folded)
    return text


def shown_rating(rating: float) -> float | None:
    """The rating a history line shows; None for an item without one."""
    return None if math.isnan(rating) else rating


class Beside(NamedTuple):
    """What stands beside an item: its rating, and a text for every signal that its line shows; (): none is known."""

    rating: float | None = None
    signals: tuple[str, ...] = ()


class Line:
    """A line format of a template as `before` + [identifier] + `body(item)` + `ending(beside)`.

    signals: names of the signals it shows.
    """

    def __init__(self, template: PromptTemplate, key: str, markers: re.Pattern[str]):
        self._template, self._markers = template, markers
        parts = placeholders(template[key])
        self.before = ""
        if parts[0][1] == "identifier":
            self.before = parts[0][0]
            parts = parts[1:]
        fields = [field for _, field in parts]
        cut = next((at for at, field in enumerate(fields) if field == "rating" or field in SIGNALS), len(parts))
        self._body = parts[:cut] + [(literal, None) for literal, _ in parts[cut : cut + 1]]
        after = [literal for literal, _ in parts[cut + 1 :]]
        self._tail = list(zip(fields[cut:], [*after, ""]))  # a field, and the text after it
        self.signals = tuple(field for field in fields[cut:] if field in SIGNALS)
        self.has_body = any(literal or field for literal, field in self._body)

    def body(self, item: Item) -> str:
        """What follows the identifier, up to signals and rating. An item without a title shows its id."""
        text = []
        for literal, field in self._body:
            text.append(literal)
            if field == "title":
                text.append(self._clean(item.title) or self._clean(item.item_id) or "untitled")
            elif field == "category" and (category := self._clean(item.category)):
                text.append(self._template["category"].format(category=category))
        return "".join(text)

    def ending(self, beside: Beside) -> str:
        """What follows: signals and rating, where there are any, and the line's end."""
        text, values = "", dict(zip(self.signals, beside.signals))
        for field, after in self._tail:
            if field in SIGNALS:
                text += values.get(field, "")
            elif field == "rating" and beside.rating is not None:
                text += self._template["rating"].format(rating=format(beside.rating, self._template["rating_format"]))
            text += after
        return text + "\n"

    def bare(self, item: Item) -> str:
        """Body and ending of an item with nothing beside it."""
        return self.body(item) + self.ending(Beside())

    def beside(self, one: RankingList, part: str) -> list[Beside]:
        """What stands beside each item of a list's "history" or "candidates"."""
        ratings = map(shown_rating, one.history_ratings) if part == "history" else [None] * len(one.candidates)
        columns = [getattr(one.signal(name), part) for name in self.signals]
        if not any(columns):
            return [Beside(rating) for rating in ratings]
        unknown = [math.nan] * len(getattr(one, part))
        texts = [
            [signal_text(self._template, name, value) for value in column or unknown]
            for name, column in zip(self.signals, columns)
        ]
        return [Beside(rating, shown if any(shown) else ()) for rating, shown in zip(ratings, zip(*texts, strict=True))]

    def _clean(self, text: str) -> str:
        return clean(text, self._markers)
