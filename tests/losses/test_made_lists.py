"""RankingLists made from ratings, their labels, and what contradicts itself in lists, labels, weights and counts."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from list_tensors import own_labels, random_list_tensors

import alro_fast
from alro_fast.data.records import target_ranks
from alro_fast.errors import AlroFastError
from alro_fast.losses import ALROCounts, ALROLoss, DMPOLoss, Grades, RankingLists, alro_loss, dmpo_loss, reference
from alro_fast.options import ObjectiveArguments

NAN = math.nan


def small(**changes) -> RankingLists:
    """A list of three items in two orders, and one of two; made by hand in the tests of `from_ratings`."""
    lists = RankingLists(
        slot_rows=torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, -1]]),
        candidate_ids=torch.tensor([[10, 11, 12], [12, 11, 10], [10, 11, -1]]),
        ratings=torch.tensor([[5.0, 2.0, 4.0], [5.0, 2.0, 4.0], [NAN, 1.0, NAN]]),
        ranks=torch.tensor([[1, 3, 2], [1, 3, 2], [2, 1, 0]]),
        twin=torch.tensor([-1, 0, -1]),
    )
    return lists._replace(**changes)


LABELS = torch.tensor([10, 12, 11, 12, 10, 11, 11, 10])


def loss(lists: RankingLists, labels: torch.Tensor = LABELS, **options):
    torch.manual_seed(0)
    return alro_loss(torch.randn(len(labels), 4), torch.randn(20, 4), labels, lists, **options)


def test_lists_are_made_from_ratings():
    made = RankingLists.from_ratings(
        [[5, 2, 4], [5, 2, 4], [NAN, 1]], [[10, 11, 12], [12, 11, 10], [10, 11]], twin=[-1, 0, -1]
    )
    for ours, by_hand in zip(made[:5], small()[:5]):
        torch.testing.assert_close(ours, by_hand, equal_nan=True)
    assert made.grades is None
    assert torch.equal(made.labels(), LABELS)
    assert torch.isfinite(loss(made, made.labels()).loss)


@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda rows: [torch.tensor(row) for row in rows]])
def test_tensors_and_arrays_are_taken_as_lists_are(make):
    ratings, ids, ties = [[5.0, 2.0, 2.0], [5.0, 2.0, 2.0]], [[10, 11, 12], [12, 11, 10]], [[3, 2, 1]] * 2
    plain = RankingLists.from_ratings(ratings, ids, twin=[-1, 0], first_rows=[3, 0], ties=ties)
    made = RankingLists.from_ratings(
        make(ratings), make(ids), twin=torch.tensor([-1, 0]), first_rows=np.array([3, 0]), ties=make(ties)
    )
    for ours, wanted in zip(made[:5], plain[:5]):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


def test_no_rows_and_no_lists_have_a_loss_of_0():
    none = RankingLists(*(field[:0] for field in small()[:5]))
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(20, 4, requires_grad=True)
    for backend in ("auto", "eager"):
        out = alro_loss(hidden, weight, LABELS[:0], none, backend=backend)
        out.loss.backward()
        assert out.loss.item() == 0
        assert not weight.grad.any()
    assert alro_fast.alro_loss_from_logits(torch.randn(0, 20), LABELS[:0], none).loss.item() == 0


def test_what_is_no_tensor_and_no_lists():
    hidden, weight = torch.randn(8, 4), torch.randn(20, 4)
    for given, said in (
        ((hidden, weight.to_sparse(), LABELS, small()), "weight has layout torch.sparse_coo; expected a dense tensor"),
        ((hidden.numpy(), weight, LABELS, small()), "hidden is a ndarray; expected a tensor"),
        ((hidden, None, LABELS, small()), "weight is a NoneType; expected a tensor"),
        ((hidden, weight, LABELS.tolist(), small()), "labels is a list; expected a tensor"),
        ((hidden, weight, LABELS, small()._asdict()), "lists is a dict; expected RankingLists"),
        ((hidden, weight, LABELS, tuple(small())), "lists is a tuple; expected RankingLists"),
    ):
        with pytest.raises(AlroFastError, match=said):
            alro_loss(*given)


def test_rows_with_separators_ties_and_other_rows():
    made = RankingLists.from_ratings(
        [[1, 3], [2, 2, 2]], [[7, 8], [4, 5, 6]], first_rows=[2, 9], step=2, ties=["ab", "cab"]
    )
    assert made.slot_rows.tolist() == [[2, 4, -1], [9, 11, 13]]
    assert made.ranks.tolist() == [[2, 1, 0], [3, 1, 2]]
    labels = made.labels(15, ignore_index=-1)
    assert labels.tolist() == [-1, -1, 8, -1, 7, -1, -1, -1, -1, 5, -1, 6, -1, 4, -1]
    with pytest.raises(AlroFastError, match="slot_rows reach row 13; expected rows below row_count, 13"):
        made.labels(13)


def test_many_random_lists_have_the_targets_of_their_ratings():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (40,), generator=generator).tolist()
    ratings = [torch.randint(0, 6, (n,), generator=generator).float().tolist() for n in sizes]
    names = [[f"item{(7 * i + n) % 13}" for i in range(n)] for n in sizes]
    made = RankingLists.from_ratings(ratings, [range(n) for n in sizes], ties=names)
    for number, (rating, name) in enumerate(zip(ratings, names)):
        assert made.ranks[number, : len(rating)].tolist() == target_ranks(rating, name)
    assert torch.isfinite(loss(made, made.labels()).loss)


def test_grades():
    grades = Grades(torch.tensor([3, 4, 5]), torch.tensor([1.0, 2.0, 3.0]))
    made = RankingLists.from_ratings([[3, 1], [2, 2.5, NAN]], grades=grades)
    assert made.candidate_ids.tolist() == [[-1, -1, -1]] * 2
    assert made.labels().tolist() == [5, 3, 4, -100, -100]
    loss(made, made.labels())
    loss(made, torch.tensor([5, 3, 4, 4, 5]))  # between two grades, and where there is no rating, any may stand
    for wrong, said in ((5, "labels holds 5 at row 1.*expected token 3"), (9, "labels holds 9 at row 1")):
        with pytest.raises(AlroFastError, match=said):
            loss(made, torch.tensor([5, wrong, 4, 4, 5]))
    with pytest.raises(AlroFastError, match=r"labels holds 9 at row 3.*one of grades\.token_ids"):
        loss(made, torch.tensor([5, 3, 4, 9, 5]))


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (([],), {}, "ratings holds no lists"),
        (([[1, 2]],), {}, "candidate_ids are for answers of identifiers"),
        (([[1, 2]], [[3]]), {}, "candidate_ids and ratings differ in their lengths"),
        (([[1, 2]], [[3, 4]]), {"ties": [["a"]]}, "ties and ratings differ in their lengths"),
        (([[1, 2]], [[3, 4]]), {"twin": [-1, 0]}, "twin has 2 entries for 1 lists"),
        (([[1, 2]], [[3, 4]]), {"first_rows": []}, "first_rows has 0 entries for 1 lists"),
        (([[1, 2]], [[3, 4]]), {"step": 0}, "step is 0; expected a whole number of at least 1"),
        (([[1, 2]], [[3, 4]]), {"step": 1.5}, "step is 1.5; expected a whole"),
        (([1, 2],), {}, r"ratings is \[1, 2\]; expected a sequence for every list"),
        (([[1, -2]], [[3, 4]]), {}, r"ratings\[0\]\[1\] is -2; expected a number in 0 .. 100"),
        (([[1, math.inf]], [[3, 4]]), {}, r"ratings\[0\]\[1\] is inf"),
        (([[1, None]], [[3, 4]]), {}, r"ratings\[0\]\[1\] is None"),
        (([[1, 2], []], [[3, 4], []]), {}, "ratings of list 1 are none"),
        (([[1, 2]], [[3, -5]]), {}, r"candidate_ids\[0\]\[1\] is -5; expected a token id"),
        (([[1, 2]], [[3, 1.5]]), {}, r"candidate_ids\[0\]\[1\] is 1.5; expected a token id"),
        (([[1, 2]], [[3, 3]]), {}, "candidate_ids holds token 3 twice in list 0"),
        (([[1, 2]], [[3, 4]]), {"twin": [7]}, r"twin\[0\] is 7; expected a whole number of at least -1 and below 1"),
        (([[1, 2]], [[3, 4]]), {"twin": [0]}, r"twin\[0\] is 0, itself a twin"),
        (([[1, 2], [2, 1]], [[3, 4]] * 2), {"twin": [-1, 0]}, r"twin\[1\] is 0, whose size or ratings differ"),
        (([[1, 2]], [[3, 4]]), {"first_rows": [-4]}, r"first_rows\[0\] is -4; expected a whole number of at least 0"),
        (([[1, 2]] * 2, [[3, 4]] * 2), {"first_rows": [0, 1]}, "slot_rows holds row 1 in list 0 and in list 1"),
        (([[1, 1]], [[3, 4]]), {"ties": [["a", 3]]}, "ties of list 0 cannot be sorted"),
    ],
)
def test_bad_arguments_of_the_builder(arguments, options, said):
    with pytest.raises(AlroFastError, match=said):
        RankingLists.from_ratings(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": [[1, 2, 3], [1, 2, 3], [2, 1, 0]]}, "ranks of list 0 put a rating of 2 before a rating of 4; "),
        ({"ranks": [[1, 3, 2], [1, 3, 2], [1, 2, 0]]}, "ranks of list 2 put no rating before a rating of 1; e"),
        ({"slot_rows": [[1, 2, 3], [4, 5, 6], [7, 0, -1]]},
         "labels holds 12 at row 1, which slot_rows names for slot 0 of list 0; expected token 10, or -100: are "),
        ({"candidate_ids": [[11, 10, 12], [12, 11, 10], [10, 11, -1]]}, "expected token 11, or -100"),
        ({"slot_rows": [[0, 1, 2], [0, 1, 2], [6, 7, -1]], "candidate_ids": [[10, 11, 12]] * 2 + [[10, 11, -1]]},
         "slot_rows of list 1 and of list 0, which it is the twin of, are the same rows"),
        ({"slot_rows": [[0, 1, 1], [3, 4, 5], [6, 7, -1]]}, "slot_rows holds row 1 twice in list 0; expected disti"),
        ({"slot_rows": [[0, 1, 2], [3, 4, 5], [0, 2, -1]], "candidate_ids": [[10, 11, 12], [12, 11, 10], [12, 10, -1]],
          "ratings": [[5.0, 2, 4]] * 2 + [[1.0, 2, 0]]},
         "slot_rows holds row 0 in list 0 and in list 2; expected rows of its own for every list"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(change, said):
    with pytest.raises(AlroFastError, match=said):
        loss(small(**{name: torch.tensor(value) for name, value in change.items()}))


def test_what_does_not_is_not():
    loss(small())
    loss(small(), torch.full_like(LABELS, -100))  # nothing to compare with
    same_names = torch.tensor([[10, 11, 12]] * 2 + [[10, 11, -1]])  # a token per item: the same in both orders
    loss(small(candidate_ids=same_names), torch.tensor([10, 12, 11, 10, 12, 11, 11, 10]))
    tied = small(ratings=torch.tensor([[5.0, 5.0, 5.0]] * 3))
    loss(tied)
    loss(tied, LABELS.int())


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "sigma"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", True, 1j])
def test_weights_that_are_none(name, value):
    for made in (lambda: loss(small(), **{name: value}), lambda: ALROLoss(**{name: value})):
        with pytest.raises(AlroFastError, match=f"{name} is {value!r}; expected "):
            made()


def test_weights_of_any_kind_of_number():
    wanted = loss(small(), alpha=0.25).loss
    for value in (np.float32(0.25), torch.tensor(0.25)):
        torch.testing.assert_close(loss(small(), alpha=value).loss, wanted)
    with pytest.raises(AlroFastError, match="alpha is None; expected a weight"):
        loss(small(), alpha=None)


def test_counts_that_are_none():
    nothing = small(twin=torch.tensor([-1, -1, -1]))
    for zero in (0, torch.tensor(0), torch.tensor(0.0)):
        out = loss(nothing, counts=ALROCounts(8, 3, zero))
        assert out.permutation.item() == 0
        torch.testing.assert_close(out.loss, loss(nothing).loss)
    for bad in (-1, math.nan, torch.tensor(-1), torch.tensor(math.inf), "8", None):
        with pytest.raises(AlroFastError, match=r"counts\.lists"):
            loss(nothing, counts=ALROCounts(8, bad, 1))


def test_one_set_of_defaults_for_class_functions_and_command():
    command = {name: getattr(ObjectiveArguments, name) for name in ("alpha", "beta", "gamma", "sigma", "score")}
    command |= {name: getattr(ObjectiveArguments, name) for name in ("score_space", "psl", "psl_space", "psl_detach")}
    for function in (alro_loss, alro_fast.alro_loss_from_logits, reference.alro_loss_from_logits):
        defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
        assert {name: defaults[name] for name in command} == command
    assert ALROLoss().options == {name: command[name] for name in ("alpha", "beta", "gamma", "sigma")}
    lists = random_list_tensors([4, 4], [-1, 0], rows=8, vocab=20)
    labels = own_labels(lists, 8, 20)
    hidden, weight = torch.randn(8, 4), torch.randn(20, 4)
    torch.testing.assert_close(ALROLoss()(hidden, weight, labels, lists), alro_loss(hidden, weight, labels, lists))
    torch.testing.assert_close(
        alro_loss(hidden, weight, labels, lists, score="prob"),
        reference.alro_loss(hidden, weight, labels, lists, score="prob", gamma=10.0),
    )
    preference = {"beta": ObjectiveArguments.dpo_beta, "ftx": ObjectiveArguments.ftx}
    preference |= {"variant": ObjectiveArguments.dmpo_variant}
    for function in (dmpo_loss, DMPOLoss.__init__, reference.dmpo_loss):
        defaults = inspect.signature(function).parameters
        assert {name: defaults[name].default for name in preference} == preference
