"""Radix tries beside tries made token by token, and the rule of what sees what beside a comparison of prefixes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tries import plain_trie

from alro_fast.modeling import trie as tries
from alro_fast.modeling.trie import grow, ranges

BRANCHES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=9)
GROUPS = st.lists(BRANCHES, min_size=1, max_size=3)


def grown(groups):
    return grow([[np.asarray(ids) for ids in group] for group in groups])


@given(GROUPS)
@settings(max_examples=300, deadline=None)
def test_rows_are_those_of_a_trie_of_tokens(groups):
    found, plain = grown(groups), plain_trie(groups)
    assert found.ids.tolist() == plain.ids
    assert found.positions.tolist() == plain.positions
    assert found.row_node.tolist() == np.repeat(np.arange(len(found.node_parent)), found.node_rows).tolist()
    assert found.node_start[0] == 0
    assert found.node_start[-1] == len(plain.ids)
    assert (found.node_parent < np.arange(len(found.node_parent))).all()
    first_rows = found.node_start[:-1]
    above = [-1 if parent < 0 else int(found.node_start[parent + 1]) - 1 for parent in found.node_parent]
    assert [plain.parents[row] for row in first_rows] == above  # a node hangs below the last row of its parent
    assert found.node_until.tolist() == [plain.untils[row] for row in first_rows]
    for rows, leaf in zip(plain.branches, found.leaves):
        path = found.paths(np.array([leaf]))[1]
        assert set(found.row_node[rows].tolist()) <= set(path.tolist())


@given(GROUPS)
@settings(max_examples=150, deadline=None)
def test_a_row_sees_the_rows_of_its_prefixes(groups):
    found, plain = grown(groups), plain_trie(groups)
    rows = np.arange(found.num_rows)
    seen = (rows <= rows[:, None]) & (rows[:, None] < found.until)
    group = np.cumsum([parent < 0 for parent in plain.parents])  # of roots, which no row sees across
    for row in rows:
        prefix = plain.prefix(row)
        alike = [prefix[: len(plain.prefix(k))] == plain.prefix(k) and group[k] == group[row] for k in rows]
        assert seen[row].tolist() == alike
    keys, counts = found.chains(rows)
    assert np.split(keys, counts.cumsum()[:-1])[-1].tolist() == np.flatnonzero(seen[-1]).tolist()
    assert keys.tolist() == np.nonzero(seen)[1].tolist()


@given(GROUPS)
@settings(max_examples=100, deadline=None)
def test_runs_are_paths(groups):
    found, plain = grown(groups), plain_trie(groups)
    cuts = found.node_start[found.runs]
    assert (cuts[0], cuts[-1]) == (0, found.num_rows)
    for start, end in pairwise(cuts):
        assert plain.parents[start + 1 : end] == list(range(start, end - 1))
    for row in cuts[1:-1]:  # none could be longer
        assert plain.parents[row] != row - 1


@given(GROUPS, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_units_hold_what_their_rows_see_but_for_the_chain(groups, most):
    found = grown(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tries, "UNIT_ROWS", most)
        units = found.units
    assert (units[0], units[-1]) == (0, found.num_rows)
    assert ((np.diff(units) > 0) & (np.diff(units) <= most)).all()
    rows = np.arange(found.num_rows)
    for start, end in pairwise(units):
        chain = set(found.chains(np.array([start]))[0].tolist())
        for row in range(start, end):
            seen = set(np.flatnonzero((rows <= row) & (row < found.until)).tolist())
            assert {key for key in seen if key < start} <= chain


def test_units_are_cut_where_little_is_seen_across(monkeypatch):
    """A root of 4 rows and three children of 5: at the children, not in them."""
    monkeypatch.setattr(tries, "UNIT_ROWS", 9)
    assert grown([[[9] * 4 + [child] * 5 for child in range(3)]]).units.tolist() == [0, 9, 14, 19]
    monkeypatch.setattr(tries, "UNIT_ROWS", 10)
    assert grown([[[9] * 4 + [child] * 5 for child in range(3)]]).units.tolist() == [0, 9, 19]


@pytest.mark.parametrize(
    ("branches", "starts", "parents"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 5]], [0, 1, 2, 3, 4, 5], [-1, 0, 1, 1, 0]),  # three levels
        ([[1, 2], [3, 4]], [0, 2, 4], [-1, -1]),  # an empty root
        ([[1, 2, 3], [1, 2]], [0, 3], [-1]),  # a branch that is a prefix of another
        ([[1, 2], [1, 2, 3]], [0, 2, 3], [-1, 0]),
        ([[1, 2], [1, 2]], [0, 2], [-1]),  # identical branches
        ([[1, 2, 3]], [0, 3], [-1]),  # one branch
    ],
)
def test_by_hand(branches, starts, parents):
    found = grown([branches])
    assert (found.node_start.tolist(), found.node_parent.tolist()) == (starts, parents)


def test_ranges():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []
