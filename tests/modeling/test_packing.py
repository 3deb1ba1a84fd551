"""What branches begin with alike is one row each; packed streams read every answer where it is predicted."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tries import groups_of, plain_trie

from alro_fast.errors import AlroFastError
from alro_fast.modeling.packing import Branch, Tree, collate, common_rows, pack


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
    ("branches", "tokens"),
    [
        ([([1, 2, 3], 2), ([1, 2, 4, 5], 2)], 3),  # ends predict nothing
        ([([1, 2, 3, 9, 9], 1), ([1, 2, 3, 8, 9], 1)], 5),  # reaches into the answers
        ([([1, 2], 1), ([1, 2, 3], 1)], 2),  # a whole branch, its end too
        ([([1, 2, 3], 1), ([1, 2, 3], 2)], 2),  # equal branches
        ([([1, 2], 1), ([2, 1], 1)], 2),  # nothing
        ([([4, 5, 6], 1)], 2),  # one branch: everything
        ([([1, 2, 3, 4, 0], 2), ([1, 2, 3, 5, 0], 2), ([1, 7, 0], 1)], 6),  # what some have alike, and what all have
    ],
)
def test_what_begins_alike_counts_once(branches, tokens):
    found = tree(*branches)
    assert found.num_tokens == collate([found], [0]).unique_tokens == tokens
    assert found.unshared_tokens == sum(len(ids) for ids, _ in branches)


def test_stream_of_two_trees():
    trees = [tree(([1, 2, 3, 4], 2), ([1, 2, 5, 6, 7], 3)), tree(([8, 9], 1))]
    batch = collate(trees, [0, 1])
    assert batch.input_ids.tolist() == [1, 2, 3, 5, 6, 8]  # 4, 7 and 9 are ends
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3, 0]
    assert batch.labels.tolist() == [3, 4, 6, 7, 9]
    assert batch.answer_rows.tolist() == [1, 2, 3, 4, 5]  # 3 follows the last row of what both begin with
    assert batch.one_label_a_row
    assert batch.row_tree.tolist() == [0, 0, 0, 0, 1]
    assert batch.row_branch.tolist() == [0, 0, 1, 1, 0]
    assert (batch.unique_tokens, batch.unshared_tokens, batch.padded_tokens) == (6, 11, 15)
    assert batch.branch_rows == ((0, 2, 4), (4, 5))


def test_one_row_serves_every_branch_whose_answer_it_predicts():
    batch = collate([tree(([1, 2, 3, 4], 1), ([1, 2, 3, 5], 2))], [0])
    assert batch.segments.distinct_rows.tolist() == [0, 1, 2]
    assert batch.label_rows.tolist() == [0, 1, 2, 1, 2]
    assert batch.labels.tolist() == [2, 3, 4, 3, 5]
    assert not batch.one_label_a_row


def test_trees_of_a_batch_share_what_they_begin_with():
    """Two lists under one instruction [7, 7]; the second has a branch that goes on as one of the first does."""
    trees = [tree(([7, 7, 1, 2], 3), ([7, 7, 1, 3], 3)), tree(([7, 7, 4], 2), ([7, 7, 1, 3, 5], 3))]
    batch = collate(trees, [0, 1])
    assert batch.input_ids.tolist() == [7, 7, 1, 3]
    assert batch.answer_rows.tolist() == [2, 2, 1, 2, 3]
    assert collate(trees, [0, 1], "list").input_ids.tolist() == [7, 7, 1, 7, 7, 1, 3]
    unshared = collate(trees, [0, 1], "none")
    assert unshared.input_ids.tolist() == [7, 7, 1, 7, 7, 1, 7, 7, 7, 7, 1, 3]
    assert unshared.unique_tokens == batch.unshared_tokens - 4 == 12


@given(random_trees(), st.sampled_from(["batch", "list", "none"]))
@settings(max_examples=200, deadline=None)
def test_every_answer_token_is_predicted_by_the_row_before_it(trees, share):
    batch, plain = collate(trees, range(len(trees)), share), plain_trie(groups_of(trees, share))
    layout = batch.segments
    assert batch.unique_tokens == layout.num_rows == len(plain.ids)
    assert batch.input_ids.tolist() == plain.ids
    assert batch.position_ids.tolist() == layout.positions.tolist() == plain.positions
    assert layout.until.tolist() == plain.untils
    branches, n = iter(plain.branches), 0
    for number, t in enumerate(trees):
        for b, (ids, answer_start) in enumerate(zip(t.ids, t.answer_starts)):
            rows = next(branches)
            assert batch.input_ids[rows].tolist() == ids[:-1].tolist()
            assert batch.branch_rows[number][b : b + 2] == (n, n + len(ids) - answer_start)
            for position in range(answer_start, len(ids)):
                assert batch.answer_rows[n] == rows[position - 1]
                assert batch.labels[n] == ids[position]
                assert (batch.row_tree[n], batch.row_branch[n]) == (number, b)
                n += 1
    assert n == len(batch.labels) == len(batch.answer_rows) == sum(t.num_answer_rows for t in trees)
    assert layout.distinct_rows.tolist() == sorted(set(batch.answer_rows.tolist()))
    assert batch.one_label_a_row == (batch.label_rows.tolist() == list(range(n)))
    cuts = zip(layout.units.tolist(), layout.units.tolist()[1:])
    assert layout.unit_answers == tuple(sum(a <= row < b for row in layout.distinct_rows.tolist()) for a, b in cuts)
    lengths = [len(ids) - 1 for t in trees for ids in t.ids]
    assert (layout.longest, layout.shortest) == (max(lengths), min(lengths))


@given(random_trees())
@settings(max_examples=100, deadline=None)
def test_the_table_holds_every_label_in_its_row(trees):
    batch = collate(trees, range(len(trees)))
    table = batch.label_table
    assert table.flatten()[batch.label_places].tolist() == batch.labels.tolist()
    assert (batch.label_places // table.shape[1]).tolist() == batch.label_rows.tolist()
    assert len(set(batch.label_places.tolist())) == len(batch.labels) == (table >= 0).sum()
    assert table.shape == (len(batch.segments.distinct_rows), batch.label_rows.bincount().max())


@given(random_trees(), st.integers(0, 12), st.sampled_from(["batch", "list", "none"]), st.sampled_from([None, 0]))
@settings(max_examples=200, deadline=None)
def test_no_batch_is_over_the_budget(trees, room, share, seed):
    """Whatever the trees have alike, and however little room there is beyond the largest."""
    budget = max(t.rows(share) for t in trees) + room
    batches = pack(trees, budget, seed, share)
    assert sorted(index for batch in batches for index in batch.tree_indices) == list(range(len(trees)))
    assert all(batch.unique_tokens <= budget for batch in batches)


@given(random_trees())
@settings(max_examples=200, deadline=None)
def test_what_all_trees_have_alike_is_what_every_one_of_them_has(trees):
    def prefixes(one):
        return {tuple(ids[:n].tolist()) for ids in one.contexts for n in range(1, len(ids) + 1)}

    assert common_rows(trees, "batch") == len(set.intersection(*map(prefixes, trees)))
    assert common_rows(trees, "list") == common_rows(trees, "none") == 0


def test_a_shared_root_makes_room_for_more_trees():
    """Eight rows each, six of them the same in all: four trees in 14 rows, not one."""
    trees = [tree(([1, 2, 3, 4, 5, 6, 10 + n, 20 + n, 9], 8)) for n in range(4)]
    assert common_rows(trees, "batch") == 6
    assert [batch.unique_tokens for batch in pack(trees, 14)] == [14]
    assert [batch.unique_tokens for batch in pack(trees, 14, share="list")] == [8] * 4


def test_another_share_is_refused():
    with pytest.raises(AlroFastError, match="share is 'all'; expected one of batch, list, none"):
        collate([tree(([1, 2], 1))], [0], "all")


@given(random_trees(), st.sampled_from(["batch", "list", "none"]))
@settings(max_examples=100, deadline=None)
def test_varlen_sequences_are_paths(trees, share):
    """Every query once, in order; its keys are all rows from the beginning of its branches to itself."""
    batch, plain = collate(trees, range(len(trees)), share), plain_trie(groups_of(trees, share))
    segments = batch.segments

    def path(row):
        return [] if row < 0 else [*path(plain.parents[row]), row]

    check_sequences(segments.stream, list(range(segments.num_rows)), path)
    check_sequences(segments.answers, segments.distinct_rows.tolist(), path)


def check_sequences(varlen, queries, path):
    q_ends, k_ends = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    keys = queries if varlen.kv_index is None else varlen.kv_index.tolist()
    assert varlen.cu_seqlens_q.dtype == varlen.cu_seqlens_k.dtype == torch.int32
    assert len(q_ends) == len(k_ends)
    assert (q_ends[-1], k_ends[-1]) == (len(queries), len(keys))
    for (q0, q1), (k0, k1) in zip(pairwise(q_ends), pairwise(k_ends)):
        for back in range(1, q1 - q0 + 1):
            assert keys[k0 : k1 + 1 - back] == path(queries[q1 - back])
    assert varlen.max_seqlen_q == max(np.diff(q_ends))
    assert varlen.max_seqlen_k == max(np.diff(k_ends))


def test_a_tree_over_the_budget_is_named():
    trees = [tree(([1, 2], 1)), tree(([1, 2, 3, 4, 5], 2), name="user 17, list 3")]
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
    batch = collate([tree(([1, 2, 3, 9], 1), ([1, 2, 4, 9], 1))], [0])
    copy = pickle.loads(pickle.dumps(batch))
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(copy, name), value)
            assert getattr(moved, name).device.type == "meta"
    assert moved.segments.until.device.type == moved.segments.distinct_rows.device.type == "meta"
    assert moved.segments.stream.kv_index.device.type == moved.segments.answers.cu_seqlens_k.device.type == "meta"
    assert moved.segments.cache is not batch.segments.cache


def test_ids_may_be_arrays_or_tensors():
    for ids in (np.array([1, 2, 3], dtype=np.int32), torch.tensor([1, 2, 3])):
        assert collate([tree((ids, 2))], [0]).input_ids.tolist() == [1, 2]
