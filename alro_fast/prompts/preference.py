"""Preferences -> token ids: one prompt or several, and the answers that continue them.

Answers of a ranking list take one of three forms:

    titles       the candidates are shown, the answer is the title of one (S-DPO)
    identifiers  the candidates are shown with identifiers, the answer is one of those tokens
    pairs        the history, then two items; the answer is both titles in order; a prompt per negative (DMPO)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from ..data.negatives import positive
from ..data.preferences import Preference, Prompt, Turn
from ..data.records import RankingList
from ..errors import AlroFastError
from .bounded import bounded
from .builder import PromptBuilder
from .encoding import Encoder
from .line import Line, clean, marker_pattern
from .template import PromptTemplate
from .turns import find_turns

logger = logging.getLogger(__name__)
FORMS = ("titles", "identifiers", "pairs")
ASK_TITLE = "Which of these candidates comes first for this person? Answer with its title."
ASK_PAIR = (
    "Which of these two comes first for this person: {first} or {second}? Answer with both titles, the first first."
)
STAND_IN = "ALROFASTTURN{}X"  # stands for the content of turn number {} while a chat template is rendered
ANCHOR = 48  # characters of a plain prompt that an answer is tokenised after


class AnswerIds(NamedTuple):
    """One branch: `prompt_ids` + `answer_ids`, whose tokens all count."""

    prompt_ids: list[int]
    answer_ids: list[int]


class PreferenceIds(NamedTuple):
    """One user's branches, and which of them are chosen and rejected; paired: chosen[i] belongs to rejected[i]."""

    branches: list[AnswerIds]
    chosen: list[int]
    rejected: list[int]
    paired: bool
    dropped_history: int


