"""Trees find their prefix; packed streams hold every token once and read every answer where it is predicted."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alro_fast.errors import AlroFastError
from alro_fast.modeling.packing import Branch, Tree, collate, pack, plan_batches, plan_forwards


def tree(*branches, name=None):
    return Tree([Branch(ids, answer_start) for ids, answer_start in branches], name=name)


@st.composite
def random_trees(draw):
    """A few trees over three token ids, so that prefixes of every kind come about by themselves."""
    result = []
    for _ in range(draw(st.integers(1, 4))):
        stem = draw(st.lists(st.integers(0, 2), max_size=6))
        branches = []
        for _ in range(draw(st.integers(1, 4))):
            ids = stem + draw(st.lists(st.integers(0, 2), max_size=5))
            ids += [1] * max(0, 2 - len(ids))
            branches.append((ids, draw(st.integers(1, len(ids) - 1))))
        result.append(tree(*branches))
    return result


@pytest.mark.parametrize(
    ("branches", "prefix", "tokens"),
    [
        ([([1, 2, 3], 2), ([1, 2, 4, 5], 2)], 2, 5),
        ([([1, 2, 3, 9], 1), ([1, 2, 3, 8], 1)], 3, 5),  # reaches into the answers
        ([([1, 2], 1), ([1, 2, 3], 1)], 2, 3),  # a whole branch
        ([([1, 2, 3], 1), ([1, 2, 3], 2)], 3, 3),  # equal branches
        ([([1, 2], 1), ([2, 1], 1)], 0, 4),  # empty
        ([([4, 5, 6], 1)], 3, 3),  # one branch: everything
        ([([1, 2, 3, 4], 2), ([1, 2, 3, 5], 2), ([1, 7], 1)], 1, 8),  # the prefix is that of all branches
    ],
)
def test_prefix_is_the_longest_common_one(branches, prefix, tokens):
    found = tree(*branches)
    assert (found.prefix_length, found.num_tokens) == (prefix, tokens)
    assert found.unshared_tokens == sum(len(ids) for ids, _ in branches)


def test_stream_of_two_trees():
    trees = [tree(([1, 2, 3, 4], 2), ([1, 2, 5, 6, 7], 3)), tree(([8, 9], 1))]
    batch = collate(trees, [0, 1])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1]
    assert batch.labels.tolist() == [3, 4, 6, 7, 9]
    assert batch.answer_rows.tolist() == [1, 2, 4, 5, 7]  # 3 follows the last prefix row
    assert batch.row_tree.tolist() == [0, 0, 0, 0, 1]
    assert batch.row_branch.tolist() == [0, 0, 1, 1, 0]
    assert (batch.unique_tokens, batch.unshared_tokens, batch.padded_tokens) == (9, 11, 15)
    assert batch.branch_rows == ((0, 2, 4), (4, 5))


def test_answers_inside_the_prefix_are_read_once_per_branch():
    batch = collate([tree(([1, 2, 3, 4], 1), ([1, 2, 3, 5], 2))], [0])
    assert batch.answer_rows.tolist() == [0, 1, 2, 1, 2]
    assert batch.labels.tolist() == [2, 3, 4, 3, 5]


@given(random_trees())
@settings(max_examples=150, deadline=None)
def test_every_answer_token_is_predicted_by_the_row_before_it(trees):
    batch = collate(trees, range(len(trees)))
    rows = batch.unique_tokens, sum(t.num_tokens for t in trees), batch.segments.num_rows, len(batch.input_ids)
    assert len(set(rows)) == 1
    n = 0
    for number, (t, span) in enumerate(zip(trees, batch.segments.spans)):
        own = span.start + span.prefix
        for b, (ids, answer_start) in enumerate(zip(t.ids, t.answer_starts)):
            rows = [*range(span.start, span.start + span.prefix), *range(own, own + span.lengths[b])]
            assert batch.input_ids[rows].tolist() == ids.tolist()
            assert batch.position_ids[rows].tolist() == list(range(len(ids)))
            assert batch.branch_rows[number][b : b + 2] == (n, n + len(ids) - answer_start)
            for position in range(answer_start, len(ids)):
                assert batch.answer_rows[n] == rows[position - 1]
                assert batch.labels[n] == ids[position]
                assert (batch.row_tree[n], batch.row_branch[n]) == (number, b)
                n += 1
            own += span.lengths[b]
        assert own == span.end
    assert n == len(batch.labels) == len(batch.answer_rows) == sum(t.num_answer_rows for t in trees)


@given(random_trees())
@settings(max_examples=100, deadline=None)
def test_varlen_sequences_are_the_branches(trees):
    """Sequence by sequence: keys are the branch's own rows in order, queries the last len_q of them."""
    segments = (batch := collate(trees, range(len(trees)))).segments
    expected, answers = [], []
    for t, span in zip(trees, segments.spans):
        prefix, own = list(range(span.start, span.start + span.prefix)), span.start + span.prefix
        for b, length in enumerate(span.lengths):
            rows = [*prefix, *range(own, own + length)]
            if b == 0 or length:
                expected.append((rows, len(rows) if b == 0 else length))
            answers.append((rows[:-1], len(rows) - t.answer_starts[b]))  # the last token predicts nothing
            own += length
    check_sequences(segments.stream, torch.arange(len(batch.input_ids)), expected)
    check_sequences(segments.answers, batch.answer_rows, answers)
    assert segments.answer_rows is batch.answer_rows
    assert segments.answer_counts == tuple(tree.num_answer_rows for tree in trees)


