"""Random ragged ranking lists, with twins, for tests of losses and kernels."""

from __future__ import annotations

import torch

from alro_fast.losses import Grades, RankingLists
from alro_fast.ops import descending_ranks


def own_labels(lists: RankingLists, rows: int, vocab: int) -> torch.Tensor:
    """[rows] what every slot's row is to predict; random tokens on rows without a slot."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    told = lists.labels(rows)
    slots = torch.zeros(rows, dtype=torch.bool)
    slots[lists.slot_rows[lists.slot_rows >= 0]] = True
    return torch.where(slots, told, labels)


def random_list_tensors(
    sizes: list[int], twin: list[int], *, rows: int, vocab: int, form: str = "ranking", seed: int = 0, width: int = 0
) -> RankingLists:
    """Lists of the given sizes over distinct rows; ratings 0..5 with ties and, in lists of 4 or more, one ungraded.

    A list and its twin share ratings and ranks, and name their candidates by the same tokens in another order.
    form "ratings": five grade tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(width, *sizes)
    slot_rows = torch.full((len(sizes), width), -1)
    candidate_ids = torch.full((len(sizes), width), -1)
    ratings = torch.zeros(len(sizes), width)
    free = torch.randperm(rows, generator=generator)
    tokens = torch.randperm(vocab, generator=generator)
    for index, n in enumerate(sizes):
        slot_rows[index, :n], free = free[:n], free[n:]
        candidate_ids[index, :n] = tokens[:n][torch.randperm(n, generator=generator)]
        if twin[index] >= 0:
            ratings[index] = ratings[twin[index]]
            continue
        ratings[index, :n] = torch.randint(0, 6, (n,), generator=generator).float()
        if n >= 4:
            ratings[index, 1] = float("nan")
    grades = Grades(tokens[-5:], torch.arange(1.0, 6.0)) if form == "ratings" else None
    ranks = descending_ranks(ratings, slot_rows >= 0)
    return RankingLists(slot_rows, candidate_ids, ratings, ranks, torch.tensor(twin), grades)