class PreferencePrompts:
    """Writes the prompts and answers of one tokenizer.

    Text of users and titles never becomes a special token. A tokenizer's chat template is applied to messages, not to
    plain prompts; every answer ends with the token that ends a turn or text.

    Args:
        builder: prompts of ranking lists, whose template is used; None: preferences alone.
        form: of FORMS, for ranking lists.
        max_length: longest prompt and answer, in tokens: lists drop their oldest history items to keep to it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        builder: PromptBuilder | None = None,
        *,
        form: str = "titles",
        max_length: int | None = None,
    ) -> None:
        if form not in FORMS:
            raise AlroFastError(f"--preference_answer {form!r}; expected one of {', '.join(FORMS)}")
        self.builder, self.form, self.max_length = builder, form, max_length
        self._encoder = Encoder(tokenizer)
        self._turns = find_turns(self._encoder, "")
        self._told_of_ties = False
        self._literals: dict[tuple[str, ...], list[str] | None] = {}
        first = tokenizer("x")["input_ids"][0]
        self._start = [first] if first == tokenizer.bos_token_id else []
        self._words = None if builder is None else ListWords(builder.template, self._turns.markers)

    def encode(self, source: Preference | RankingList) -> PreferenceIds:
        """Branches of a preference, or of a ranking list (Negatives.contest): its positive against the rest.

        Raises AlroFastError naming the record when it does not fit into max_length.
        """
        if isinstance(source, Preference):
            ids = self._encode(source, 0)
            excess, longest = self._excess(ids)
            if excess > 0:
                answer = max(len(branch.answer_ids) for branch in ids.branches)
                raise AlroFastError(
                    f"{source.list_id}: its longest prompt and answer take {longest} tokens ({answer} of them the "
                    f"longest answer), more than --max_length {self.max_length}; raise it, or shorten the row"
                )
            return ids
        if self.form == "identifiers":
            return self._identifiers(source)
        for dropped in range(len(source.history) + 1):
            ids = self._encode(cast(ListWords, self._words).preference(source, self.form, dropped), dropped)
            if self._excess(ids)[0] <= 0:
                return ids
        raise AlroFastError(
            f"list {source.list_id}: its candidates and answers take {self._excess(ids)[1]} tokens without history, "
            f"more than --max_length {self.max_length}; raise it, or lower --num_negatives"
        )

    def _encode(self, preference: Preference, dropped: int) -> PreferenceIds:
        pairs = len(preference.chosen) if preference.paired else 1
        branches: list[AnswerIds] = []
        chosen: list[int] = []
        rejected: list[int] = []
        for i in range(pairs):
            prompt_ids, anchor = self.prompt(preference.prompts[i])
            good = preference.chosen[i : i + 1] if preference.paired else preference.chosen
            bad = preference.rejected[i : i + 1] if preference.paired else preference.rejected
            answers = self._encoder.plain_after(anchor, [*good, *bad])
            if not self._told_of_ties and any(ids in answers[: len(good)] for ids in answers[len(good) :]):
                self._told_of_ties = True
                logger.warning(
                    f"{preference.list_id}: a chosen and a rejected answer become the same tokens, so that no model "
                    "can prefer one of them; they count as a tie (said of the first such record)"
                )
            for number, ids in enumerate(answers):
                (chosen if number < len(good) else rejected).append(len(branches))
                branches.append(AnswerIds(prompt_ids, [*ids, self._turns.end]))
        return PreferenceIds(branches, chosen, rejected, preference.paired, dropped)

    def _identifiers(self, contest: RankingList) -> PreferenceIds:
        view = cast("PromptBuilder", self.builder).ranking(contest)
        start = view.prompt_ids + view.answer_ids[: view.slot_offsets[0]]
        best = positive(contest)
        order = [best, *(i for i in range(len(contest.candidates)) if i != best)]
        branches = [AnswerIds(start, [view.candidate_ids[i]]) for i in order]
        return PreferenceIds(branches, [0], list(range(1, len(branches))), False, view.dropped_history)

    def _excess(self, ids: PreferenceIds) -> tuple[int, int]:
        longest = max(len(branch.prompt_ids) + len(branch.answer_ids) for branch in ids.branches)
        return longest - (longest if self.max_length is None else self.max_length), longest

    def prompt(self, prompt: Prompt) -> tuple[list[int], str]:
        """Token ids of a prompt, and the text an answer reads as coming after."""
        if isinstance(prompt, str):
            return self._start + self._encoder.plain([prompt])[0], prompt[-ANCHOR:]
        literals = self._rendered(tuple(turn.role for turn in prompt))
        if literals is None:  # the template takes no system message: its text goes before the user's
            system, user, *rest = prompt
            return self.prompt((Turn(user.role, f"{system.content}\n{user.content}"), *rest))
        ids = list(self._turns.start)
        for number, (literal, turn) in enumerate(zip(literals, prompt)):
            if literal:
                ids += self._encoder.trusted_after("x", literal) if number else self._encoder.trusted([literal])[0]
            ids += self._encoder.plain_after(literal[-ANCHOR:] or "\n", [turn.content])[0]
        ids += self._encoder.trusted_after("x", literals[-1])
        return ids, literals[-1][-ANCHOR:]

    def _rendered(self, roles: tuple[str, ...]) -> list[str] | None:
        """What stands before, between and after the contents of these turns; None: no place for a system message."""
        if roles not in self._literals:
            self._literals[roles] = self._render(roles)
        return self._literals[roles]

    def _render(self, roles: tuple[str, ...]) -> list[str] | None:
        tokenizer = self._encoder.tokenizer
        if tokenizer.chat_template is None:
            if roles not in (("user",), ("system", "user")):
                raise AlroFastError(
                    f"tokenizer {self._encoder.name!r} has no chat template, which a conversation of "
                    f"{', '.join(roles)} needs; give a model with one, or plain text prompts"
                )
            return ["", *["\n"] * len(roles)]
        messages = [{"role": role, "content": STAND_IN.format(i)} for i, role in enumerate(roles)]
        try:
            text = bounded(lambda: self._encoder.rendered(messages))
        except ValueError as error:
            if roles[0] == "system" and len(roles) > 1:
                return None
            raise AlroFastError(
                f"the chat template of tokenizer {self._encoder.name!r} does not take turns of {', '.join(roles)}: "
                f"{' '.join(str(error).split())}"
            ) from None
        literals = []
        for message in messages:
            before, found, text = text.partition(message["content"])
            if not found:
                raise AlroFastError(
                    f"the chat template of tokenizer {self._encoder.name!r} leaves out a turn of {', '.join(roles)}"
                )
            literals.append(before)
        if not text[-1:].isspace() and not self._encoder.ends_with_marker(text):
            text += " "
        return [*literals, text]


class ListWords:
    """Ranking lists as the text of preferences, in the words of a prompt template."""

    def __init__(self, template: PromptTemplate, markers: Iterable[str] = ()) -> None:
        self._template = template
        self._markers = marker_pattern(markers)
        self._history = Line(template, "letters.history_line", self._markers)
        self._candidate = Line(template, "letters.candidate_line", self._markers)

    def preference(self, contest: RankingList, form: str, dropped: int = 0) -> Preference:
        """`titles` or `pairs` of one contest, its `dropped` oldest history items left out."""
        template, best = self._template, positive(contest)
        head = [template[key] for key in ("introduction", "history") if template[key]]
        text = "".join(f"{line}\n" for line in head)
        for item, beside in list(zip(contest.history, self._history.beside(contest, "history")))[dropped:]:
            text += self._history.body(item) + self._history.ending(beside)
        titles = [clean(item.title, self._markers) or item.item_id for item in contest.candidates]
        others = [i for i in range(len(titles)) if i != best]
        if form == "titles":
            text += f"{template['candidates']}\n" if template["candidates"] else ""
            shown = self._candidate.beside(contest, "candidates")
            text += "".join(f"- {title}{''.join(one.signals)}\n" for title, one in zip(titles, shown)) + ASK_TITLE
            prompts: tuple[tuple[Turn, ...], ...] = (self._prompt(text),)
            chosen: tuple[str, ...] = (titles[best],)
            rejected = tuple(titles[i] for i in others)
        else:
            asked = [ASK_PAIR.format(first=titles[min(best, i)], second=titles[max(best, i)]) for i in others]
            prompts = tuple(self._prompt(text + question) for question in asked)
            chosen = tuple(f"{titles[best]}\n{titles[i]}" for i in others)
            rejected = tuple(f"{titles[i]}\n{titles[best]}" for i in others)
        return Preference(contest.list_id, contest.user_id, prompts, chosen, rejected)

    def _prompt(self, text: str) -> tuple[Turn, ...]:
        system = self._template["system"]
        return (Turn("system", system), Turn("user", text)) if system else (Turn("user", text),)
