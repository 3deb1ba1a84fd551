"""The three ranking tasks of RecRanker (Luo et al., arXiv 2312.16018) as token ids.

    pointwise  one candidate: the grade that the user will give it
    pairwise   two candidates: will the user prefer the first one? Yes or no
    listwise   all candidates: the best five, best first

A prompt is a page about the user, a question, a hint where the list has hints, and the word Answer. Pointwise questions
follow the user's rated items, the other two the liked and the disliked ones; so all questions about a user continue one
of two pages, and share it as a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ...data.records import Item, RankingList, target_ranks
from ...errors import AlroFastError
from ..encoding import Encoder, Pieces, line_start
from ..identifiers import LETTERS, Answers, item_labels, labels_in_context, prove_answers
from ..line import clean, marker_pattern
from ..saved import SavedPrompts
from ..template import check_shown, placeholders
from ..turns import find_turns
from .sentence import Sentence
from .task_template import TaskTemplate, load_task_template, parse_task_template, ready_task_templates

IDENTIFIERS = ("letters", "items", "titles")
TOP = 5  # candidates that a listwise answer names
FEWEST_DISLIKED = 3  # fewer than these are not shown


class Ask(NamedTuple):
    """What to ask about one list. Candidates and history items by their numbers in the list."""

    source: RankingList
    points: Sequence[int] = ()
    pairs: Sequence[tuple[int, int]] = ()  # (named first, named second)
    orders: Sequence[Sequence[int]] = ()  # a listwise question for each: position p shows candidate orders[.][p]
    past: Sequence[int] | None = None  # in what order history items are shown; None: as stored


class Question(NamedTuple):
    """Follows a page; the answer follows `ids`. `answer_ids` is empty where the list's ratings do not tell it."""

    ids: list[int]
    answer_ids: list[int]


class Listing(NamedTuple):
    """A listwise question. `entries[i]`: the tokens that name candidate i in the answer, one of them unless titles."""

    ids: list[int]
    answer_ids: list[int]
    entries: list[list[int]]


class TaskPrompts(NamedTuple):
    """One list's questions in the order of its Ask. Points continue `rated_ids`, the others `liked_ids`."""

    rated_ids: list[int]
    liked_ids: list[int]
    points: list[Question]
    pairs: list[Question]
    listings: list[Listing]
    dropped_history: int  # oldest history items left out to keep within max_length