def check_sequences(varlen, queries, expected):
    """Expected: per sequence the stream rows of its keys, and how many of the last are queries."""
    q_ends, k_ends = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    keys = torch.arange(len(queries)) if varlen.kv_index is None else varlen.kv_index
    assert varlen.cu_seqlens_q.dtype == varlen.cu_seqlens_k.dtype == torch.int32
    assert len(q_ends) == len(k_ends) == len(expected) + 1
    assert (q_ends[-1], k_ends[-1]) == (len(queries), len(keys))
    for s, (rows, len_q) in enumerate(expected):
        assert keys[k_ends[s] : k_ends[s + 1]].tolist() == rows
        assert queries[q_ends[s] : q_ends[s + 1]].tolist() == rows[len(rows) - len_q :]
    assert varlen.max_seqlen_q == max(np.diff(q_ends))
    assert varlen.max_seqlen_k == max(np.diff(k_ends))


@given(st.lists(st.integers(1, 50), max_size=60), st.sampled_from([None, 0, 1, 123]), st.sampled_from([None, 1, 3]))
@settings(max_examples=150, deadline=None)
def test_plan_places_every_tree_once_within_the_budget(sizes, seed, most):
    plan = plan_batches(sizes, 50, seed, most=most)
    assert sorted(i for batch in plan for i in batch) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in batch) <= 50 for batch in plan)
    assert plan == plan_batches(sizes, 50, seed, most=most)
    assert all(len(batch) <= (most or 60) for batch in plan)
    fills = sorted(sum(sizes[i] for i in batch) for batch in plan if len(batch) != most)
    assert len(fills) < 2 or fills[0] + fills[1] > 50  # else the later of the two need not have been opened


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


def test_a_tree_over_the_budget_is_named():
    trees = [tree(([1, 2], 1)), tree(([1, 2, 3, 4], 2), name="user 17, list 3")]
    with pytest.raises(AlroFastError, match=r"tree user 17, list 3 \(number 1\) takes 4 tokens, more than .* 3"):
        pack(trees, 3)
    with pytest.raises(AlroFastError, match="token_budget is 0"):
        pack(trees, 0)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([], "tree u9: no branches"),
        ([([], 1)], "tree u9, branch 0: expected a flat, non-empty"),
        ([([1, 2], 1), ([[1], [2]], 1)], "tree u9, branch 1: expected a flat"),
        ([([1, 2], 0)], "tree u9, branch 0: answer_start is 0, expected 1 .. 1"),
        ([([1, 2], 1), ([1, 2], 2)], "tree u9, branch 1: answer_start is 2"),
        ([([1, -2], 1)], "tree u9, branch 0: token ids must be whole numbers >= 0"),
        ([([1.0, 2.5], 1)], "whole numbers"),
        ([([1], 1)], "expected 1 .. 0"),
    ],
)
def test_bad_branches_name_the_tree(branches, message):
    with pytest.raises(AlroFastError, match=message.replace("..", r"\.\.")):
        tree(*branches, name="u9")


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


def test_nothing_to_collate():
    with pytest.raises(AlroFastError, match="no trees"):
        collate([], [])


def test_pack_covers_all_trees():
    trees = [tree((list(range(n)), 1)) for n in (3, 9, 4, 6)]
    batches = pack(trees, 10, seed=4)
    assert sorted(i for batch in batches for i in batch.tree_indices) == [0, 1, 2, 3]
    for batch in batches:
        for local, index in enumerate(batch.tree_indices):
            assert batch.labels[slice(*batch.branch_rows[local])].tolist() == trees[index].ids[0][1:].tolist()


def test_batches_travel():
    batch = collate([tree(([1, 2, 3], 1), ([1, 2, 4], 1))], [0])
    copy = pickle.loads(pickle.dumps(batch))
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(copy, name), value)
            assert getattr(moved, name).device.type == "meta"
    assert moved.segments.stream.kv_index.device.type == moved.segments.answers.cu_seqlens_k.device.type == "meta"
    assert moved.segments.cache is not batch.segments.cache


def test_ids_may_be_arrays_or_tensors():
    for ids in (np.array([1, 2, 3], dtype=np.int32), torch.tensor([1, 2, 3])):
        assert collate([tree((ids, 2))], [0]).input_ids.tolist() == [1, 2, 3]
