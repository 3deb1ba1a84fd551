"""The line of one item, cut into pieces that are encoded once and used again."""

from __future__ import annotations

import math
import unicodedata

from ..data.records import Item
from .template import PromptTemplate, placeholders


def clean(text: str) -> str:
    """One line of visible text: whitespace, line and control characters become single spaces, format ones vanish.

    Format characters (Unicode Cf: zero-width, bidirectional, tag characters) and lone surrogates carry nothing a
    reader sees, and could hide text from one.
    """
    if not text.isprintable():
        kept = []
        for character in text:
            category = unicodedata.category(character)
            if category not in {"Cf", "Cs"}:
                kept.append(" " if category == "Cc" or category[0] == "Z" else character)
        text = "".join(kept)
    return " ".join(text.split())


def shown_rating(rating: float) -> float | None:
    """The rating a history line shows; None for an item without one."""
    return None if math.isnan(rating) else rating


class Line:
    """A line format of a template as `before` + [identifier] + `body(item)` + `ending(rating)`.

    A candidate line has no `ending`: its body runs through the line's end.
    """

    def __init__(self, template: PromptTemplate, key: str):
        self._template = template
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
                text.append(clean(item.title) or clean(item.item_id) or "untitled")
            elif field == "category" and (category := clean(item.category)):
                text.append(self._template["category"].format(category=category))
        return "".join(text) + ("" if self._is_history else "\n")

    def ending(self, rating: float | None) -> str:
        """What follows in a history line: the rating, if there is one, and the line's end."""
        text = ""
        if self._has_rating and rating is not None:
            text = self._template["rating"].format(rating=format(rating, self._template["rating_format"]))
        return text + self._after_rating + "\n"
