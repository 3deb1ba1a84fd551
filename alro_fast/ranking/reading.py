"""What a model says after the branches of packed trees: the forward passes under every way to read a ranking."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from ..errors import AlroFastError
from ..modeling.attention import answer_hidden_states
from ..modeling.lm_head import head_of
from ..modeling.packing import Tree, collate, common_rows
from ..modeling.planning import plan_forwards
from ..processes.dealing import dealt
from .decoding import token_logits

if TYPE_CHECKING:
    from ..data.records import RankingList


class BranchReader:
    """A model on tree attention and the tokens of one forward pass (0: every tree alone); share: as `packing.collate`
    takes it."""

    def __init__(self, model: nn.Module, token_budget: int, share: str = "batch") -> None:
        self.model, self.token_budget, self.share = model, token_budget, share

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def check_length(self, entry: RankingList, tokens: int) -> None:
        """AlroFastError when a list's longest branch is more than the model reads."""
        limit = getattr(cast(Any, self.model).config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise AlroFastError(
                f"list {entry.list_id} takes {tokens} tokens, but the model reads at most {limit}; shorten its "
                "history, or rank fewer candidates"
            )

    def read(self, trees: Sequence[Tree], tokens: Sequence[list[int] | None]) -> list[np.ndarray]:
        """What the model says after branch n (branches counted over all trees): float32 logits of `tokens[n]` as a
        float64 array, its branch having one answer row; or, for None, the log-probability of the branch's own answer.
        Forward passes are dealt over processes (`processes.dealing`).
        """
        firsts = np.cumsum([0, *(len(tree.ids) for tree in trees)])
        sizes = [tree.rows(self.share) for tree in trees]
        plan = plan_forwards(sizes, self.token_budget, common_rows(trees, self.share))
        head = head_of(self.model)

        def forward(indices: list[int]) -> dict[int, np.ndarray]:
            found: dict[int, np.ndarray] = {}
            numbers = list(chain.from_iterable(range(firsts[index], firsts[index + 1]) for index in indices))
            with memory_errors(sum(sizes[index] for index in indices), str(trees[indices[0]])):
                batch = collate(trees, indices, self.share).to(self.device)
                hidden = answer_hidden_states(self.model, batch)
                spans = list(chain.from_iterable(pairwise(rows) for rows in batch.branch_rows))
                chosen = [
                    (n, start, wanted)
                    for n, (start, _) in zip(numbers, spans, strict=True)
                    if (wanted := tokens[n]) is not None
                ]
                if chosen:
                    rows = batch.label_rows[[row for _, row, _ in chosen]]
                    logits = token_logits(hidden[rows], head, [wanted for *_, wanted in chosen])
                    for (n, *_), values in zip(chosen, logits, strict=True):
                        found[n] = values
                if len(chosen) < len(numbers):
                    logprobs = head.label_logprobs(hidden, batch).double().cpu().numpy()
                    for n, (start, end) in zip(numbers, spans, strict=True):
                        if tokens[n] is None:
                            found[n] = logprobs[start:end].sum(keepdims=True)
            return found

        costs = [sum(sizes[index] for index in indices) for indices in plan]
        read = {n: row for found in dealt(plan, costs, forward, model=self.model) for n, row in found.items()}
        return [read[n] for n in range(len(tokens))]


@contextlib.contextmanager
def memory_errors(tokens: int, name: str) -> Iterator[None]:
    """Running out of memory as one clear line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise AlroFastError(
            f"{name}: not enough memory for a forward pass of {tokens} tokens; lower the token budget, the shuffles or "
            "the history length"
        ) from error
