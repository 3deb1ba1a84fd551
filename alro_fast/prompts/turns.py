"""What surrounds the prompt's text: the tokenizer's chat template where it has one, else start and end of text."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ..errors import AlroFastError
from .bounded import bounded
from .encoding import Encoder

USER, ASSISTANT = "ALROFASTUSERTURN", "ALROFASTASSISTANTTURN"  # stand-ins for the contents when a chat is rendered


class Turns(NamedTuple):
    """`start` ids, `before` the user's text, `between` it and the answer, and the one token that ends the answer.

    `markers` are the parts of a chat that are ordinary text to the tokenizer, such as [INST] or ASSISTANT:.
    """

    start: list[int]
    before: str
    between: str
    end: int
    markers: frozenset[str] = frozenset()

    def record(self) -> dict[str, Any]:
        """The fixed text, for a run's folder."""
        return {"start": self.start, "before": self.before, "between": self.between, "end": self.end}


def find_turns(encoder: Encoder, system: str) -> Turns:
    """Render the chat template around stand-ins, so that contents never pass through it.

    A template that refuses a system message gets the system text at the head of the user's.
    """
    tokenizer = encoder.tokenizer
    if tokenizer.chat_template is None:
        first = tokenizer("x")["input_ids"][0]
        start = [first] if first == tokenizer.bos_token_id else []
        return Turns(start, system + "\n" if system else "", "\n", _end_of_text(encoder))
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}
    messages, lead = [user], ""
    if system:
        messages = [{"role": "system", "content": system}, user]
        try:
            _render(encoder, messages)
        except AlroFastError:
            messages, lead = [user], system + "\n"
    before, _, between = _render(encoder, messages).partition(USER)
    if not between[-1:].isspace() and not encoder.ends_with_marker(between):
        between += " "
    _, _, closing = _render(encoder, [*messages, answer], add_generation_prompt=False).partition(ASSISTANT)
    end = next((id for id in encoder.trusted([closing])[0] if id in encoder.forbidden), None)
    return Turns([], before + lead, between, _end_of_text(encoder) if end is None else end, _markers(encoder))


def _markers(encoder: Encoder) -> frozenset[str]:
    """Words of the chat template with a bracket, bar or hash, or a colon at the end."""
    turns = [
        {"role": role, "content": f" {stand_in} "} for role, stand_in in (("user", USER), ("assistant", ASSISTANT))
    ]
    try:
        text = _render(encoder, [{"role": "system", "content": " "}, *turns])
    except AlroFastError:  # no system turn in this template
        text = _render(encoder, turns)
    text = text.replace(USER, " ").replace(ASSISTANT, " ")
    for token in encoder.special_texts:
        text = text.replace(token, " ")
    return frozenset(word for word in text.split() if len(word) > 1 and re.search(r"[][<>{}|#]|:$", word))


def _render(encoder: Encoder, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    try:
        text = bounded(lambda: encoder.rendered(messages, add_generation_prompt))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise AlroFastError(f"the chat template of tokenizer {encoder.name!r} cannot be rendered: {reason}") from None
    if text.count(USER) != 1 or text.count(ASSISTANT) != sum(turn["role"] == "assistant" for turn in messages):
        raise AlroFastError(f"the chat template of tokenizer {encoder.name!r} does not show every turn exactly once")
    return text


def _end_of_text(encoder: Encoder) -> int:
    if encoder.tokenizer.eos_token_id is None:
        raise AlroFastError(
            f"tokenizer {encoder.name!r} has no end-of-text token, which ends every answer; set tokenizer.eos_token"
        )
    return encoder.tokenizer.eos_token_id