class RecRankerPrompts(SavedPrompts):
    """Writes the prompts of the three tasks for one tokenizer and template.

    Args:
        tokenizer: a tokenizer of the `tokenizers` library; its chat template is applied if it has one.
        template: name of a ready template of the tasks, or path of a YAML file.
        identifiers: how listwise answers name candidates: "letters" of the page, "titles" in quotes, or "items", one
            token per item, which then stands for its title everywhere.
        max_length: longest prompt and answer together, in tokens; oldest history items are dropped to keep to it.
        items: the catalogue, for "items": each must have its token.
        like, dislike: thresholds of liked and disliked ratings; None: the template's.
        hints: False leaves out the line of the hint, whatever hints a list has. A pair's hint compares the candidates'
            places with the retriever, where the list has them, else their hints; the other two tasks show hints.
        rated_items, liked_items, disliked_items: the newest so many of each are shown; 50, 50 and 10 are those of the
            authors' released prompt/make_train_prompt.py.

    Raises:
        AlroFastError: no such template or a mistake in it, or a tokenizer whose grades, Yes and No, or identifiers are
            not one distinct token each in their place.
    """

    FILE = "recranker.json"
    read_template = staticmethod(parse_task_template)
    find_template = staticmethod(load_task_template)
    ready_templates = staticmethod(ready_task_templates)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | Path | TaskTemplate = "movies",
        *,
        identifiers: str = "letters",
        max_length: int | None = None,
        items: Sequence[Item] | None = None,
        like: float | None = None,
        dislike: float | None = None,
        hints: bool = True,
        rated_items: int = 50,
        liked_items: int = 50,
        disliked_items: int = 10,
    ) -> None:
        if identifiers not in IDENTIFIERS:
            raise AlroFastError(f"identifiers {identifiers!r}: expected one of {', '.join(IDENTIFIERS)}")
        text = template if isinstance(template, TaskTemplate) else load_task_template(template)
        self.template, self.identifiers, self.max_length = text, identifiers, max_length
        self.like = text.like if like is None else like
        self.dislike = text.dislike if dislike is None else dislike
        if not self.dislike < self.like:
            raise AlroFastError(f"dislike is {self.dislike:g} and like {self.like:g}; expected dislike < like")
        self.hints = hints
        self.rated_items, self.liked_items, self.disliked_items = rated_items, liked_items, disliked_items
        self._encoder = encoder = Encoder(tokenizer)
        self._turns = turns = find_turns(encoder, text["system"])
        self._markers = marker_pattern(turns.markers)
        self._item_ids: list[int] | None = None
        if identifiers == "items":
            labels = item_labels(encoder, None if items is None else len(items))
            self._item_ids = self._encoder.ids_of(labels)
        head = turns.before + _lines(text["introduction"])
        self._rated = turns.start + encoder.trusted([head + _lines(text["rated"])])[0]
        self._liked = turns.start + encoder.trusted([head + _lines(text["liked"])])[0]
        task, disliked, none = _lines(text["point.task"]), _lines(text["disliked"]), _lines(text["none"])
        self._task = encoder.trusted_after("\n", task) if task else []
        self._disliked, self._none = (encoder.trusted_after("\n", part) for part in (disliked, none))
        self._lead_in = turns.between.removeprefix("\n")  # every question ends its line
        self._rated_line = self._sentence("rated_line")
        self._title_line = self._sentence("title_line")
        self._point, self._point_hint = self._sentence("point.question"), self._sentence("point.hint")
        self._pair, self._pair_hint = self._sentence("pair.question"), self._sentence("pair.hint")
        self._point_tail, grades = self._choices("point.answer", list(text.grades))
        if any(len(ids) > 1 for ids in grades):
            raise AlroFastError(
                f"tokenizer {encoder.name!r} has no single token for each of the grades {', '.join(text.grades)}; "
                "choose other texts for point.grades in the prompt template"
            )
        self._pair_tail, self._words = self._choices("pair.answer", [text["pair.first"], text["pair.second"]])
        self.grade_ids = [ids[0] for ids in grades]
        self.choice_ids = [word[0] for word in self._words]
        self._list = _ListTask(self)

    @property
    def signals(self) -> dict[str, tuple[str, ...]]:
        """Names of the signals that prompts show, where a list has them."""
        return {"candidates": ("hint", "retriever")} if self.hints else {}

    @property
    def max_candidates(self) -> int:
        """The longest list that can be asked about listwise."""
        return self._list.max_candidates

    @property
    def grade_values(self) -> list[float]:
        """The rating each grade stands for."""
        return list(self.template.grades.values())

    def encode(self, asks: Sequence[Ask]) -> list[TaskPrompts]:
        """Prompts of many lists, new titles encoded in batches."""
        for ask in asks:
            self._check(ask)
        history = list(dict.fromkeys(chain.from_iterable(ask.source.history for ask in asks)))
        candidates = list(dict.fromkeys(chain.from_iterable(ask.source.candidates for ask in asks)))
        for sentence in (self._rated_line, self._title_line):
            sentence.prepare(history)
        for sentence in (self._point, self._pair):
            sentence.prepare(candidates)
        self._list.prepare(candidates)
        return [self._encode(ask) for ask in asks]

    def text(self, ask: Ask) -> list[tuple[str, str]]:
        """Prompt and answer of every question of an Ask, for people to read."""
        made = self.encode([ask])[0]
        rows = [(made.rated_ids + one.ids, one.answer_ids) for one in made.points]
        rows += [(made.liked_ids + one.ids, one.answer_ids) for one in made.pairs]
        rows += [(made.liked_ids + one.ids, one.answer_ids) for one in made.listings]
        decode = self._encoder.text_of
        return [(decode(prompt), decode(answer)) for prompt, answer in rows]

    def liked(self, source: RankingList) -> list[int]:
        """Candidates that carry a liked rating."""
        return [i for i, rating in enumerate(source.ratings) if rating >= self.like]

    # ---- questions

    def _encode(self, ask: Ask) -> TaskPrompts:
        source = ask.source
        points = [self._ask_point(source, i) for i in ask.points]
        pairs = [self._ask_pair(source, first, second) for first, second in ask.pairs]
        listings = [self._list.ask(source, order) for order in ask.orders]
        rated_ids, few = self._page(ask, self._rated_page, points)
        liked_ids, fewer = self._page(ask, self._liked_page, [*pairs, *listings])
        return TaskPrompts(rated_ids, liked_ids, points, pairs, listings, max(few, fewer))

    def _ask_point(self, source: RankingList, i: int) -> Question:
        ids = self._point.ids(source.candidates[i])
        if self.hints and source.hints:
            ids += self._point_hint.ids(self._shown_hint(source.hints[i]))
        rating = source.ratings[i]
        return Question(ids + self._point_tail, [] if math.isnan(rating) else [self._grade(source, rating), self.end])

    def _ask_pair(self, source: RankingList, first: int, second: int) -> Question:
        ids = self._pair.ids(source.candidates[first], source.candidates[second])
        words = self.template["pair.first"], self.template["pair.second"]
        if self.hints and (hints := source.signal("retriever").candidates or source.hints):
            a, b = hints[first], hints[second]
            unknown = math.isnan(a) or math.isnan(b) or a == b
            ids += self._pair_hint.ids(self.template["unknown"] if unknown else words[a < b])
        ratings = [-math.inf if math.isnan(source.ratings[i]) else source.ratings[i] for i in (first, second)]
        known = ratings[0] != ratings[1]
        return Question(ids + self._pair_tail, [*self._words[ratings[0] < ratings[1]], self.end] if known else [])

    def _shown_hint(self, hint: float) -> str:
        return self.template["unknown"] if math.isnan(hint) else format(hint, self.template["hint_format"])

    def _grade(self, source: RankingList, rating: float) -> int:
        for token, value in zip(self.grade_ids, self.grade_values):
            if abs(value - rating) < 1e-6:
                return token
        raise AlroFastError(
            f"list {source.list_id!r} has a candidate rated {rating:g}, which is none of the grades "
            f"{', '.join(f'{value:g}' for value in self.grade_values)} of prompt template {self.template.name!r}; give "
            "--template a YAML file of your own whose point.grades hold every rating of the data (docs/recranker.md)"
        )

    # ---- pages

    def _page(
        self, ask: Ask, page: Callable[[Ask, int], list[int]], questions: Sequence[Question | Listing]
    ) -> tuple[list[int], int]:
        """The page with as many of the newest history items as leave room for the longest question and its answer."""
        if not questions:
            return [], 0
        total = len(ask.source.history)
        ids = page(ask, 0)
        if self.max_length is None:
            return ids, 0
        room = self.max_length - max(len(one.ids) + max(len(one.answer_ids), 1) for one in questions)
        dropped = 0
        while len(ids) > room and dropped < total:
            dropped += 1
            ids = page(ask, dropped)
        if len(ids) > room:
            raise AlroFastError(
                f"list {ask.source.list_id!r}: its longest question needs {len(ids) - room} tokens more than "
                f"max_length {self.max_length} allows, without any history; raise max_length or lower the list size"
            )
        return ids, dropped

    def _rated_page(self, ask: Ask, dropped: int) -> list[int]:
        source = ask.source
        kept = self._newest(source, self.rated_items, dropped, lambda rating: not math.isnan(rating))
        ids = list(self._rated)
        for h in _in_order(kept, ask.past):
            ids += self._rated_line.ids(
                source.history[h], format(source.history_ratings[h], self.template["rating_format"])
            )
        return ids + ([] if kept else self._none) + self._task

    def _liked_page(self, ask: Ask, dropped: int) -> list[int]:
        source = ask.source
        liked = self._newest(source, self.liked_items, dropped, lambda rating: rating >= self.like)
        disliked = self._newest(source, self.disliked_items, dropped, lambda rating: rating <= self.dislike)
        ids = list(self._liked)
        for h in _in_order(liked, ask.past):
            ids += self._title_line.ids(source.history[h])
        ids += ([] if liked else self._none) + self._disliked
        if len(disliked) < FEWEST_DISLIKED:
            return ids + self._none
        for h in _in_order(disliked, ask.past):
            ids += self._title_line.ids(source.history[h])
        return ids

    def _newest(self, source: RankingList, limit: int, dropped: int, wanted: Callable[[float], bool]) -> list[int]:
        """The newest `limit` history items with a wanted rating; the `dropped` oldest of the history are left out."""
        found = [h for h in range(dropped, len(source.history)) if wanted(source.history_ratings[h])]
        return found[max(0, len(found) - limit) :]

    # ---- small things

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return self._turns.end

    def title(self, item: Item) -> str:
        """An item's title as prompts show it: one line without markers; its id where it has none."""
        return clean(item.title, self._markers) or clean(item.item_id, self._markers) or "untitled"

    def _sentence(self, key: str) -> Sentence:
        return Sentence(self._encoder, self.template[key], self.title, self._item_ids)

    def _choices(self, key: str, words: list[str]) -> tuple[list[int], list[list[int]]]:
        """Ids that end the prompt of an answer form, and those of each word there; their first ones are distinct."""
        tail = self._lead_in + placeholders(self.template[key])[0][0]
        newline, n = line_start(self._encoder.trusted, tail)
        start, *written = self._encoder.trusted([newline + tail, *(newline + tail + word for word in words)])
        left = start if all(ids[: len(start)] == start for ids in written) else start[:-1]  # its space joins the words
        found = [ids[len(left) :] for ids in written if ids[: len(left)] == left]
        if len({ids[0] for ids in found if ids and ids[0] != self._encoder.unk}) < len(words):
            raise AlroFastError(
                f"tokenizer {self._encoder.name!r} does not tell {', '.join(words)} apart by their first tokens after "
                f"{tail!r}; choose other texts for {key} in the prompt template"
            )
        return left[n:], found

    def _check(self, ask: Ask) -> None:
        source, m = ask.source, len(ask.source.candidates)
        if not m or len(source.ratings) != m or len(source.hints) not in (0, m):
            raise AlroFastError(
                f"list {source.list_id!r} has {m} candidates, {len(source.ratings)} ratings and {len(source.hints)} "
                "hints; expected a candidate at least, a rating (or NaN) for each, and hints for all or none"
            )
        if len(source.history) != len(source.history_ratings):
            raise AlroFastError(
                f"list {source.list_id!r} has {len(source.history)} history items with "
                f"{len(source.history_ratings)} ratings; expected one for each"
            )
        check_shown(self.template, source.list_id, source.history_ratings)
        for order in ask.orders:
            if sorted(order) != list(range(m)):
                raise AlroFastError(f"list {source.list_id!r}: order {list(order)} is no permutation of its candidates")
        if ask.orders and m > self.max_candidates:
            raise AlroFastError(
                f"list {source.list_id!r} has {m} candidates, but tokenizer {self._encoder.name!r} has single-token "
                f"letters for {self.max_candidates}; give fewer candidates, or identifiers: items or titles"
            )
        if self._item_ids is not None:
            for item in chain(source.history, source.candidates):
                if not 0 <= item.index < len(self._item_ids):
                    raise AlroFastError(
                        f"list {source.list_id!r}: item {item.item_id!r} has index {item.index}, but tokenizer "
                        f"{self._encoder.name!r} has item tokens for 0 to {len(self._item_ids) - 1}"
                    )

    @staticmethod
    def options_of(record: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the prompts that `record` is of."""
        return dict(record["options"])

    def record(self) -> dict[str, Any]:
        """What recranker.json holds: options, and the tokens that came of them."""
        names = ("identifiers", "max_length", "like", "dislike", "rated_items", "liked_items", "disliked_items")
        return {
            "template": self.template.name,
            "tokenizer": self._encoder.fingerprint(),
            "turns": self._turns.record(),
            "options": {name: getattr(self, name) for name in names} | ({} if self.hints else {"hints": False}),
            "grade_ids": self.grade_ids,
            "choice_ids": self.choice_ids,
        }


class _ListTask:
    """Listwise questions: candidate lines, the hint and the answer name candidates in the same tokens."""

    def __init__(self, prompts: RecRankerPrompts) -> None:
        self._prompts = prompts
        text, encoder, kind = prompts.template, prompts._encoder, prompts.identifiers
        line = text[f"list.{kind}_line"]
        self._head = encoder.trusted_after("\n", _lines(text["list.question"]))
        separator = text[f"list.{kind}_separator"]
        hint, tail = placeholders(text["list.hint"])[0][0], placeholders(text["list.answer"])[0][0]
        self._unknown = encoder.trusted_after("\n", hint + text["unknown"] + "\n")
        self._newline = encoder.trusted_after("x", "\n")
        self._titles = kind == "titles"
        if self._titles:
            self.max_candidates = 1 << 20
            self._line = Sentence(encoder, line, prompts.title)
            self._quoted: Pieces[Item] = Pieces(
                lambda texts: encoder.plain_after(" ", texts), lambda item: f'"{prompts.title(item)}"'
            )
            between = encoder.trusted_after('"', separator)
            self._answer, self._hint = (
                Answers(encoder.trusted_after("\n", lead), [], between, prompts.end)
                for lead in (prompts._lead_in + tail, hint)
            )
            return
        items = kind == "items"
        lead, rest = placeholders(line)[0][0], placeholders(line)[1:]
        if prompts._item_ids is not None:
            labels: Sequence[str] = item_labels(encoder, len(prompts._item_ids))
            self._line_ids, self._line_lead = prompts._item_ids, encoder.plain_after("\n", [lead])[0] if lead else []
            after = ""
        else:
            newline, n = line_start(encoder.plain, lead)
            shown = labels_in_context(encoder.plain, newline + lead, LETTERS, "", encoder.unk)
            labels = LETTERS[: len(shown.ids)]
            self._line_ids, self._line_lead = shown.ids, shown.left[n:]
            after = newline + lead + LETTERS[0]
        body = "".join(literal + ("{title}" if field else "") for literal, field in rest) + "\n"
        self._bodies: Pieces[Item] = Pieces(
            lambda texts: encoder.plain_after(after, texts),
            lambda item: body.replace("{title}", "" if items else prompts.title(item)),
        )
        self._answer, self._hint = (
            prove_answers(encoder, form, labels, separator, prompts.end, items)
            for form in (prompts._lead_in + tail, hint)
        )
        self.max_candidates = min(len(self._answer.ids), len(self._hint.ids), len(self._line_ids))
        if self.max_candidates < 2:
            raise AlroFastError(
                f"tokenizer {encoder.name!r} has no single-token {kind}: the first two are not one distinct token each "
                f"in {line!r} and in {text['list.answer']!r} with the separator {separator!r}; use another tokenizer, "
                "other lines in the prompt template, or other identifiers"
            )

    def prepare(self, items: Iterable[Item]) -> None:
        """Encode the titles of these items together."""
        if self._titles:
            self._line.prepare(items)
            self._quoted.prepare(items)
        else:
            self._bodies.prepare(items)

    def ask(self, source: RankingList, order: Sequence[int]) -> Listing:
        """The question with candidates in `order`; its answer names the best rated, TOP of them at most."""
        ids, lines = list(self._head), source.candidates
        for position, i in enumerate(order):
            if self._titles:
                ids += self._line.ids(lines[i])
            else:
                ids += self._line_lead
                ids.append(self._line_ids[self._number(lines[i], position)])
                ids += self._bodies.ids[lines[i]]
        entries = self._entries(source, order, self._answer)
        if self._prompts.hints and source.hints:
            best = _best(source.hints)
            named = self._entries(source, order, self._hint)
            spelled = self._spell([named[i] for i in best], self._hint)[:-1]
            ids += [*self._hint.tail, *spelled, *self._newline] if best else self._unknown
        ranks = target_ranks(source.ratings, [item.item_id for item in lines])
        rated = sum(not math.isnan(rating) for rating in source.ratings)
        top = sorted(range(len(lines)), key=ranks.__getitem__)[: min(TOP, rated)]
        answer = self._spell([entries[i] for i in top], self._answer) if top else []
        return Listing(ids + self._answer.tail, answer, entries)

    def _entries(self, source: RankingList, order: Sequence[int], form: Answers) -> list[list[int]]:
        """The tokens that name each candidate in an answer or a hint."""
        if self._titles:
            return [self._quoted.ids[item] for item in source.candidates]
        entries: list[list[int]] = [[]] * len(order)
        for position, i in enumerate(order):
            entries[i] = [form.ids[self._number(source.candidates[i], position)]]
        return entries

    def _number(self, item: Item, position: int) -> int:
        return item.index if self._prompts.identifiers == "items" else position

    def _spell(self, entries: Sequence[list[int]], form: Answers) -> list[int]:
        spaced = chain.from_iterable(form.between + entry for entry in entries)
        return [*spaced, form.end][len(form.between) :]


def _best(hints: Sequence[float]) -> list[int]:
    """The TOP candidates with the highest known hints, best first; equal ones in the list's order."""
    known = [i for i, hint in enumerate(hints) if not math.isnan(hint)]
    return sorted(known, key=lambda i: -hints[i])[:TOP]


def _in_order(kept: Sequence[int], past: Sequence[int] | None) -> Sequence[int]:
    if past is None:
        return kept
    wanted = set(kept)
    return [h for h in past if h in wanted]


def _lines(*texts: str) -> str:
    return "".join(text + "\n" for text in texts if text)
