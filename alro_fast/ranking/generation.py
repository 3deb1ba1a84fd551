"""The ordinary way, for comparison: let the model write its answer with `generate`, then parse the text.

Nothing else in the package ranks like this: an answer may name a candidate twice or not at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..modeling.attention import trunk_of
from ..processes.dealing import dealt
from .decoding import left_padded, ordinary_attention

if TYPE_CHECKING:
    from ..data.records import RankingList
    from ..prompts import PromptBuilder
    from ..prompts.recranker import RecRankerPrompts
    from .ranker import Ranker


@dataclass(frozen=True)
class Generated:
    """Per list: the order read from the text (candidate numbers, best first; missing ones appended as presented),
    whether the text was a full permutation, and the text."""

    orders: list[list[int]]
    valid: list[bool]
    texts: list[str]

    @property
    def invalid_rate(self) -> float:
        """Share of answers that were no permutation of the candidates; NaN of no answers."""
        return 1 - float(np.mean(self.valid)) if self.valid else math.nan

    @property
    def scores(self) -> list[np.ndarray]:
        """Minus the place of each candidate, counted from 1."""
        return [-np.argsort(order) - 1.0 for order in self.orders]


def generate_and_parse(ranker: Ranker, lists: Sequence[RankingList], batch_size: int = 8) -> Generated:
    """Greedy text of the `ranking` answer form for every list, left-padded batches of `batch_size`, parsed."""
    bare = [replace(entry, ratings=(math.nan,) * len(entry.ratings)) for entry in lists]
    prompts = cast("PromptBuilder", ranker.prompts).rankings(bare)
    texts = write_answers(ranker, [(prompt.prompt_ids, len(prompt.answer_ids)) for prompt in prompts], batch_size)
    made = Generated([], [], texts)
    for prompt, text in zip(prompts, texts, strict=True):
        order, valid = parse(text, [ranker.tokenizer.decode([token]) for token in prompt.candidate_ids])
        made.orders.append(order)
        made.valid.append(valid)
    return made


def parse(text: str, names: Sequence[str]) -> tuple[list[int], bool]:
    """The order in which a text names candidates, each counted at its first mention, those never named appended in
    their own order; and whether the text was exactly one mention of each and nothing but separators between."""
    found, rest = mentions(text, names)
    order = list(dict.fromkeys(found))
    valid = len(found) == len(order) == len(names) and not re.search(r"\w", rest)
    return order + [i for i in range(len(names)) if i not in order], valid


def mentions(text: str, names: Sequence[str]) -> tuple[list[int], str]:
    """Numbers of the names in a text, in the order of their mentions, and the text without them."""
    number = {name.strip(): i for i, name in enumerate(names)}
    longest_first = "|".join(re.escape(name) for name in sorted(number, key=len, reverse=True))
    pattern = rf"(?<!\w)(?:{longest_first})(?!\w)"
    return [number[name] for name in re.findall(pattern, text)], re.sub(pattern, "", text)


@torch.no_grad()
def write_answers(ranker: Ranker, prompts: Sequence[tuple[list[int], int]], batch_size: int = 8) -> list[str]:
    """Greedy text after every (prompt ids, tokens to write at most), in left-padded batches, dealt as in `decode`."""
    model, tokenizer = ranker.model, ranker.tokenizer
    end = cast("PromptBuilder | RecRankerPrompts", ranker.prompts).end  # models of signals write no text
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end

    def write(batch: Sequence[tuple[list[int], int]]) -> list[str]:
        ids, mask = left_padded([prompt for prompt, _ in batch], next(model.parameters()).device, pad)
        written = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(length for _, length in batch),
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )
        texts: list[str] = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return texts

    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    costs = [sum(len(prompt) + length for prompt, length in batch) for batch in batches]
    with ordinary_attention(trunk_of(model)):
        texts = dealt(batches, costs, write, model=model, passes=True)
    return list(chain.from_iterable(texts))
