"""The definitions against closed forms, constants worked out by hand, and finite differences in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from list_tensors import random_list_tensors

from alro_fast.losses import reference
from alro_fast.losses.alro import DIVERGENCES, SCORES, SPACES
from alro_fast.losses.lists import RankingLists

F64 = torch.float64
ONES = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "sigma": 1.0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def one_list(scores, ratings, *, gamma=1.0, sigma=1.0, ranks=None):
    scores = torch.as_tensor(scores, dtype=F64)
    ratings = torch.as_tensor(ratings, dtype=F64)
    mask = torch.ones(1, len(ratings), dtype=torch.bool)
    ranks = None if ranks is None else torch.tensor([ranks])
    loss, expected = reference.soft_lambda(scores[None], ratings[None], mask, ranks=ranks, gamma=gamma, sigma=sigma)
    return loss[0], expected[0]


# ---- head


def test_logits_are_capped_after_scale_after_bias():
    hidden, weight, bias = (torch.tensor(x, dtype=F64) for x in ([[2.0]], [[1.0], [-3.0]], [1.0, 1.0]))
    z = reference.head_logits(hidden, weight, bias=bias, softcap=2.0, scale=0.5)
    # 0.5 * (2 + 1) = 1.5 and 0.5 * (-6 + 1) = -2.5; 2 tanh(0.75), 2 tanh(-1.25)
    torch.testing.assert_close(z, torch.tensor([[1.270297904, -1.696567280]], dtype=F64), atol=1e-8, rtol=0)


def test_logprobs_of_two_tokens():
    hidden, weight = torch.tensor([[1.0], [2.0]], dtype=F64), torch.tensor([[0.0], [math.log(3.0)]], dtype=F64)
    logprobs, lse = reference.linear_logprobs(hidden, weight, torch.tensor([[0, 1], [1, -100]]))
    expected = torch.tensor([[0.25, 0.75], [0.9, 1.0]], dtype=F64).log()  # 1:3, then 1:9; ignored -> 0
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(lse, torch.tensor([4.0, 10.0], dtype=F64).log())


def test_half_precision_is_computed_in_float32():
    hidden, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(11, 8, dtype=torch.bfloat16)
    logprobs, lse = reference.linear_logprobs(hidden, weight, torch.tensor([0, 5, 10]))
    assert logprobs.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(lse, (hidden.float() @ weight.float().T).logsumexp(1))


def test_cross_entropy_gradient_is_p_minus_onehot_over_rows():
    lists = random_list_tensors([2], [-1], rows=4, vocab=9)
    logits = torch.randn(4, 9, dtype=F64, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 8])
    out = reference.alro_loss_from_logits(logits, labels, lists, alpha=0.0, beta=0.0, gamma=1.0, sigma=1.0)
    (grad,) = torch.autograd.grad(out.sft, logits)
    p = logits.detach().softmax(1)
    p[[0, 2, 3], [3, 0, 8]] -= 1
    p[1] = 0
    torch.testing.assert_close(grad, p / 3)


# ---- soft-argmax


def test_discount_gap_table():
    table = [0.3691, 0.1309, 0.0693, 0.0438, 0.0306, 0.0229, 0.0179, 0.0144, 0.0120]
    gaps = reference.discount_gap(torch.arange(1, 10, dtype=F64))
    torch.testing.assert_close(gaps, torch.tensor(table, dtype=F64), atol=6e-5, rtol=0)


@pytest.mark.parametrize(("gamma", "share"), [(1, 0.232), (2, 0.451), (5, 0.943), (10, 0.9996)])
def test_sharpness_on_probabilities(gamma, share):
    """One slot at probability 1 and nine at 0: the soft-argmax gives it e^gamma / (e^gamma + 9)."""
    y = torch.zeros(10, 10, dtype=F64)
    y[0, 0] = 1.0
    # s = share * 1 + (1 - share) * mean(2..10)
    assert reference.soft_argmax(y, gamma)[0].item() == pytest.approx(share + (1 - share) * 6, abs=6e-3)


def test_one_hot_slots_give_the_target_permutation():
    tau = torch.tensor([3, 1, 4, 2, 5])
    y = torch.zeros(5, 5, dtype=F64)
    y[tau - 1, torch.arange(5)] = 1.0
    torch.testing.assert_close(reference.soft_argmax(y, 60.0), tau.to(F64))


def test_log_probabilities_at_sharpness_one_give_the_normalised_expected_position():
    p = torch.rand(4, 4, dtype=F64)
    position = torch.arange(1, 5, dtype=F64)
    torch.testing.assert_close(reference.soft_argmax(p.log(), 1.0), (position[:, None] * p).sum(0) / p.sum(0))


def test_soft_argmax_jacobian_and_its_null_direction():
    y = torch.randn(5, 5, dtype=F64)
    gamma = 1.7
    jacobian = torch.autograd.functional.jacobian(lambda y: reference.soft_argmax(y, gamma), y)  # [i, k, j]
    share = torch.softmax(gamma * y, dim=0)
    s = reference.soft_argmax(y, gamma)
    position = torch.arange(1, 6, dtype=F64)[:, None]
    own = torch.stack([jacobian[i, :, i] for i in range(5)], dim=1)
    torch.testing.assert_close(own, gamma * share * (position - s))
    torch.testing.assert_close(own.sum(0), torch.zeros(5, dtype=F64))
    assert jacobian.abs().sum() == pytest.approx(own.abs().sum())  # no other item moves


def test_ranks_are_zero_on_pads():
    scores, mask = torch.randn(2, 4, 4, dtype=F64), torch.tensor([[True] * 4, [True, True, False, False]])
    ranks = reference.soft_argmax_ranks(scores, mask, gamma=1.0)
    assert (ranks[1, 2:] == 0).all()
    torch.testing.assert_close(ranks[1, :2], reference.soft_argmax(scores[1, :2, :2], 1.0))


# ---- soft lambda


def test_soft_lambda_of_undecided_scores():
    """All s equal: every pair costs log2(2) = 1, so the loss is the sum of the pair weights."""
    loss, expected = one_list(torch.zeros(2, 2), [1.0, 0.0])
    assert loss.item() == pytest.approx(1 - 1 / math.log2(3))  # G = (1, 0), delta_1
    torch.testing.assert_close(expected, torch.full((2,), 1.5, dtype=F64))
    # gains 7, 1, 0 over maxDCG 7 + 1/log2(3) = 7.630930: (delta_1 + delta_2) * 7 / 7.630930, delta_1 + delta_2 = 1/2
    assert one_list(torch.zeros(3, 3), [3.0, 1.0, 0.0])[0].item() == pytest.approx(0.458660, abs=1e-6)


def test_soft_lambda_of_two_decided_items():
    """s = (1.25, 1.75): log2(1 + exp(2 * -0.5)) = 0.451941."""
    scores = torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=F64).log()
    loss, expected = one_list(scores, [2.0, 1.0], sigma=2.0)
    torch.testing.assert_close(expected, torch.tensor([1.25, 1.75], dtype=F64))
    gap = (3 - 1) / (3 + 1 / math.log2(3))
    assert loss.item() == pytest.approx((1 - 1 / math.log2(3)) * gap * 0.451941, rel=1e-6)


def test_swapping_two_unequal_items_raises_the_loss():
    ratings = torch.tensor([5.0, 3.0, 3.0, 1.0], dtype=F64)
    ranks = torch.tensor([1, 2, 3, 4])
    best = reference.pairwise_lambda(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64), ratings, ranks, 1.0)
    for i, j in itertools.combinations(range(4), 2):
        badness = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
        badness[[i, j]] = badness[[j, i]]
        swapped = reference.pairwise_lambda(badness, ratings, ranks, 1.0)
        if ratings[i] != ratings[j]:
            assert swapped > best


def test_equal_ratings_make_no_pair():
    scores = torch.randn(4, 4, dtype=F64, requires_grad=True)
    for value in (0.0, 3.0):
        loss, _ = one_list(scores, [value] * 4)
        (grad,) = torch.autograd.grad(loss, scores)
        assert loss.item() == 0
        assert (grad == 0).all()
    # a tie adds nothing: the weight of every other pair is what remains
    badness, ranks = torch.tensor([1.5, 2.5, 2.0], dtype=F64), torch.tensor([1, 2, 3])
    tied = reference.pairwise_lambda(badness, torch.tensor([2.0, 1.0, 1.0], dtype=F64), ranks, 1.0)
    gap = (3 - 1) / (3 + 1 / math.log2(3) + 1 / 2)
    by_hand = sum(
        float(reference.discount_gap(torch.tensor(float(d)))) * gap * math.log2(1 + math.exp(1.5 - other))
        for d, other in ((1, 2.5), (2, 2.0))
    )
    assert tied.item() == pytest.approx(by_hand, rel=1e-6)


def test_target_distance_weighs_pairs():
    """delta is from the target positions: the same ratings with another tie order weigh differently."""
    ratings, scores = [4.0, 4.0, 1.0], torch.zeros(3, 3)
    near, _ = one_list(scores, ratings, ranks=[1, 2, 3])
    gain = 15 - 1
    ideal = 15 + 15 / math.log2(3) + 1 / 2
    delta_1, delta_2 = 1 - 1 / math.log2(3), 1 / math.log2(3) - 1 / 2
    assert near.item() == pytest.approx((delta_1 + delta_2) * gain / ideal)
    assert one_list(scores, ratings)[0].item() == near.item()  # default ranks: ties by position


def test_ungraded_candidates_take_slots_but_are_in_no_pair():
    scores = torch.randn(4, 4, dtype=F64)
    loss, expected = one_list(scores, [3.0, math.nan, 1.0, 0.0], ranks=[1, 4, 2, 3])
    graded = [0, 2, 3]
    by_hand = reference.pairwise_lambda(
        expected[graded], torch.tensor([3.0, 1.0, 0.0], dtype=F64), torch.tensor([1, 2, 3]), 1.0
    )
    assert loss.item() == pytest.approx(by_hand.item())
    torch.testing.assert_close(expected, reference.soft_argmax(scores, 1.0))
    assert one_list(scores, [math.nan] * 4)[0].item() == 0


def test_soft_lambda_gradient_by_the_formula():
    """dL/dy_ki = (dL/ds_i) gamma P_ki (k - s_i), dL/ds from g_ij = sigma / ln 2 w_ij sigmoid(sigma (s_i - s_j))."""
    gamma, sigma, ratings = 1.3, 0.8, [4.0, 1.0, 3.0]
    y = torch.randn(3, 3, dtype=F64, requires_grad=True)
    loss, s = one_list(y, ratings, gamma=gamma, sigma=sigma)
    (grad,) = torch.autograd.grad(loss, y)
    gain = reference.gains(torch.tensor(ratings, dtype=F64))
    tau = [1, 3, 2]
    d_s = torch.zeros(3, dtype=F64)
    for i, j in itertools.permutations(range(3), 2):
        if ratings[i] > ratings[j]:
            delta = reference.discount_gap(torch.tensor(float(abs(tau[i] - tau[j])), dtype=F64))
            g = sigma / math.log(2) * delta * (gain[i] - gain[j]) * torch.sigmoid(sigma * (s[i] - s[j]))
            d_s[i] += g
            d_s[j] -= g
    share = torch.softmax(gamma * y, 0)
    position = torch.arange(1, 4, dtype=F64)[:, None]
    torch.testing.assert_close(grad, (d_s * gamma * share * (position - s)).detach())


@pytest.mark.parametrize(("score", "space"), list(itertools.product(SCORES, SPACES)))
def test_logit_gradients_of_the_three_scores(score, space):
    """The three lines of docs/methods.md 1.2 for dL/dz, with an arbitrary upstream gradient Y of y."""
    slots = torch.randn(3, 7, dtype=F64, requires_grad=True)
    ids = torch.tensor([5, 0, 2])
    upstream = torch.randn(3, 3, dtype=F64)
    y = reference.identifier_scores(slots, ids, score, space)
    (grad,) = torch.autograd.grad((y * upstream).sum(), slots)
    z = slots.detach()
    p = z.softmax(1) if space == "vocab" else torch.zeros_like(z).index_copy(1, ids, z[:, ids].softmax(1))
    onehot = torch.zeros(3, 3, 7, dtype=F64)
    onehot[:, torch.arange(3), ids] = 1
    if score == "logit":
        by_hand = torch.einsum("ki,kiv->kv", upstream, onehot)
    else:
        mass = upstream if score == "logprob" else upstream * p[:, ids]
        by_hand = torch.einsum("ki,kiv->kv", mass, onehot) - p * mass.sum(1, keepdim=True)
    torch.testing.assert_close(grad, by_hand)


# ---- permutation


def test_divergences_of_two_coins():
    z_p, z_q = torch.tensor([3.0, 1.0], dtype=F64).log(), torch.zeros(2, dtype=F64)
    assert reference.divergence(z_p, z_q, "kl").item() == pytest.approx(0.130812, abs=1e-6)
    assert reference.divergence(z_p, z_q, "ce").item() == pytest.approx(math.log(2))
    assert reference.divergence(z_p, z_q, "symmetric").item() == pytest.approx((0.130812 + 0.143841) / 2, abs=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_gradients_by_the_formulas(kind):
    a, b = (torch.randn(4, 6, dtype=F64, requires_grad=True) for _ in range(2))
    value = reference.divergence(a, b, kind)
    d_a, d_b = torch.autograd.grad(value.sum(), (a, b))
    p, q = a.detach().softmax(1), b.detach().softmax(1)
    kl, ce = (p * (p / q).log()).sum(1, keepdim=True), -(p * q.log()).sum(1, keepdim=True)
    if kind == "kl":
        by_hand = p * ((p / q).log() - kl), q - p
    elif kind == "ce":
        by_hand = -p * (q.log() + ce), q - p
    else:
        reverse = (q * (q / p).log()).sum(1, keepdim=True)
        by_hand = (p * ((p / q).log() - kl) + p - q) / 2, (q * ((q / p).log() - reverse) + q - p) / 2
    torch.testing.assert_close((d_a, d_b), by_hand)
    torch.testing.assert_close(d_a.sum(1), torch.zeros(4, dtype=F64))
    torch.testing.assert_close(d_b.sum(1), torch.zeros(4, dtype=F64))
    assert (reference.divergence(a, b, "kl") >= 0).all()
    (detached,) = torch.autograd.grad(reference.divergence(a, b, "kl", detach_p=True).sum(), b)
    torch.testing.assert_close(detached, q - p)


def test_unknown_divergence():
    with pytest.raises(ValueError, match="expected one of kl, ce, symmetric"):
        reference.divergence(torch.zeros(2), torch.zeros(2), "js")


def order_blind_logits(lists: RankingLists, rows: int, vocab: int, per_item: torch.Tensor) -> torch.Tensor:
    """Logits of a model that reads items, not places: slot k gives item i per_item[k, i], whatever its letter."""
    logits = torch.randn(rows, vocab, dtype=F64, generator=torch.Generator().manual_seed(1))
    others = logits[0].clone()
    for rows_of, ids in zip(lists.slot_rows, lists.candidate_ids):
        for slot, row in enumerate(rows_of[rows_of >= 0]):
            logits[row] = others
            logits[row, ids[: len(per_item)]] = per_item[slot]
    return logits


@pytest.mark.parametrize(
    ("psl", "space", "masked"),
    [
        ("kl", "candidates", False),
        ("kl", "candidates", True),
        ("symmetric", "candidates", False),
        ("kl", "vocab", False),
    ],
)
def test_a_model_blind_to_order_pays_nothing(psl, space, masked):
    lists = random_list_tensors([4, 4], [-1, 0], rows=8, vocab=12)
    assert not torch.equal(lists.candidate_ids[0], lists.candidate_ids[1])
    logits = order_blind_logits(lists, 8, 12, torch.randn(4, 4, dtype=F64))
    labels = torch.zeros(8, dtype=torch.long)
    options = {**ONES, "psl": psl, "psl_space": space, "psl_mask_emitted": masked}
    out = reference.alro_loss_from_logits(logits, labels, lists, **options)
    assert out.permutation.item() == pytest.approx(0, abs=1e-12)
    logits[lists.slot_rows[1, 0], lists.candidate_ids[1, 0]] += 2.0
    assert reference.alro_loss_from_logits(logits, labels, lists, **options).permutation > 1e-3


def test_permutation_is_the_mean_over_slots_with_a_choice():
    """m = 3: KL at slots 1 and 2 only, halved; items mapped through each list's own letters."""
    lists = random_list_tensors([3, 3], [-1, 0], rows=6, vocab=9)
    logits = torch.randn(6, 9, dtype=F64)
    out = reference.alro_loss_from_logits(logits, torch.zeros(6, dtype=torch.long), lists, **ONES)
    total = 0.0
    for slot in range(2):
        p = logits[lists.slot_rows[0, slot], lists.candidate_ids[0]].softmax(0)
        q = logits[lists.slot_rows[1, slot], lists.candidate_ids[1]].softmax(0)
        total += float((p * (p / q).log()).sum())
    assert out.permutation.item() == pytest.approx(total / 2)


