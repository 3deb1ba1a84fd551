"""Ranking list -> prompt and answer as token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.records import Item, RankingList, target_ranks
from ..errors import AlroFastError
from .encoding import Encoder
from .identifiers import Grading, prove_answers, prove_grading
from .page import Page
from .saved import SavedPrompts
from .template import PromptTemplate, check_shown, load_template, parse_template, placeholders, ready_templates
from .turns import find_turns

CHUNK = 1024  # lists whose new pieces are encoded together


@dataclass(slots=True)
class RankingPrompt:
    """The `ranking` answer form of one list in one order. Token ids; the training sequence is prompt + answer."""

    prompt_ids: list[int]
    answer_ids: list[int]  # identifiers in target order, then the end of text or turn; slot 0 is answer_ids[0]
    slot_offsets: list[int]  # slot k's identifier is answer_ids[slot_offsets[k]]
    candidate_ids: list[int]  # identifier token of candidate i, i as in the list (not as presented)
    ranks: list[int]  # target slot of candidate i, 1 = best
    dropped_history: int  # oldest history items left out to keep within max_length


@dataclass(slots=True)
class RatingBranch:
    """One candidate's question and grade: continues RatingPrompt.prompt_ids, sees no other branch."""

    question_ids: list[int]
    answer_ids: list[int]  # the grade's token; empty for an unrated candidate, which has no label
    grade_offset: int  # where in answer_ids the grade is, or would be


@dataclass(slots=True)
class RatingPrompt:
    """The `ratings` answer form of one list in one order; `branches` and `ranks` are on the list's own axis."""

    prompt_ids: list[int]
    branches: list[RatingBranch]
    grade_ids: list[int]  # token of grade c
    grade_values: list[float]  # the rating it stands for
    ranks: list[int]
    dropped_history: int


