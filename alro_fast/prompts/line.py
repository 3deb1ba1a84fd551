"""The line of one item, cut into pieces that are encoded once and used again."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable

from ..data.records import Item
from .template import PromptTemplate, placeholders

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


class Line:
    """A line format of a template as `before` + [identifier] + `body(item)` + `ending(rating)`.

    A candidate line has no `ending`: its body runs through the line's end.
    """

    def __init__(self, template: PromptTemplate, key: str, markers: re.Pattern[str]):
        self._template, self._markers = template, markers
        parts = placeholders(template[key])
        self.before = ""
        if parts[0][1] == "identifier":
            self.before = parts[0][0]
            parts = parts[1:]
        fields = [field for _, field in parts]
        self._is_history = key.endswith("history_line")
        self._has_rating = "rating" in fields
        cut = fields.index("rating") if self._has_rating else len(parts)
        self._body = parts[:cut] + [(literal, None) for literal, _ in parts[cut : cut + 1]]
        self._after_rating = "".join(literal for literal, _ in parts[cut + 1 :])
        self.has_body = any(literal or field for literal, field in self._body)

    def body(self, item: Item) -> str:
        """What follows the identifier, up to the rating. An item without a title shows its id."""
        text = []
        for literal, field in self._body:
            text.append(literal)
            if field == "title":
                text.append(self._clean(item.title) or self._clean(item.item_id) or "untitled")
            elif field == "category" and (category := self._clean(item.category)):
                text.append(self._template["category"].format(category=category))
        return "".join(text) + ("" if self._is_history else "\n")

    def ending(self, rating: float | None) -> str:
        """What follows in a history line: the rating, if there is one, and the line's end."""
        text = ""
        if self._has_rating and rating is not None:
            text = self._template["rating"].format(rating=format(rating, self._template["rating_format"]))
        return text + self._after_rating + "\n"

    def _clean(self, text: str) -> str:
        return clean(text, self._markers)