def test_masking_leaves_out_what_the_target_has_placed():
    lists = random_list_tensors([3, 3], [-1, 0], rows=6, vocab=9)
    logits = torch.randn(6, 9, dtype=F64)
    out = reference.alro_loss_from_logits(
        logits, torch.zeros(6, dtype=torch.long), lists, **ONES, psl_mask_emitted=True
    )
    first = [logits[lists.slot_rows[l, 0], lists.candidate_ids[l]] for l in (0, 1)]
    left = lists.ranks[0] > 1  # the two candidates of target slots 2 and 3
    second = [logits[lists.slot_rows[l, 1], lists.candidate_ids[l, left]] for l in (0, 1)]
    by_hand = (reference.divergence(*first) + reference.divergence(*second)) / 2
    assert out.permutation.item() == pytest.approx(by_hand.item())


def test_relabelling_is_a_permutation_of_the_vocabulary():
    z = torch.arange(6, dtype=F64)
    moved = reference.relabelled(z, torch.tensor([1, 4, 2, -1]), torch.tensor([4, 2, 1, -1]))
    assert moved.tolist() == [0, 4, 1, 3, 2, 5]  # token 1 of p is token 4 of q, 4 is 2, 2 is 1; others stay


# ---- the ratings form


def test_expected_grade_and_its_gradient():
    rows = torch.randn(3, 8, dtype=F64, requires_grad=True)
    tokens, values = torch.tensor([6, 1, 3]), torch.tensor([1.0, 2.5, 5.0])
    grade = reference.expected_grade(rows, tokens, values)
    (grad,) = torch.autograd.grad(grade.sum(), rows)
    p = rows.detach()[:, tokens].softmax(1)
    torch.testing.assert_close(grade, p @ values.to(F64))
    by_hand = torch.zeros(3, 8, dtype=F64)
    by_hand[:, tokens] = p * (values - grade.detach()[:, None])
    torch.testing.assert_close(grad, by_hand)
    assert reference.expected_grade(torch.zeros(1, 8), tokens, values).item() == pytest.approx(8.5 / 3)