class PromptBuilder(SavedPrompts):
    """Writes prompts for one tokenizer and template.

    Training and inference both use these ids. They are made from pieces (see Page) and equal the tokenizer's own ids
    of `text()` unless it merges characters across pieces, as a vocabulary with a token "A." would.

    Args:
        tokenizer: a tokenizer of the `tokenizers` library; its chat template is applied if it has one.
        template: name of a ready template, or path of a YAML file.
        identifiers: "letters" (presented position p is the p-th letter) or "items" (item i is the token <item_i>).
        max_length: longest prompt and answer together, in tokens; oldest history items are dropped to keep to it.
        items: the catalogue, for "items": each must have its token (None: as many as the tokenizer has).

    Raises:
        AlroFastError: no such template or a mistake in it, or a tokenizer without single-token identifiers for it.
    """

    FILE = "identifiers.json"
    read_template = staticmethod(parse_template)
    find_template = staticmethod(load_template)
    ready_templates = staticmethod(ready_templates)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | Path | PromptTemplate,
        *,
        identifiers: str = "letters",
        max_length: int | None = None,
        items: Sequence[Item] | None = None,
    ):
        if identifiers not in {"letters", "items"}:
            raise AlroFastError(f"identifiers {identifiers!r}: expected letters or items")
        self.template = text = template if isinstance(template, PromptTemplate) else load_template(template)
        self.identifiers, self.max_length = identifiers, max_length
        self._encoder = encoder = Encoder(tokenizer)
        self._turns = find_turns(encoder, text["system"])
        self._page = page = Page(encoder, text, self._turns, identifiers, None if items is None else len(items))
        self._separator = text[f"{identifiers}.separator"]
        self._answers = prove_answers(
            encoder, self._tail("ranking"), page.labels, self._separator, self._turns.end, page.by_item
        )
        self.labels = page.labels[: len(self._answers.ids)]
        if not self.labels:
            raise AlroFastError(
                f"tokenizer {encoder.name!r} has no single-token {identifiers}: the first two are not one distinct "
                f"token each in {text[f'{identifiers}.candidate_line']!r} and in {text['ranking.answer']!r} with the "
                f"separator {self._separator!r}; use another tokenizer, other lines in the prompt "
                "template, or other identifiers"
            )

    @property
    def max_candidates(self) -> int:
        """The longest list this tokenizer has identifiers for."""
        return len(self.labels)

    @property
    def signals(self) -> dict[str, tuple[str, ...]]:
        """Names of the signals that "history" and "candidates" lines show, where a list has them."""
        return self._page.signals

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return self._turns.end

    @property
    def grade_ids(self) -> list[int]:
        """Token of each grade of the `ratings` form; AlroFastError if the tokenizer lacks one."""
        return self._grading.grade_ids

    @property
    def grade_values(self) -> list[float]:
        """The rating each grade stands for."""
        return list(self.template.grades.values())

    def ranking(self, ranking_list: RankingList, order: Sequence[int] | None = None) -> RankingPrompt:
        """The `ranking` form; presented position p shows candidate order[p] (None: as stored)."""
        return self.rankings([ranking_list], [order])[0]

    def rate(self, ranking_list: RankingList, order: Sequence[int] | None = None) -> RatingPrompt:
        """The `ratings` form; presented position p shows candidate order[p] (None: as stored)."""
        return self.rates([ranking_list], [order])[0]

    def rankings(
        self, lists: Sequence[RankingList], orders: Sequence[Sequence[int] | None] | None = None
    ) -> list[RankingPrompt]:
        """`ranking` of many lists, new titles encoded in batches."""
        return self._many(self._ranking, lists, orders)

    def rates(
        self, lists: Sequence[RankingList], orders: Sequence[Sequence[int] | None] | None = None
    ) -> list[RatingPrompt]:
        """`rate` of many lists, new titles encoded in batches."""
        return self._many(self._rate, lists, orders)

    def text(self, ranking_list: RankingList, order: Sequence[int] | None = None) -> tuple[str, str]:
        """Prompt and answer of the `ranking` form as text, for people to read."""
        order = self._checked(ranking_list, order)
        built = self.ranking(ranking_list, order)
        page = self._page.text(ranking_list, order, built.dropped_history)
        labels = {i: self._page.label(ranking_list.candidates[i], position) for position, i in enumerate(order)}
        answer = self._separator.join(labels[i] for i in sorted(labels, key=lambda i: built.ranks[i]))
        return page + self._tail("ranking"), answer

    @staticmethod
    def options_of(record: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the builder that `record` is of."""
        return {name: record[name] for name in ("identifiers", "max_length")}

    def record(self) -> dict[str, Any]:
        """What identifiers.json holds: options, and the tokens that came of them."""
        try:
            grade_ids = self.grade_ids
        except AlroFastError:
            grade_ids = None
        return {
            "identifiers": self.identifiers,
            "template": self.template.name,
            "max_length": self.max_length,
            "tokenizer": {"name": self._encoder.name, "fingerprint": self._encoder.fingerprint()},
            "turns": self._turns.record(),
            "labels": list(self.labels),
            "token_ids": list(self._answers.ids),
            "line_token_ids": self._page.label_ids[: len(self.labels)],
            "separator_ids": list(self._answers.between),
            "end_id": self._answers.end,
            "grades": list(self.template.grades),
            "grade_ids": grade_ids,
            "grade_values": self.grade_values,
        }

    @cached_property
    def _grading(self) -> Grading:
        (_, _), (ask, _) = placeholders(self.template["ratings.answer"])
        grades = list(self.template.grades)
        return prove_grading(self._encoder, self._tail("ratings"), self.labels, ask, grades, self._page.by_item)

    def _tail(self, form: str) -> str:
        lead = placeholders(self.template[f"{form}.answer"])[0][0]
        return self.template[f"{form}.question"] + self._turns.between + lead

    def _many(self, build, lists, orders):
        if orders is None:
            orders = [None] * len(lists)
        if len(orders) != len(lists):
            raise AlroFastError(f"orders: {len(orders)} given for {len(lists)} lists")
        prompts = []
        for start in range(0, len(lists), CHUNK):
            part = [lists[i] for i in range(start, min(start + CHUNK, len(lists)))]
            checked = [self._checked(one, order) for one, order in zip(part, orders[start : start + CHUNK])]
            self._page.prepare(part)
            prompts += [build(one, order) for one, order in zip(part, checked)]
        return prompts

    def _checked(self, one: RankingList, order: Sequence[int] | None) -> Sequence[int]:
        m = len(one.candidates)
        if not m or len(one.ratings) != m or len(one.history) != len(one.history_ratings):
            raise AlroFastError(
                f"list {one.list_id!r} has {m} candidates with {len(one.ratings)} ratings and {len(one.history)} "
                f"history items with {len(one.history_ratings)}; expected a candidate at least, and a rating "
                "(or NaN) for every item"
            )
        self._page.check(one)
        check_shown(self.template, one.list_id, one.history_ratings)
        if m > self.max_candidates:
            raise AlroFastError(
                f"list {one.list_id!r} has {m} candidates, but tokenizer {self._encoder.name!r} has single-token "
                f"letters for {self.max_candidates}; use list_size {self.max_candidates} or less, or identifiers: items"
            )
        if order is None:
            return range(m)
        order = [int(i) for i in order]
        if sorted(order) != list(range(m)):
            raise AlroFastError(f"list {one.list_id!r}: order {order} is no permutation of its {m} candidates")
        return order

    def _prompt(self, one: RankingList, order: Sequence[int], tail: list[int], answer: int) -> tuple[list[int], int]:
        """Prompt ids and the number of history items dropped; `answer` tokens are left room for."""
        limit = None if self.max_length is None else self.max_length - len(tail) - answer
        ids, dropped = self._page.ids(one, order, limit)
        ids += tail
        return ids, dropped

    def _ranking(self, one: RankingList, order: Sequence[int]) -> RankingPrompt:
        answers, m = self._answers, len(order)
        step = 1 + len(answers.between)
        prompt_ids, dropped = self._prompt(one, order, answers.tail, m * step - len(answers.between) + 1)
        candidate_ids = self._identifier_ids(one, order, answers.ids)
        ranks = target_ranks(one.ratings, [item.item_id for item in one.candidates])
        by_rank = [0] * m
        for i, rank in enumerate(ranks):
            by_rank[rank - 1] = candidate_ids[i]
        return RankingPrompt(
            prompt_ids, answers.spell(by_rank), list(range(0, m * step, step)), candidate_ids, ranks, dropped
        )

    def _rate(self, one: RankingList, order: Sequence[int]) -> RatingPrompt:
        grading = self._grading
        if len(order) > len(grading.ids):
            raise AlroFastError(
                f"list {one.list_id!r} has {len(order)} candidates, but tokenizer {self._encoder.name!r} has "
                f"single-token letters for {len(grading.ids)} in {self.template['ratings.answer']!r}; lower list_size"
            )
        prompt_ids, dropped = self._prompt(one, order, grading.tail, 2 + len(grading.ask))
        branches = [
            RatingBranch([id, *grading.ask], self._grade(one, rating), 0)
            for id, rating in zip(self._identifier_ids(one, order, grading.ids), one.ratings)
        ]
        ranks = target_ranks(one.ratings, [item.item_id for item in one.candidates])
        return RatingPrompt(prompt_ids, branches, list(grading.grade_ids), self.grade_values, ranks, dropped)

    def _identifier_ids(self, one: RankingList, order: Sequence[int], ids: Sequence[int]) -> list[int]:
        if self._page.by_item:
            return [ids[item.index] for item in one.candidates]
        own = [0] * len(order)
        for position, i in enumerate(order):
            own[i] = ids[position]
        return own

    def _grade(self, one: RankingList, rating: float) -> list[int]:
        if math.isnan(rating):
            return []
        for id, value in zip(self._grading.grade_ids, self.template.grades.values()):
            if abs(value - rating) < 1e-6:
                return [id]
        raise AlroFastError(
            f"list {one.list_id!r} has a candidate rated {rating:g}, which is none of the grades "
            f"{', '.join(f'{value:g}' for value in self.grade_values)} of prompt template {self.template.name!r}"
        )
