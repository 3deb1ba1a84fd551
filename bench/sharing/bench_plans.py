"""What plans of batches are worth and cost: `pytest bench/sharing/bench_plans.py -s`.

On the lists of `bench_share` (histories of 20, the `movies` template):

- rows that would be saved if the windows of one user always met in a batch;
- how far the trees of later epochs, whose orders and questions are drawn anew, leave the sizes they were planned with;
- seconds of training steps beside the costs that their batches were levelled by, on one CPU thread or on CUDA;
- seconds of planning, by the number of lists.
"""

from __future__ import annotations

import time
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alro_fast.data.lists import open_prepared
from alro_fast.modeling.attention import answer_hidden_states
from alro_fast.modeling.lm_head import head_of
from alro_fast.modeling.packing import collate
from alro_fast.modeling.planning import EpochPlans, spread
from alro_fast.objectives.base import build_objective, objective_arguments
from alro_fast.prompts import PromptBuilder
from alro_fast.prompts.recranker import RecRankerPrompts
from alro_fast.training.plans.dataset import TreeDataset
from alro_fast.training.speed import costs
from bench.common import CUDA, DEVICE, DRY
from bench.sharing.bench_share import TRAINING, folder, ready_model, tokenizer_of

__all__ = ["folder"]  # a fixture

USERS, BUDGET, EPOCHS = (2, 16_384, 2) if DRY else (40, 8192, 5)
KINDS = [name for name in TRAINING if not name.startswith("dmpo")]
TIMED = 4 if DRY else 64
COUNTS = (200,) if DRY else (500, 8000, 80_000, 400_000)


def made(where: Path, what: str, users: int = USERS) -> tuple[list[Any], Any]:
    """All training lists of some users, user after user, and the objective."""
    options = dict(TRAINING[what])
    answer = options.pop("answer", "ranking")
    kind = RecRankerPrompts if options["objective"] == "recranker" else PromptBuilder
    objective = build_objective(
        objective_arguments()(**options), kind(tokenizer_of(where), "movies"), answer=answer, seed=0
    )
    lists = sorted(open_prepared(where).lists("train"), key=lambda one: one.user_id)
    chosen = [list(own) for _, own in groupby(lists, key=lambda one: one.user_id)]
    drawn = np.random.default_rng(0).permutation(len(chosen))[:users]
    return [one for n in sorted(drawn) for one in chosen[n]], objective


@pytest.mark.parametrize("what", KINDS)
def test_windows_of_a_user(folder: Path, what: str) -> None:
    """Rows of an epoch as it is planned, and of batches filled user after user."""
    lists, objective = made(folder, what)
    trees = [one.tree for one in objective.examples(lists, range(len(lists)), 0)]
    data = TreeDataset(lists, objective)
    plan = EpochPlans(data.sizes, BUDGET, 0, common=data.common)(0)
    by_user: list[list[int]] = [[]]
    for i in range(len(lists)):
        tried = [*by_user[-1], i]
        if len(tried) > 1 and collate(trees, tried).unique_tokens > BUDGET:
            by_user.append([i])
        else:
            by_user[-1] = tried
    rows = [sum(collate(trees, batch).unique_tokens for batch in batches) for batches in (plan, by_user)]
    alone = sum(data.sizes)
    print(
        f"{what}: {len(lists)} lists, rows a list {alone / len(lists):,.0f} alone, {rows[0] / len(lists):,.0f} in "
        f"{len(plan)} planned batches, {rows[1] / len(lists):,.0f} in {len(by_user)} by user: {rows[0] / rows[1]:.4f}"
    )


@pytest.mark.parametrize("what", KINDS)
def test_later_draws(folder: Path, what: str) -> None:
    """Rows of lists and of batches in later epochs, against those of the first."""
    lists, objective = made(folder, what)
    data = TreeDataset(lists, objective)
    plans = EpochPlans(data.sizes, BUDGET, 0, common=data.common)
    off, over = [], []
    for epoch in range(1, EPOCHS + 1):
        sizes = [one.tree.rows("batch") for one in objective.examples(lists, range(len(lists)), epoch)]
        off += [after / before - 1 for before, after in zip(data.sizes, sizes)]
        over += [sum(sizes[i] - data.common for i in batch) + data.common for batch in plans(epoch)]
    most = np.array(over) / BUDGET - 1
    print(
        f"{what}: a list's rows {100 * min(off):+.1f} .. {100 * max(off):+.1f} % of the first epoch's; batches over "
        f"{BUDGET}: {100 * (most > 0).mean():.1f} %, by {100 * most.max():.2f} % at most"
    )


@pytest.mark.parametrize("what", KINDS)
def test_seconds_by_cost(folder: Path, what: str) -> None:
    """Forward and backward passes of levelled batches, and of batches packed by rows alone."""
    lists, objective = made(folder, what)
    lists, budget, model = lists[:TIMED], BUDGET // 2, ready_model()
    prices = costs.Costs.of(model)
    data = TreeDataset(lists, objective, prices=prices)
    clock = time.perf_counter if CUDA else time.thread_time
    for name, plan in (("levelled", data.plans(budget, 0)(0)), ("packed", data.plans(budget, None)(0))):
        seconds: list[list[float]] = [[] for _ in plan]
        batches = [data[0, batch].to(torch.device(DEVICE)) for batch in plan]
        for _ in range(1 if DRY else 3):
            for batch, own in zip(batches, seconds):
                began = clock()
                hidden = answer_hidden_states(model, batch.packed)
                terms = objective.loss(hidden, head_of(model), batch.packed, batch.targets)
                sum(term.weight * term.value for term in terms).backward()
                if CUDA:
                    torch.cuda.synchronize()
                own.append(clock() - began)
        took, cost = np.array([min(own) for own in seconds]), np.array([sum(data.costs[i] for i in b) for b in plan])
        alike = np.corrcoef(took, cost)[0, 1] if len(plan) > 2 else float("nan")
        apart, deviation = np.ptp(took) / took.mean(), took.std() / took.mean()
        print(
            f"{what}, {name}: {len(plan)} batches, costs {100 * spread(plan, np.array(data.costs)):.1f} % apart, "
            f"seconds {100 * apart:.1f} % (standard deviation {100 * deviation:.1f} %), correlation {alike:.3f}"
        )
    for rate in (0.1, 0.3, 1.0):  # of attention, on another device
        other = prices._replace(pair=prices.pair * costs.ATTENTION_RATE / rate)
        true = np.array(TreeDataset(lists, objective, prices=other).costs)
        apart = spread(data.plans(budget, 0)(0), true)
        print(f"{what}: levelled at {costs.ATTENTION_RATE}, at {rate} {100 * apart:.1f} % apart")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("mean", "budget"), [(930, 4096), (1073, 4096), (1073, 8192)])
def test_planning(count: int, mean: int, budget: int) -> None:
    draw = np.random.default_rng(0)
    sizes = np.clip(draw.normal(mean, 160, count), 300, 1800).astype(int)
    prices = sizes * 1000 + sizes**2 // 4
    began = time.process_time()
    plans = EpochPlans(sizes.tolist(), budget, 3, common=120, costs=prices.tolist())
    built = time.process_time()
    plan = plans(7)
    print(
        f"{count:,} lists of {mean}, batches of {budget}: {built - began:.2f} s, another epoch "
        f"{time.process_time() - built:.2f} s, costs {100 * spread(plan, prices):.2f} % apart"
    )
