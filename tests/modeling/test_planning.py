"""Plans hold every tree once within the budget; seeds change which trees meet."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alro_fast.modeling.planning import SPREAD, EpochPlans, levelled, plan_batches, plan_forwards, spread


@given(
    st.lists(st.integers(1, 50), max_size=60),
    st.sampled_from([None, 0, 1, 123]),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 20),
)
@settings(max_examples=150, deadline=None)
def test_plan_places_every_tree_once_within_the_budget(sizes, seed, most, common):
    sizes = [max(size, common) for size in sizes]  # each has what all have
    plan = plan_batches(sizes, 50, seed, most=most, common=common)
    own = [size - common for size in sizes]
    assert sorted(i for batch in plan for i in batch) == list(range(len(sizes)))
    assert all(common + sum(own[i] for i in batch) <= 50 for batch in plan)
    assert plan == plan_batches(sizes, 50, seed, most=most, common=common)
    assert all(len(batch) <= (most or 60) for batch in plan)
    fills = sorted(sum(own[i] for i in batch) for batch in plan if len(batch) != most)
    least = min(own, default=0) == 0  # of a tree that has nothing else a row is planned with, of all trees
    assert len(fills) < 2 or fills[0] + fills[1] > 50 - common - (len(sizes) if least else 0)  # else one too many
    for epoch in (0, 3):
        epochs = EpochPlans(sizes, 50, seed, most, common)(epoch)
        assert sorted(i for batch in epochs for i in batch) == list(range(len(sizes)))
        assert all(common + sum(own[i] for i in batch) <= 50 for batch in epochs)


def test_plan_fills_batches_that_fit_exactly():
    assert plan_batches([6, 4, 5, 5, 7, 3], 10) == [[0, 1], [2, 3], [4, 5]]


def test_plan_prefers_the_fullest_batch_with_room():
    assert plan_batches([6, 5, 4], 10) == [[0, 2], [1]]


def test_seeds_change_order_and_neighbours():
    sizes = np.random.default_rng(0).integers(50, 400, size=3000).tolist()
    plans = [plan_batches(sizes, 1000, seed) for seed in (0, 1)]
    neighbours = [{frozenset(batch) for batch in plan} for plan in plans]
    assert len(neighbours[0] & neighbours[1]) < 0.05 * len(plans[0])
    assert all(len(plan) * 1000 < 1.03 * sum(sizes) for plan in plans)


def test_a_tree_over_the_budget_swells_no_other_batch():
    """It goes alone; what fits is packed as ever; with 0 everything goes alone."""
    sizes = [3, 9, 4, 30, 6, 2]
    plan = plan_forwards(sizes, 10)
    assert [3] in plan
    assert sorted(i for batch in plan for i in batch) == list(range(6))
    assert all(sum(sizes[i] for i in batch) <= 10 for batch in plan if batch != [3])
    assert plan_forwards(sizes, 30) == plan_batches(sizes, 30)
    assert plan_forwards(sizes, 0) == [[i] for i in range(6)]
    assert plan_forwards([], 10) == []


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 1000)), min_size=1, max_size=60),
    st.sampled_from([None, 1, 3]),
)
@settings(max_examples=150, deadline=None)
def test_levelled_batches_hold_the_same_trees_and_are_no_further_apart(trees, most):
    sizes, costs = (np.array(column) for column in zip(*trees))
    plan = plan_batches(sizes.tolist(), 50, 0, most=most)
    level = levelled(plan, costs, sizes, 50, most)
    assert len(level) == len(plan)
    assert all(level)
    assert sorted(i for batch in level for i in batch) == list(range(len(sizes)))
    assert all(sizes[batch].sum() <= 50 for batch in level)
    assert all(len(batch) <= (most or 60) for batch in level)
    assert spread(level, costs) <= spread(plan, costs)
    assert level == levelled(plan, costs, sizes, 50, most)


def test_levelling_exchanges_what_makes_equal():
    """Costs 9 + 1 and 2 + 2: the nine alone is as near as whole trees come; the budget forbids it to leave."""
    sizes, costs = np.array([9, 1, 2, 2]), np.array([9, 1, 2, 2])
    assert sorted(levelled([[0, 1], [2, 3]], costs, sizes, 10)) == [[0], [1, 2, 3]]
    assert levelled([[0, 1], [2, 3]], costs, sizes, 4) == [[0, 1], [2, 3]]
    assert spread([[0], [1, 2, 3]], costs) == (9 - 5) / 7
    assert levelled([[0, 1], [], [2, 3]], costs, sizes, 10)[1] == []


def test_epochs_of_training_are_level_and_change_neighbours():
    """Long trees cost more a row than short ones, so batches as full as each other are not yet level."""
    draw = np.random.default_rng(0)
    for count, low, high, budget in ((3000, 200, 900, 4096), (300, 200, 900, 4096), (640, 230, 260, 4096)):
        sizes = draw.integers(low, high, count)
        costs = sizes * 1000 + sizes**2 // 2
        packed = EpochPlans(sizes.tolist(), budget, 3)
        plans = EpochPlans(sizes.tolist(), budget, 3, costs=costs.tolist())
        assert plans.num_batches <= 1.1 * packed.num_batches + 1
        epochs = [plans(epoch) for epoch in range(4)]
        for plan in epochs:
            assert len(plan) == plans.num_batches
            assert sorted(i for batch in plan for i in batch) == list(range(count))
            assert max(sizes[batch].sum() for batch in plan) <= budget
            assert spread(plan, costs) <= 1.25 * SPREAD
            assert spread(plan, costs) < 0.1 * spread(packed(0), costs)
        assert spread(epochs[0], costs) <= SPREAD
        neighbours = [{frozenset(batch) for batch in plan} for plan in epochs]
        assert all(len(a & b) < 0.05 * len(a) for a, b in pairwise(neighbours))


def normal_lists(count, mean=930, deviation=120, seed=1):
    """Rows and costs, as of real lists; costs grow faster than rows."""
    sizes = np.clip(np.random.default_rng(seed).normal(mean, deviation, count), 300, 1500).astype(int)
    return sizes, (sizes * (1 + sizes / 4000)).astype(int)


@pytest.mark.parametrize("count", [800, 1500])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_number_of_batches_that_levels_is_found_though_more_may_not_level(count, seed):
    """Four lists a batch: with as many in each of them plans are level, with a few batches more they are not."""
    sizes, costs = normal_lists(count, seed=seed)
    plans = EpochPlans(sizes.tolist(), 4096, 0, common=20, costs=costs.tolist())
    assert plans.num_batches == count // 4
    assert plans.num_batches <= 1.1 * len(plan_batches(sizes.tolist(), 4096, 0, common=20))
    assert all(spread(plans(epoch), costs) <= SPREAD for epoch in range(3))


@pytest.mark.parametrize(("mean", "dealt"), [(1300, True), (1400, False)])
def test_where_nothing_is_level_the_most_level_plan_is_taken(mean, dealt):
    """Lists of a third of the budget and more: dealt they are nearer to each other than packed where they find room."""
    sizes, costs = normal_lists(300, mean, 60)
    packed = plan_batches(sizes.tolist(), 4096, 0)
    least = spread(levelled(packed, costs, sizes, 4096), costs)
    plans = EpochPlans(sizes.tolist(), 4096, 0, costs=costs.tolist())
    apart = spread(plans(0), costs)
    assert apart > SPREAD
    assert apart < 0.99 * least if dealt else apart == least
    assert dealt or plans.num_batches == len(packed)


def test_planning_takes_time_by_the_number_of_trees():
    """Eight times the trees, about eight times the seconds; the quadratic part would make it sixty-four times."""
    seconds = []
    for count in (5000, 40_000):
        sizes = np.random.default_rng(0).integers(700, 1200, count)
        taken = []
        for _ in range(2):
            started = time.process_time()
            plans = EpochPlans(sizes.tolist(), 4096, 3, costs=(sizes * 1000 + sizes**2).tolist())
            plan = plans(1)
            taken.append(time.process_time() - started)
        seconds.append(min(taken))
        assert spread(plan, sizes * 1000 + sizes**2) <= SPREAD
    assert seconds[1] < 25 * seconds[0]


def test_a_plan_is_kept_until_another_is_asked_for():
    sizes = np.random.default_rng(0).integers(200, 900, 300)
    plans = EpochPlans(sizes.tolist(), 4096, 3, costs=sizes.tolist())
    first = plans(1)
    assert plans(1) is first
    assert plans(2) != first
    assert plans(1) == first


def test_of_lists_of_half_a_budget_and_more_no_batch_is_empty():
    """Where every tree has a batch of its own there are no more of them, however loose a plan may be."""
    sizes = np.random.default_rng(0).integers(60, 100, 30)
    plans = EpochPlans(sizes.tolist(), 100, 3, costs=sizes.tolist())
    assert plans.num_batches == 30
    assert all(len(batch) == 1 for batch in plans(0) + plans(5))
