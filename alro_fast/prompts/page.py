"""What a reader of the prompt sees: history lines, then candidate lines, as text and as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

from ..data.records import Item, RankingList
from ..errors import AlroFastError
from .encoding import Encoder, Pieces, line_start
from .identifiers import LETTERS, item_labels, labels_in_context
from .line import Beside, Line, marker_pattern
from .template import PromptTemplate
from .turns import Turns


class Page:
    """Everything before the question, as a concatenation of separately encoded pieces.

    Pieces: the text before the history; per history line its item, then its signals and rating; the text before the
    candidates; per candidate line its identifier, its item, its signals. So no title can reach beyond its line, an
    identifier is always one token, and a line costs the same tokens wherever it stands.

    `labels` are those with a token of their own in a candidate line.
    """

    def __init__(self, encoder: Encoder, template: PromptTemplate, turns: Turns, kind: str, n_items: int | None):
        self._encoder = encoder
        self.by_item = kind == "items"
        self._head_text = turns.before + _lines(template["introduction"], template["history"])
        self._middle_text = _lines(template["candidates"])
        self._head = turns.start + encoder.trusted([self._head_text])[0]
        self._middle = encoder.trusted_after("\n", self._middle_text)
        markers = marker_pattern(turns.markers)
        self._history = Line(template, f"{kind}.history_line", markers)
        self._candidate = Line(template, f"{kind}.candidate_line", markers)
        lead = self._candidate.before
        if self.by_item:
            self.labels = item_labels(encoder, n_items)
            self.label_ids = encoder.ids_of(self.labels)
            self._history_lead, self._candidate_lead = encoder.plain_after("\n", [self._history.before, lead])
            history_anchor = candidate_anchor = ""  # an added token cuts the text: what follows it stands alone
        else:
            newline, n = line_start(encoder.plain, lead)
            shown = labels_in_context(encoder.plain, newline + lead, LETTERS, "", encoder.unk)
            self.labels, self.label_ids = list(LETTERS[: len(shown.ids)]), shown.ids
            self._history_lead, self._candidate_lead = [], shown.left[n:]
            history_anchor, candidate_anchor = "\n", newline + lead + LETTERS[0]
        self._history_pieces = Pieces(partial(encoder.plain_after, history_anchor), self._history.body)
        self._candidate_pieces = Pieces(partial(encoder.plain_after, candidate_anchor), self._candidate.body)
        self._bare_pieces = Pieces(partial(encoder.plain_after, candidate_anchor), self._candidate.bare)
        history_anchor, candidate_anchor = (
            "x" if line.has_body else anchor
            for line, anchor in ((self._history, history_anchor), (self._candidate, candidate_anchor))
        )
        self._rating_pieces = Pieces(partial(encoder.plain_after, history_anchor), self._history.ending)
        self._signal_pieces = Pieces(partial(encoder.plain_after, candidate_anchor), self._candidate.ending)

    @property
    def signals(self) -> dict[str, tuple[str, ...]]:
        """Names of the signals that "history" and "candidates" lines show."""
        return {"history": self._history.signals, "candidates": self._candidate.signals}

    def prepare(self, lists: Sequence[RankingList]) -> None:
        """Encode what `ids` of these lists will need."""
        shown = [pair for one in lists for pair in zip(one.candidates, self._candidate.beside(one, "candidates"))]
        self._bare_pieces.prepare(item for item, beside in shown if not beside.signals)
        self._candidate_pieces.prepare(item for item, beside in shown if beside.signals)
        self._signal_pieces.prepare(beside for _, beside in shown if beside.signals)
        self._history_pieces.prepare(chain.from_iterable(one.history for one in lists))
        self._rating_pieces.prepare(chain.from_iterable(self._history.beside(one, "history") for one in lists))

    def check(self, one: RankingList) -> None:
        """Raise if an item of the list has no token of its own (item labels only)."""
        if not self.by_item:
            return
        for item in chain(one.history, one.candidates):
            if not 0 <= item.index < len(self.labels):
                raise AlroFastError(
                    f"list {one.list_id!r}: item {item.item_id!r} has index {item.index}, but tokenizer "
                    f"{self._encoder.name!r} has item tokens for 0 to {len(self.labels) - 1}"
                )
        if len({item.index for item in one.candidates}) != len(one.candidates):
            raise AlroFastError(f"list {one.list_id!r} names one item twice among its candidates")

    def ids(self, one: RankingList, order: Sequence[int], max_length: int | None) -> tuple[list[int], int]:
        """The page's tokens, at most `max_length`, and how many of the oldest history items that left out."""
        shown: list[int] = []
        beside = self._candidate.beside(one, "candidates")
        for position, i in enumerate(order):
            item = one.candidates[i]
            shown += self._candidate_lead
            shown.append(self.label_ids[item.index if self.by_item else position])
            if beside[i].signals:
                shown += self._candidate_pieces.ids[item]
                shown += self._signal_pieces.ids[beside[i]]
            else:
                shown += self._bare_pieces.ids[item]
        lines = [
            self._history_ids(item, rated) for item, rated in zip(one.history, self._history.beside(one, "history"))
        ]
        dropped = 0
        if max_length is not None:
            excess = len(self._head) + sum(map(len, lines)) + len(self._middle) + len(shown) - max_length
            while excess > 0 and dropped < len(lines):
                excess -= len(lines[dropped])
                dropped += 1
            if excess > 0:
                raise AlroFastError(
                    f"list {one.list_id!r}: its {len(order)} candidates need {excess} tokens more than max_length "
                    "allows, without any history; raise max_length or lower list_size"
                )
        ids = self._head.copy()
        for line in lines[dropped:]:
            ids += line
        ids += self._middle
        ids += shown
        return ids, dropped

    def text(self, one: RankingList, order: Sequence[int], dropped: int) -> str:
        """The page as text."""
        history, candidate = self._history, self._candidate
        seen = list(zip(one.history, history.beside(one, "history")))[dropped:]
        beside = candidate.beside(one, "candidates")
        past = (
            history.before + (self.label(item, 0) if self.by_item else "") + history.body(item) + history.ending(rated)
            for item, rated in seen
        )
        shown = (
            candidate.before
            + self.label(one.candidates[i], position)
            + candidate.body(one.candidates[i])
            + candidate.ending(beside[i])
            for position, i in enumerate(order)
        )
        return "".join((self._head_text, *past, self._middle_text, *shown))

    def label(self, item: Item, position: int) -> str:
        """The identifier of an item presented at `position`."""
        return self.labels[item.index if self.by_item else position]

    def _history_ids(self, item: Item, beside: Beside) -> list[int]:
        rest = self._history_pieces.ids[item] + self._rating_pieces.ids[beside]
        return [*self._history_lead, self.label_ids[item.index], *rest] if self.by_item else rest


def _lines(*texts: str) -> str:
    return "".join(text + "\n" for text in texts if text)
