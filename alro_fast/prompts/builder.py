"""Ranking list -> prompt and answer as token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..data.records import Item, RankingList, target_ranks
from ..errors import AlroFastError
from .encoding import Encoder, Pieces, line_start
from .identifiers import LETTERS, Grading, item_labels, labels_in_context, prove_answers, prove_grading
from .line import Line, shown_rating
from .template import PromptTemplate, load_template, parse_template, placeholders
from .turns import find_turns

TEMPLATE_FILE, IDENTIFIERS_FILE = "prompt_template.yaml", "identifiers.json"
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


class PromptBuilder:
    """Writes prompts for one tokenizer and template.

    A prompt is the concatenation of separately encoded pieces: the text before the history, one piece or two per
    history line, the text before the candidates, per candidate line its identifier and the rest, the text after. So
    no title can reach beyond its line, an identifier is always one token, and a line costs the same tokens wherever
    it stands. Training and inference both use these ids; they equal the tokenizer's own ids of `text()` for byte-level
    BPE and SentencePiece-like tokenizers and the ready templates.

    Args:
        tokenizer: a tokenizer of the `tokenizers` library; its chat template is applied if it has one.
        template: name of a ready template, or path of a YAML file.
        identifiers: "letters" (presented position p is the p-th letter) or "items" (item i is the token <item_i>).
        max_length: longest prompt and answer together, in tokens; oldest history items are dropped to keep to it.
        items: the catalogue, for "items": each must have its token (None: as many as the tokenizer has).

    Raises:
        AlroFastError: the template, or too few single-token identifiers, or an answer that merges with the prompt.
    """

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
        self.template = template if isinstance(template, PromptTemplate) else load_template(template)
        self.identifiers, self.max_length = identifiers, max_length
        self._encoder = encoder = Encoder(tokenizer)
        self._by_item = identifiers == "items"
        self._turns = turns = find_turns(encoder, self.template["system"])
        text = self.template
        self._separator = text[f"{identifiers}.separator"]
        self._head_text = turns.before + _lines(text["introduction"], text["history"])
        self._middle_text = _lines(text["candidates"])
        self._head = turns.start + encoder.trusted([self._head_text])[0]
        self._middle = encoder.trusted_after("\n", self._middle_text)

        self._history_line = Line(text, f"{identifiers}.history_line")
        self._candidate_line = Line(text, f"{identifiers}.candidate_line")
        lead = self._candidate_line.before
        if self._by_item:
            labels = item_labels(encoder, None if items is None else len(items))
            self._history_lead, self._line_lead = encoder.plain_after("\n", [self._history_line.before, lead])
            self._line_ids = tokenizer.convert_tokens_to_ids(labels)
            history_anchor = candidate_anchor = ""  # an added token cuts the text: what follows it stands alone
        else:
            anchor, n = line_start(encoder.plain, lead)
            shown = labels_in_context(encoder.plain, anchor + lead, LETTERS, "", encoder.unk)
            labels = LETTERS[: len(shown.ids)]
            self._history_lead, self._line_lead, self._line_ids = [], shown.left[n:], shown.ids
            history_anchor, candidate_anchor = "\n", anchor + lead + LETTERS[0]
        if len(labels) > 1:
            self._answers = prove_answers(
                encoder, self._tail("ranking"), labels, self._separator, turns.end, self._by_item
            )
            labels = labels[: len(self._answers.ids)]
        if len(labels) < 2:
            raise AlroFastError(
                f"tokenizer {encoder.name!r} has no single-token letters: A and B are not one distinct token each "
                f"in {text['letters.candidate_line']!r} and {text['ranking.answer']!r}; use another tokenizer, other "
                "lines in the prompt template, or identifiers: items"
            )
        self.labels = list(labels)
        rating_anchor = "x" if self._history_line.has_body else history_anchor
        self._history_pieces = Pieces(partial(encoder.plain_after, history_anchor), self._history_line.body)
        self._rating_pieces = Pieces(partial(encoder.plain_after, rating_anchor), self._history_line.ending)
        self._candidate_pieces = Pieces(partial(encoder.plain_after, candidate_anchor), self._candidate_line.body)

    @property
    def max_candidates(self) -> int:
        """The longest list this tokenizer has identifiers for."""
        return len(self.labels)

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
        dropped = self.ranking(ranking_list, order).dropped_history
        history, candidates = self._history_line, self._candidate_line
        seen = list(zip(ranking_list.history, ranking_list.history_ratings))[dropped:]
        past = (
            history.before + self._label(item) + history.body(item) + history.ending(shown_rating(rating))
            for item, rating in seen
        )
        shown = [ranking_list.candidates[i] for i in order]
        labels = [self._label(item, position) for position, item in enumerate(shown)]
        page = (candidates.before + label + candidates.body(item) for label, item in zip(labels, shown))
        prompt = "".join((self._head_text, *past, self._middle_text, *page, self._tail("ranking")))
        ranks = target_ranks(ranking_list.ratings, [item.item_id for item in ranking_list.candidates])
        by_rank = sorted(range(len(order)), key=lambda p: ranks[order[p]])
        return prompt, self._separator.join(labels[p] for p in by_rank)

    def save(self, directory: str | Path) -> None:
        """Write prompt_template.yaml and identifiers.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TEMPLATE_FILE).write_text(self.template.source, encoding="utf-8")
        content = json.dumps(self._record(), indent=1, ensure_ascii=False)
        (directory / IDENTIFIERS_FILE).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> PromptBuilder:
        """The builder saved there; AlroFastError if the tokenizer is not the one it was saved with."""
        directory = Path(directory)
        try:
            source = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
            record = json.loads((directory / IDENTIFIERS_FILE).read_text(encoding="utf-8"))
            kind, max_length, name = record["identifiers"], record["max_length"], record["template"]
            known = record["tokenizer"]["fingerprint"]
        except OSError as error:
            raise AlroFastError(
                f"{directory} holds no prompt settings: {Path(error.filename).name} cannot be read; "
                "expected the output folder of a training run"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise AlroFastError(
                f"{directory / IDENTIFIERS_FILE} is damaged: expected what PromptBuilder.save wrote"
            ) from None
        encoder = Encoder(tokenizer)
        if encoder.fingerprint() != known:
            raise AlroFastError(
                f"tokenizer {encoder.name!r} is not the one {directory} was made with "
                f"({record['tokenizer']['name']!r}); load the tokenizer saved in that folder"
            )
        template = parse_template(source, name=name, origin=str(directory / TEMPLATE_FILE))
        builder = cls(tokenizer, template, identifiers=kind, max_length=max_length)
        if builder._record() | {"tokenizer": record["tokenizer"]} != record:  # its folder may have moved
            raise AlroFastError(f"{directory / IDENTIFIERS_FILE} does not fit {TEMPLATE_FILE} beside it; restore both")
        return builder

    def _record(self) -> dict:
        try:
            grade_ids = self.grade_ids
        except AlroFastError:
            grade_ids = None
        return {
            "identifiers": self.identifiers,
            "template": self.template.name,
            "max_length": self.max_length,
            "tokenizer": {"name": self._encoder.name, "fingerprint": self._encoder.fingerprint()},
            "labels": list(self.labels),
            "token_ids": list(self._answers.ids),
            "line_token_ids": list(self._line_ids[: len(self.labels)]),
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
        return prove_grading(self._encoder, self._tail("ratings"), self.labels, ask, grades, self._by_item)

    def _tail(self, form: str) -> str:
        lead = placeholders(self.template[f"{form}.answer"])[0][0]
        return self.template[f"{form}.question"] + self._turns.between + lead

    def _label(self, item: Item, position: int | None = None) -> str:
        if self._by_item:
            return self.labels[item.index]
        return "" if position is None else self.labels[position]

    def _many(self, build, lists, orders):
        if orders is None:
            orders = [None] * len(lists)
        if len(orders) != len(lists):
            raise AlroFastError(f"orders: {len(orders)} given for {len(lists)} lists")
        prompts = []
        for start in range(0, len(lists), CHUNK):
            part = [lists[i] for i in range(start, min(start + CHUNK, len(lists)))]
            checked = [self._checked(one, order) for one, order in zip(part, orders[start : start + CHUNK])]
            self._history_pieces.prepare(chain.from_iterable(one.history for one in part))
            self._candidate_pieces.prepare(chain.from_iterable(one.candidates for one in part))
            self._rating_pieces.prepare(
                shown_rating(rating) for rating in set(chain.from_iterable(one.history_ratings for one in part))
            )
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
        if self._by_item:
            self._check_items(one)
        elif m > self.max_candidates:
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

    def _check_items(self, one: RankingList) -> None:
        limit = self.max_candidates
        for item in (*one.history, *one.candidates):
            if not 0 <= item.index < limit:
                raise AlroFastError(
                    f"list {one.list_id!r}: item {item.item_id!r} has index {item.index}, but tokenizer "
                    f"{self._encoder.name!r} has item tokens for 0 to {limit - 1}"
                )
        if len({item.index for item in one.candidates}) != len(one.candidates):
            raise AlroFastError(f"list {one.list_id!r} names one item twice among its candidates")

    def _prompt(self, one: RankingList, order: Sequence[int], tail: list[int], answer: int) -> tuple[list[int], int]:
        """Prompt ids and the number of history items dropped; `answer` tokens are left room for."""
        shown: list[int] = []
        pieces = self._candidate_pieces.ids
        for position, i in enumerate(order):
            item = one.candidates[i]
            shown += self._line_lead
            shown.append(self._line_ids[item.index if self._by_item else position])
            shown += pieces[item]
        lines = [self._history_ids(item, rating) for item, rating in zip(one.history, one.history_ratings)]
        dropped = 0
        if self.max_length is not None:
            room = self.max_length - len(self._head) - len(self._middle) - len(shown) - len(tail) - answer
            if room < 0:
                raise AlroFastError(
                    f"list {one.list_id!r}: its {len(order)} candidates make {self.max_length - room} tokens without "
                    f"any history, but max_length is {self.max_length}; raise max_length or lower list_size"
                )
            excess = sum(map(len, lines)) - room
            while excess > 0:
                excess -= len(lines[dropped])
                dropped += 1
        ids = self._head.copy()
        for line in lines[dropped:]:
            ids += line
        ids += self._middle
        ids += shown
        ids += tail
        return ids, dropped

    def _history_ids(self, item: Item, rating: float) -> list[int]:
        rest = self._history_pieces.ids[item] + self._rating_pieces.ids[shown_rating(rating)]
        return [*self._history_lead, self._line_ids[item.index], *rest] if self._by_item else rest

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
        if self._by_item:
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


def _lines(*texts: str) -> str:
    return "".join(text + "\n" for text in texts if text)
