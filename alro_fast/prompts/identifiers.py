"""Labels of candidates: one token each, proven for the tokenizer and for the place where they stand."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, cast

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from ..errors import AlroFastError
from .encoding import Encode, Encoder, line_start

LETTERS = string.ascii_uppercase + string.ascii_lowercase


def item_token(index: int) -> str:
    """The token that names item `index` of the catalogue."""
    return f"<item_{index}>"


def add_item_tokens(tokenizer: PreTrainedTokenizerBase, n_items: int) -> int:
    """Add <item_0> ... <item_{n_items - 1}> to the tokenizer; returns how many were new.

    They are not marked special, so decoding shows them. The model's embeddings must then have `len(tokenizer)` rows.
    """
    return tokenizer.add_tokens([AddedToken(item_token(i), special=False, normalized=False) for i in range(n_items)])


def item_labels(encoder: Encoder, n_items: int | None) -> list[str]:
    """The item tokens the tokenizer has, <item_0> onwards; at least `n_items` of them if that is given."""
    added = {token.content for token in encoder.tokenizer.added_tokens_decoder.values()}
    count = 0
    while item_token(count) in added:
        count += 1
    if count < max(2, n_items or 0):
        raise AlroFastError(
            f"tokenizer {encoder.name!r} has {count} item tokens, but identifiers: items needs one per item of the "
            f"catalogue{f', {n_items}' if n_items is not None else ''}; call add_item_tokens on it first"
        )
    return [item_token(i) for i in range(count)]


class Labels(NamedTuple):
    """Labels within a text: `left` + [id of the label] + `right` are the ids, the same for every label."""

    left: list[int]
    ids: list[int]
    right: list[int]


def labels_in_context(encode: Encode, before: str, labels: Sequence[str], after: str, unk: int | None) -> Labels:
    """The longest run of `labels`, from the first, that are one distinct known token between `before` and `after`.

    The token may hold the space before it, which then is not in `left`. No such run: `ids` is empty.
    """
    encoded = encode([before + label + after for label in labels])
    differing = [place for place, (a, b) in enumerate(zip(*encoded[:2])) if a != b]
    if len(encoded[0]) != len(encoded[1]) or len(differing) != 1:
        return Labels([], [], [])
    place = differing[0]
    left, right = encoded[0][:place], encoded[0][place + 1 :]
    ids: dict[int, None] = {}
    for tokens in encoded:
        if tokens[:place] != left or tokens[place + 1 :] != right or tokens[place] == unk or tokens[place] in ids:
            break
        ids[tokens[place]] = None
    return Labels(left, list(ids), right)


class Answers(NamedTuple):
    """How answers of the `ranking` form are spelled: `tail` ends the prompt, then labels, `between` them, `end`."""

    tail: list[int]
    ids: list[int]
    between: list[int]
    end: int

    def spell(self, ids: Sequence[int]) -> list[int]:
        """Token ids of the answer that names these labels."""
        if not self.between:
            return [*ids, self.end]
        spaced = chain.from_iterable((*self.between, id) for id in ids)
        return [*spaced, self.end][len(self.between) :]


def prove_answers(
    encoder: Encoder, tail: str, labels: Sequence[str], separator: str, end: int, atomic: bool
) -> Answers:
    """Labels after `tail` and after one another are one token each; ids(tail) + ids(answer) = ids(tail + answer).

    Proven by one text in which every label follows every other, then the end. It may hold for the first few of the
    labels only, or for none: `ids` has as many. `atomic` labels are added tokens, which the tokenizer cuts out before
    it looks at what is beside them: naming each once is enough.
    """
    if len(labels) < 2:
        return Answers([], [], [], end)
    newline, n = line_start(encoder.trusted, tail)
    start = newline + tail
    first = labels_in_context(encoder.trusted, start, labels[:2] if atomic else labels, "", encoder.unk)
    if len(first.ids) < 2 or first.right:
        return Answers([], [], [], end)
    ids = encoder.ids_of(labels) if atomic else first.ids
    pair = encoder.trusted([start + labels[0] + separator + labels[1]])[0]
    answers = Answers(first.left[n:], ids, pair[len(first.left) + 1 : -1], end)
    ending = cast(str, encoder.tokenizer.convert_ids_to_tokens(end))
    for count in range(len(ids), 1, -1):
        order = range(count) if atomic else _every_pair(count)
        text = start + separator.join(labels[i] for i in order) + ending
        if encoder.trusted([text])[0] == [*first.left, *answers.spell([ids[i] for i in order])]:
            return answers._replace(ids=ids[:count])
    return answers._replace(ids=[])


def _every_pair(count: int) -> list[int]:
    """A walk through range(count) on which every number is followed by every other."""
    walk: list[int] = []
    for a in range(count - 1):
        for b in range(a + 1, count):
            walk += (a, b)
        walk.append(a)
    return walk


class Grading(NamedTuple):
    """How grades are asked: `tail` ends the prompt, then a label's id, `ask`, and the grade's id."""

    tail: list[int]
    ids: list[int]
    ask: list[int]
    grade_ids: list[int]


def prove_grading(
    encoder: Encoder, tail: str, labels: Sequence[str], ask: str, grades: Sequence[str], atomic: bool
) -> Grading:
    """Every label's question after `tail` and every grade after every question: one token each."""
    anchor, n = line_start(encoder.trusted, tail)
    start = anchor + tail
    some = labels[:2] if atomic else labels
    asked = labels_in_context(encoder.trusted, start, some, ask + grades[0], encoder.unk)
    graded = labels_in_context(encoder.trusted, start + labels[0] + ask, grades, "", encoder.unk)
    if len(graded.ids) < len(grades) or graded.right:
        raise AlroFastError(
            f"tokenizer {encoder.name!r} has single tokens for {len(graded.ids)} of the grades {', '.join(grades)} "
            f"after {ask!r}; choose other texts for ratings.grades or ratings.answer in the prompt template"
        )
    if len(asked.ids) < 2:
        return Grading([], [], [], graded.ids)
    left, after = asked.left, asked.right[:-1]
    encoded = encoder.trusted([start + label + ask + grade for label in some[: len(asked.ids)] for grade in grades])
    expected = [[*left, label, *after, grade] for label in asked.ids for grade in graded.ids]
    if encoded != expected:
        raise AlroFastError(
            f"tokenizer {encoder.name!r} joins tokens across the question {labels[0] + ask + grades[0]!r}; "
            "choose another ratings.answer in the prompt template"
        )
    ids = encoder.ids_of(labels) if atomic else asked.ids
    return Grading(left[n:], ids, after, graded.ids)
