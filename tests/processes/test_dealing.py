"""Jobs dealt over processes: equal shares, each job once, results as of one process."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alro_fast.errors import AlroFastError
from alro_fast.processes import dealing, launch
from alro_fast.processes.dealing import Place, dealt, place, shares, shares_in_step, told


@given(st.lists(st.integers(1, 9), max_size=7), st.integers(1, 3))
def test_every_job_has_one_process_and_none_has_much_more_than_it_must(costs, count):
    hands = shares(costs, count)
    assert sorted(itertools.chain(*hands)) == list(range(len(costs)))
    assert all(hand == sorted(hand) for hand in hands)
    loads = [sum(costs[job] for job in hand) for hand in hands]
    ways = itertools.product(range(count), repeat=len(costs))
    best = min(max(sum(c for c, p in zip(costs, way) if p == process) for process in range(count)) for way in ways)
    assert max(loads) <= best * (4 / 3 - 1 / (3 * count)) + 1e-9  # Graham 1969


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 4))
def test_processes_in_step_have_as_many_jobs(costs, count):
    hands = shares_in_step(costs, count)
    assert {len(hand) for hand in hands} == {-(-len(costs) // count)}
    assert set(itertools.chain(*hands)) == set(range(len(costs)))


def test_one_process_deals_nothing(monkeypatch):
    monkeypatch.setattr(dealing, "_exchanged", lambda *_: pytest.fail("nobody is there to ask"))
    with dealing.dealing("cpu") as device:
        assert (device, place(), told(3)) == ("cpu", Place(0, 1), 3)
        assert dealt([1, 2, 3], [1, 1, 1], lambda job: 2 * job) == [2, 4, 6]
    assert not torch.distributed.is_initialized()


def test_several_processes_take_a_device_each(monkeypatch):
    """What cannot be is said before they look for each other."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.PartialState._shared_state", {})
    with pytest.raises(AlroFastError, match=r"--device cuda:1 is one device, and 2 processes .*; give cuda"):
        dealing.dealing("cuda:1").__enter__()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(AlroFastError, match=r"2 processes were launched, but there are 1 devices .*--device cpu"):
        dealing.dealing().__enter__()


def test_of_shards_every_process_takes_part_in_every_pass(monkeypatch):
    """Two processes and three jobs are two rounds; jobs of many passes are done by all."""
    model = torch.nn.Linear(1, 1)
    model.weight.ds_id = 0  # as ZeRO-3 marks it
    monkeypatch.setattr(dealing, "_place", Place(1, 2))
    done: list[int] = []

    def compute(job: int) -> int:
        done.append(job)
        return 2 * job

    theirs = ([3, 2, 1], {0: 0, 2: 4})
    monkeypatch.setattr(dealing, "_exchanged", lambda failure, mine: [theirs, mine])
    assert dealt([0, 1, 2], [3, 2, 1], compute, model=model) == [0, 2, 4]
    assert done == [1, 2]
    assert dealt([0, 1], [1, 1], compute, model=model, passes=True) == [0, 2]
    assert done == [1, 2, 0, 1]


@pytest.mark.parametrize(
    "environment,count,first",
    [
        ({}, 1, True),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 2, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 2, False),
        ({"WORLD_SIZE": "4"}, 1, True),  # somebody else's: launchers set both
    ],
)
def test_what_a_launcher_says(monkeypatch, environment, count, first):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (launch.launched(), launch.is_first()) == (count, first)
