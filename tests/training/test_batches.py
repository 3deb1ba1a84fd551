"""Every list once an epoch, in as many batches every epoch, wherever a run stops and whoever goes on with it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alro_fast.errors import AlroFastError
from alro_fast.modeling.planning import EpochPlans, plan_batches
from alro_fast.training.batches import CURSOR, Cursor, PlannedBatches, share_out

BUDGET = 50


def batches_of(sizes, budget=BUDGET, seed=5, start=None, **more):
    return PlannedBatches(EpochPlans(sizes, budget, seed, **more), start=start)


def shards(sizes, world_size, seed=5, start=None, most=None, costs=None):
    plans = EpochPlans(sizes, BUDGET, seed, most, costs=costs)
    return [PlannedBatches(plans, rank, world_size, start) for rank in range(world_size)]


def trained(shard, epoch):
    """The batches of one process in an epoch."""
    shard.set_epoch(epoch)
    return [batch for [(of, batch)] in shard if of == epoch]


def lists_of(batches):
    return [i for batch in batches for i in batch]


sizes_of_lists = st.lists(st.integers(1, BUDGET), min_size=1, max_size=80)


@given(
    sizes_of_lists, st.integers(1, 5), st.integers(0, 20), st.sampled_from([None, 0, 7]), st.sampled_from([None, 1, 4])
)
@settings(max_examples=200, deadline=None)
def test_every_epoch_trains_every_list_once_in_as_many_batches(sizes, world_size, epoch, seed, most):
    processes = shards(sizes, world_size, seed, most=most)
    batches = [trained(shard, epoch) for shard in processes]
    assert {len(each) for each in batches} == {len(processes[0])}
    assert sorted(lists_of(lists_of(batches))) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in batch) <= BUDGET for each in batches for batch in each)
    assert all(len(batch) <= (most or BUDGET * 2) for each in batches for batch in each)
    assert all(batch for each in batches for batch in each[:-1])  # a process has nothing in the last round at most,
    assert all(each[-1] for each in batches) or len(sizes) < len(batches) * len(
        batches[0]
    )  # of fewer lists than places


@given(
    sizes_of_lists, st.integers(0, 3),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 8)), min_size=1, max_size=4),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_run_goes_on_anywhere_with_any_number_of_processes(sizes, epoch, runs):
    """Runs of so many processes, batches per step, and steps until they are stopped; the last one is let finish."""
    cursor, seen = Cursor(epoch), []
    for world_size, accumulation, steps in [*runs, (2, 1, 1000)]:
        processes = shards(sizes, world_size, start=cursor)
        if processes[0].start.epoch > epoch:
            break
        batches, done = [trained(shard, epoch) for shard in processes], 0
        assert len({len(each) for each in batches}) == 1
        for _ in range(steps):
            now = [batch for each in batches for batch in each[:accumulation]]
            batches = [each[accumulation:] for each in batches]
            seen += lists_of(now)
            if now:
                done += len(now)
                plan, rest = processes[0].plans.fingerprint, processes[0].rest(epoch, done)
                cursor = Cursor(
                    **json.loads(json.dumps(cursor.advanced(world_size, len(now), accumulation, plan, rest).to_dict()))
                )
    assert sorted(seen) == list(range(len(sizes)))
    assert batches_of(sizes, start=cursor).start == cursor.next_epoch()


@pytest.mark.parametrize("count", [100, 900, 3000])
def test_plans_of_epochs_differ_in_neighbours_and_are_as_full(count):
    sizes = np.random.default_rng(1).integers(300, 900, size=count).tolist()
    plans = EpochPlans(sizes, 4096, 3)
    epochs = [plans(epoch) for epoch in range(8)]
    assert {len(plan) for plan in epochs} == {plans.num_batches}
    alone = [len(plan_batches(sizes, 4096, 3 + epoch)) for epoch in range(8)]
    assert len(set(alone)) > 1 or count == 100
    assert plans.num_batches <= 1.01 * np.mean(alone)
    assert epochs[0] == plan_batches(sizes, 4096, 3)
    neighbours = [{frozenset(batch) for batch in plan} for plan in epochs]
    assert all(len(a & b) < 0.2 * len(a) for a, b in itertools.pairwise(neighbours))


def test_batches_of_so_many_lists_where_tokens_leave_room():
    """A hundred lists in eights are thirteen batches, other neighbours every epoch."""
    sizes = np.random.default_rng(1).integers(100, 300, size=100).tolist()
    plans = EpochPlans(sizes, 8192, 3, most=8)
    epochs = [plans(epoch) for epoch in range(6)]
    assert {len(plan) for plan in epochs} == {13}
    assert {len(batch) for plan in epochs for batch in plan} <= {4, 8}
    pairs = [{(i, j) for batch in plan for i in batch for j in batch if i < j} for plan in epochs]
    assert all(len(a & b) < 0.4 * len(a) for a, b in itertools.pairwise(pairs))


def test_a_step_is_the_same_with_any_number_of_processes():
    """Steps of 12 batches, whether of one process or of six."""
    sizes = np.random.default_rng(2).integers(5, 20, size=300).tolist()
    plans = [share_out(EpochPlans(sizes, 50, 0)(2), world_size) for world_size in (1, 2, 3, 6)]
    assert len(plans[0]) % 6
    steps = [[sorted(lists_of(plan[i : i + 12])) for i in range(0, len(plan), 12)] for plan in plans]
    assert steps[0] == steps[1] == steps[2] == steps[3]


def test_the_last_rounds_are_halved_until_every_process_has_a_list():
    assert share_out([[0, 1], [2, 3, 4, 5], [6, 7]], 2) == [[0, 1], [2, 3, 4, 5], [6], [7]]
    assert share_out([[0, 1], [2, 3, 4], [5]], 2) == [[0, 1], [2], [3, 4], [5]]  # of the round before
    assert share_out([[0, 1], [2, 3], [4], [5], [6]], 2) == [[0], [1], [2, 3], [4], [5], [6]]  # and the one before that
    assert share_out([[0, 1, 2]], 4) == [[0], [1], [2], []]  # fewer lists than places
    assert share_out([[0], [1], [2, 3], [4], [5]], 4) == [[0], [1], [2, 3], [4], [5], [], [], []]
    costs = np.array([1, 1, 1, 9])  # one list as dear as nine
    plans = EpochPlans([1] * 4, 4, 0, costs=costs.tolist())
    assert sorted(share_out([[0, 1, 2, 3]], 2, plans.level)) == [[0, 1, 2], [3]]
    assert sorted(share_out([[0, 1, 2]], 4, plans.level)) == [[], [0], [1], [2]]


def test_within_the_last_rounds_a_run_goes_on_with_what_is_left():
    """Three processes take lists of the round before the last for the last; one process trains what they left."""
    sizes = [25] * 7  # batches of two, and one of one
    ranks = shards(sizes, 3)
    assert [len(batch) for batch in ranks[0].plans(0)] != [1] * 7
    batches = [trained(shard, 0) for shard in ranks]
    assert all(batch for each in batches for batch in each)
    assert len(batches[0]) == 2
    rest = ranks[0].rest(0, 3)
    cursor = Cursor().advanced(3, 3, 1, ranks[0].plans.fingerprint, rest)
    alone = batches_of(sizes, start=cursor)
    assert sorted(lists_of([each[0] for each in batches]) + lists_of(trained(alone, 0))) == list(range(7))
    assert ranks[0].rest(0, 0) is None


def test_batches_of_another_plan_are_refused():
    cursor = Cursor().advanced(1, 3, 1, EpochPlans([20, 30, 40, 50], BUDGET, 5).fingerprint)
    for sizes, budget, seed in (
        ([20, 30, 40, 49], BUDGET, 5),
        ([20, 30, 40, 50], 60, 5),
        ([20, 30, 40, 50], BUDGET, 6),
    ):
        with pytest.raises(AlroFastError, match="counts batches of other prompts or of another packing"):
            batches_of(sizes, budget, seed, start=cursor)
        assert batches_of(sizes, budget, seed, start=cursor.next_epoch()).start.epoch == 1
    with pytest.raises(AlroFastError, match="counts batches of other prompts or of another packing"):
        batches_of([20, 30, 40, 50], start=cursor, most=2)
    with pytest.raises(AlroFastError, match="--share"):
        batches_of([20, 30, 40, 50], start=cursor, common=10)


def state_of(folder, epoch, processes, **more):
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": 9, **more}))
    for rank in range(processes):
        (folder / (f"rng_state_{rank}.pth" if processes > 1 else "rng_state.pth")).touch()
    return Cursor.of(folder)


def test_the_cursor_is_read_back(tmp_path):
    cursor = Cursor(2, step=9).advanced(2, 6, 3, "abc").advanced(1, 3, 3, "abc")
    written = json.loads(json.dumps(cursor.to_dict()))
    assert state_of(tmp_path / "new", 2.5, 1, stateful_callbacks={CURSOR: written}) == cursor
    assert cursor == Cursor(2, trained=9, step=11, processes=1, accumulation=3, plan="abc")


@pytest.mark.parametrize("processes", [1, 3])
def test_checkpoints_without_a_cursor_go_on_at_an_epochs_end_alone(tmp_path, processes):
    """Version 0.1.0 recorded no place, and made other batches."""
    assert state_of(tmp_path / "boundary", 4.0, processes) == Cursor(4, 0, 9, processes)
    within = state_of(tmp_path / "within", 4.5, processes)
    with pytest.raises(AlroFastError, match="go on with the version that wrote it"):
        batches_of([20, 30, 40, 50], start=within)


def test_costs_are_part_of_a_plan():
    """All processes deal by the same; a run that goes on with others is refused."""
    sizes = np.random.default_rng(2).integers(5, 20, size=100).tolist()
    costs = [size**2 for size in sizes]
    ranks = shards(sizes, 3, costs=costs)
    batches = [trained(shard, 1) for shard in ranks]
    assert sorted(lists_of(lists_of(batches))) == list(range(100))
    assert all(batch for each in batches for batch in each)
    cursor = Cursor().advanced(1, 3, 1, ranks[0].plans.fingerprint)
    assert batches_of(sizes, start=cursor, costs=costs).done == 3
    with pytest.raises(AlroFastError, match="another packing"):
        batches_of(sizes, start=cursor)
