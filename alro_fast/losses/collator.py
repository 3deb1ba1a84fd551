"""Prompts of ranking lists -> a padded batch, for the Hugging Face Trainer or any loop without packing.

The fast way is `alro_fast.train`, whose batches share prefixes and have no pads (`modeling.packing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AlroFastError
from .given import ratings_of, rows_of, tokens_of
from .lists import RankingLists

KEYS = ("prompts", "candidate_ids", "ratings")


class RankingCollator:
    """Collates examples of one ranking list each. An example is a mapping of

        prompts        token ids of the list's prompt; of any further prompts, in which the same candidates stand in
                       another order
        candidate_ids  for every prompt, the token that names candidate i there; i is the same item in all
        ratings        of the candidates; NaN: ungraded
        ties           optional: something to order equal ratings by, such as item ids; else their places

    Answers name the candidates in target order. A batch is a dict of tensors, which the Trainer moves to its device:

        input_ids, attention_mask   int64 [P prompts, T]: prompts and answers, padded on the right
        rows                        int64 [N]: which rows of hidden states [P * T, H] predict an answer's tokens
        labels                      int64 [N]: those tokens
        slot_rows, candidate_ids, ratings, ranks, twin   the fields of `RankingLists` (`RankingLists.from_batch`)

    Args:
        pad_token_id: on pads; nothing attends to them.
        separator: tokens between two identifiers of an answer.
        end_token_id: token that ends an answer; None: none does.

    Raises AlroFastError, naming the example, for one that lacks a key or whose parts do not fit.
    """

    def __init__(self, pad_token_id: int, *, separator: Sequence[int] = (), end_token_id: int | None = None) -> None:
        self.pad_token_id, self.separator, self.end_token_id = pad_token_id, list(separator), end_token_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ratings: list[list[float]] = []
        ids: list[list[int]] = []
        ties: list[list[Any]] = []
        prompts: list[list[int]] = []
        twin: list[int] = []
        for number, example in enumerate(examples):
            own_prompts, own_ids, own_ratings, own_ties = self._read(number, example)
            twin += [-1, *[len(prompts)] * (len(own_prompts) - 1)]
            prompts += own_prompts
            ids += own_ids
            ratings += [own_ratings] * len(own_prompts)
            ties += [own_ties] * len(own_prompts)
        step = 1 + len(self.separator)
        tokens = [len(each) * step - len(self.separator) + (self.end_token_id is not None) for each in ratings]
        starts = [sum(tokens[:number]) for number in range(len(tokens))]
        lists = RankingLists.from_ratings(ratings, ids, twin=twin, first_rows=starts, step=step, ties=ties)
        sequences: list[list[int]] = []
        rows: list[int] = []
        labels: list[int] = []
        answers = [self._answer(row, rank) for row, rank in zip(ids, lists.ranks.tolist())]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers))
        for number, (prompt, answer) in enumerate(zip(prompts, answers)):
            sequences.append(prompt + answer)
            first = number * length + len(prompt) - 1
            rows += range(first, first + len(answer))
            labels += answer
        return {
            "input_ids": torch.tensor([ids + [self.pad_token_id] * (length - len(ids)) for ids in sequences]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in sequences]),
            "rows": torch.tensor(rows),
            "labels": torch.tensor(labels),
            **{name: getattr(lists, name) for name in RankingLists._fields[:5]},
        }

    def _answer(self, ids: Sequence[int], ranks: Sequence[int]) -> list[int]:
        answer: list[int] = []
        for _, token in sorted(zip(ranks, ids)):
            answer += [*self.separator, token] if answer else [token]
        return answer if self.end_token_id is None else [*answer, self.end_token_id]

    @staticmethod
    def _read(
        number: int, example: Mapping[str, Any]
    ) -> tuple[list[list[int]], list[list[int]], list[float], list[Any]]:
        """Prompts, identifiers in each, ratings, ties; AlroFastError for what does not fit."""
        missing = [key for key in KEYS if key not in example]
        if missing:
            raise AlroFastError(
                f"example {number} has no {missing[0]}; expected {', '.join(KEYS)} (the Trainer keeps them with "
                "remove_unused_columns=False)"
            )
        place = f"example {number}:"
        prompts = tokens_of(f"{place} prompts", example["prompts"])
        ids = tokens_of(f"{place} candidate_ids", example["candidate_ids"])
        (rated,) = rows_of(f"{place} ratings", [example["ratings"]])
        size = len(rated)
        if not prompts or len(prompts) != len(ids) or [] in prompts:
            raise AlroFastError(
                f"example {number} has {len(prompts)} prompts and {len(ids)} candidate_ids; expected a prompt at "
                "least, none of them empty, and candidate_ids for each"
            )
        if not size or any(len(row) != size for row in ids):
            raise AlroFastError(
                f"example {number} has {size} ratings and candidate_ids of {[len(row) for row in ids]}; expected a "
                "candidate at least, and one token for each in every prompt"
            )
        wanted = sorted(ids[0])
        if any(sorted(row) != wanted for row in ids) or len(set(wanted)) != size:
            raise AlroFastError(
                f"example {number}: candidate_ids are not the same distinct tokens in every prompt; expected one set "
                "of identifiers, in another order where the candidates are"
            )
        if len({tuple(prompt) for prompt in prompts}) < len(prompts):
            raise AlroFastError(
                f"example {number} has one prompt twice; expected the candidates in another order in each"
            )
        (ratings,) = ratings_of(f"{place} ratings", [rated])
        (ties,) = rows_of(f"{place} ties", [example.get("ties", range(size))])
        return prompts, ids, ratings, ties
