"""A line of a template with values in it, as pieces that are encoded once and used again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from ...data.records import Item
from ..encoding import Encoder, Pieces
from ..template import placeholders

TITLES = ("title", "first", "second")  # placeholders that stand for an item; the others hold text of our own


class Sentence:
    """`text` with its placeholders filled in, then a line's end.

    An item's title is encoded apart from what surrounds it and cannot become a special token. Spaces before a value
    are encoded with the value, as they would be in running text.

    title: the text of an item. item_ids: the token of every item, which then stands in place of its title.
    """

    def __init__(
        self, encoder: Encoder, text: str, title: Callable[[Item], str], item_ids: Sequence[int] | None = None
    ) -> None:
        self._item_ids = item_ids
        # a literal, then a value (None: an item's token)
        self._parts: list[tuple[list[int], Pieces[Item | str] | None]] = []
        self._titles: list[Pieces[Item | str]] = []
        parts = placeholders(text)
        ending = parts.pop()[0] if parts and parts[-1][1] is None else ""
        before = "\n"
        for literal, field in parts:
            if field in TITLES and item_ids is not None:
                pieces, before_next = None, ""
            else:
                bare = literal.rstrip(" ")
                spaces, literal = literal[len(bare) :], bare
                pieces = _pieces(encoder, literal[-1:] or before, spaces, title if field in TITLES else None)
                self._titles += [pieces] if field in TITLES else []
                before_next = "x"
            self._parts.append((encoder.trusted_after(before, literal) if literal else [], pieces))
            before = before_next
        self._end = encoder.trusted_after(before, ending + "\n")

    def prepare(self, items: Iterable[Item]) -> None:
        """Encode the titles of these items together."""
        for pieces in self._titles:
            pieces.prepare(items)

    def ids(self, *values: Item | str) -> list[int]:
        """Token ids of the line with these values, in the order of its placeholders."""
        found: list[int] = []
        for (literal, pieces), value in zip(self._parts, values, strict=True):
            found += literal
            if pieces is None:
                found.append(cast(Sequence[int], self._item_ids)[cast(Item, value).index])
            else:
                found += pieces.ids[value] if value in pieces.ids else pieces.prepare([value])[value]
        return found + self._end


def _pieces(encoder: Encoder, anchor: str, spaces: str, title: Callable[[Item], str] | None) -> Pieces:
    """Values as they read after `anchor`: titles as untrusted text (`title`), or text of ours (None)."""
    if title is not None:
        return Pieces(lambda texts: encoder.plain_after(anchor, texts), lambda item: spaces + title(item))
    return Pieces(lambda texts: [encoder.trusted_after(anchor, text) for text in texts], lambda text: spaces + text)