def test_ratings_form_prefers_higher_grades_for_better_items():
    lists = random_list_tensors([3], [-1], rows=3, vocab=12, form="ratings", seed=3)
    lists = lists._replace(ratings=torch.tensor([[5.0, 1.0, 3.0]]), ranks=torch.tensor([[1, 3, 2]]))
    logits = torch.zeros(3, 12, dtype=F64, requires_grad=True)
    out = reference.alro_loss_from_logits(logits, torch.zeros(3, dtype=torch.long), lists, **ONES)
    torch.testing.assert_close(out.expected_rank, torch.full((1, 3), 3.0, dtype=F64))
    (grad,) = torch.autograd.grad(out.soft_lambda, logits)
    top = lists.grades.token_ids[-1]
    assert grad[lists.slot_rows[0, 0], top] < 0 < grad[lists.slot_rows[0, 1], top]


# ---- the whole


@pytest.mark.parametrize("form", ["ranking", "ratings"])
@pytest.mark.parametrize(
    ("psl", "space", "detach"), [("kl", "candidates", True), ("ce", "vocab", False), ("symmetric", "vocab", True)]
)
def test_finite_differences_of_the_whole_loss(form, psl, space, detach):
    """Central differences of the loss itself; a detached teacher is held at its value, as the gradient holds it."""
    lists = random_list_tensors([4, 4, 2], [-1, 0, -1], rows=12, vocab=15, form=form)
    labels = torch.randint(0, 15, (12,), generator=torch.Generator().manual_seed(2))
    logits = torch.randn(12, 15, dtype=F64, generator=torch.Generator().manual_seed(3))
    options = {"alpha": 0.7, "beta": 1.3, "gamma": 1.2, "sigma": 0.9, "psl": psl, "psl_space": space}

    def loss(values, detach):
        return reference.alro_loss_from_logits(values, labels, lists, psl_detach=detach, **options)

    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, detach).loss, leaf)
    teacher_rows = set(lists.slot_rows[0].tolist()) if detach else set()
    checked = 0
    for row, column in itertools.product(range(12), range(0, 15, 2)):
        step = torch.zeros_like(logits)
        step[row, column] = 1e-5
        plus, minus = loss(logits + step, False), loss(logits - step, False)
        if row in teacher_rows:  # the permutation term is constant there
            plus, minus = plus.sft + 0.7 * plus.soft_lambda, minus.sft + 0.7 * minus.soft_lambda
        else:
            plus, minus = plus.loss, minus.loss
        assert (plus - minus).item() / 2e-5 == pytest.approx(grad[row, column].item(), abs=1e-8)
        checked += 1
    assert checked == 96
