"""dmpo_loss: closed forms, derivatives, order of the relatives, ragged negatives, and mistakes in its arguments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alro_fast import DMPOLoss, dmpo_loss
from alro_fast.errors import AlroFastError
from alro_fast.losses import reference
from alro_fast.losses.preference import VARIANTS

BETA = 0.3


def draw(users=5, k=4, seed=0, dtype=torch.float64, paired=False):
    """chosen, rejected, and the same two under the reference: sums around -20, as answers of ten tokens have."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(users, k) if paired else (users,), (users, k)]
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * 4 - 20).to(dtype) for shape in shapes] + [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * 4 - 20).to(dtype) for shape in shapes
    ]


def margins(chosen, rejected, ref_chosen, ref_rejected):
    return (chosen - ref_chosen)[:, None] - (rejected - ref_rejected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_are_those_of_the_formulas(variant):
    inputs = draw()
    m = margins(*inputs).tolist()
    sig = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    by_hand = {
        "dmpo": [-math.log(sig(BETA * sum(row) / 4)) for row in m],
        "mean_outside": [-sum(math.log(sig(BETA * x)) for x in row) / 4 for row in m],
        "sdpo": [math.log(1 + sum(math.exp(-BETA * x) for x in row)) for row in m],
        "mult": [math.log(1 + sum(math.exp(-BETA * x) for x in row)) for row in m],  # one positive: sdpo
    }
    out = dmpo_loss(*inputs, beta=BETA, variant=variant)
    assert out.loss.item() == pytest.approx(sum(by_hand[variant]) / 5, rel=1e-12)
    torch.testing.assert_close(out.rewards_chosen, BETA * (inputs[0] - inputs[2]))
    torch.testing.assert_close(out.rewards_rejected, BETA * (inputs[1] - inputs[3]))
    assert not out.rewards_chosen.requires_grad


def test_gradients_are_those_of_the_closed_forms():
    """docs/methods.md 2.1, 2.3, 2.4: weights of the chosen and of every rejected answer."""
    inputs = draw()
    m = BETA * margins(*inputs)
    pull = torch.sigmoid(-m.mean(dim=1))
    soft = torch.exp(-m) / (1 + torch.exp(-m).sum(dim=1, keepdim=True))
    expected = {
        "dmpo": (-BETA * pull, (BETA / 4 * pull)[:, None].expand(5, 4)),
        "mean_outside": (-BETA / 4 * torch.sigmoid(-m).sum(dim=1), BETA / 4 * torch.sigmoid(-m)),
        "sdpo": (-BETA * soft.sum(dim=1), BETA * soft),
        "mult": (-BETA * soft.sum(dim=1), BETA * soft),
    }
    for variant, (d_chosen, d_rejected) in expected.items():
        leaves = [x.clone().requires_grad_() for x in inputs[:2]]
        dmpo_loss(*leaves, *inputs[2:], beta=BETA, variant=variant).loss.backward()
        torch.testing.assert_close(leaves[0].grad, d_chosen / 5, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(leaves[1].grad, d_rejected / 5, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("paired", [False, True])
def test_finite_differences_and_the_reference(variant, paired):
    """gradcheck with ragged negatives and ftx; and value and gradient of `reference.dmpo_loss`."""
    inputs = draw(users=4, k=3, paired=paired)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    options = {
        "beta": BETA, "variant": variant, "rejected_mask": mask, "ftx": 0.7,
        "chosen_lengths": torch.randint(1, 9, inputs[0].shape, generator=torch.Generator().manual_seed(1)),
    }  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: dmpo_loss(*x, **options).loss, leaves)
    gradients = []
    for function in (dmpo_loss, reference.dmpo_loss):
        out = function(*leaves, **options)
        gradients.append(torch.autograd.grad(out.loss, leaves))
        if function is dmpo_loss:
            mine = out
    for one, other in zip(mine, out):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_negative_is_dpo_and_equal_models_give_log_two(variant):
    chosen, rejected, ref_chosen, ref_rejected = draw(k=1, dtype=torch.float32)
    dpo = -torch.nn.functional.logsigmoid(BETA * margins(chosen, rejected, ref_chosen, ref_rejected)).mean()
    out = dmpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=BETA, variant=variant)
    torch.testing.assert_close(out.loss, dpo)
    for k in (1, 7):
        chosen, rejected, *_ = draw(k=k, dtype=torch.float32)
        start = dmpo_loss(chosen, rejected, chosen, rejected, variant=variant).loss.item()
        expected = math.log(2) if variant in ("dmpo", "mean_outside") else math.log(1 + k)
        assert start == pytest.approx(expected, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6), st.floats(0.05, 2))
def test_the_relatives_are_ordered(values, beta):
    """2.1: mean inside <= mean outside <= worst pair <= sdpo, equal for k = 1 only."""
    chosen, rejected = torch.zeros(1, dtype=torch.float64), -torch.tensor([values], dtype=torch.float64)
    loss = {v: dmpo_loss(chosen, rejected, beta=beta, variant=v).loss.item() for v in VARIANTS}
    worst = max(math.log1p(math.exp(-beta * value)) for value in values)
    slack = 1e-9
    assert loss["dmpo"] <= loss["mean_outside"] + slack
    assert loss["mean_outside"] <= worst + slack
    assert worst <= loss["sdpo"] + slack
    assert loss["sdpo"] == pytest.approx(loss["mult"])


def test_several_positives_bound_plackett_luce_from_above():
    """2.4: the multinomial loss is above the exact likelihood of every positive before every negative."""
    positives, negatives = draw(users=1, k=3)[1], draw(users=1, k=4, seed=1)[1]
    weights = torch.exp(BETA * torch.cat([positives, negatives], 1))[0]
    exact = 0.0
    for order in itertools.permutations(range(3)):
        left, probability = weights.sum(), 1.0
        for i in order:
            probability, left = probability * weights[i] / left, left - weights[i]
        exact += probability
    out = dmpo_loss(positives, negatives, beta=BETA, variant="mult")
    assert out.loss.item() - math.log(math.factorial(3)) >= -math.log(exact)
    mask = torch.tensor([[True, True, False]])
    fewer = dmpo_loss(positives, negatives, beta=BETA, variant="mult", chosen_mask=mask).loss
    torch.testing.assert_close(fewer, dmpo_loss(positives[:, :2], negatives, beta=BETA, variant="mult").loss)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_do_not_count(variant):
    """Whatever stands on a pad, even NaN, changes neither loss nor gradient; a user without negatives is left out."""
    inputs = draw(users=3, k=4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    results = []
    for junk in (0.0, float("nan"), float("inf")):
        leaves = [x.clone() for x in inputs]
        leaves[1][~mask] = junk
        leaves[3][~mask] = junk
        leaves = [x.requires_grad_() for x in leaves]
        out = dmpo_loss(*leaves, beta=BETA, variant=variant, rejected_mask=mask)
        out.loss.backward()
        assert leaves[0].grad.isfinite().all()
        assert (leaves[1].grad[~mask] == 0).all()
        results.append(torch.cat([out.loss[None].detach(), leaves[0].grad, leaves[1].grad[mask]]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    alone = [
        dmpo_loss(*(x[u : u + 1] for x in inputs), beta=BETA, variant=variant, rejected_mask=mask[u : u + 1]).loss
        for u in (0, 2)
    ]
    torch.testing.assert_close(results[0][0], sum(alone) / 2)


def test_far_margins_stay_finite():
    """The released S-DPO takes the log of a sum of exponentials; ours must survive margins of thousands."""
    for variant in VARIANTS:
        chosen = torch.tensor([-4000.0, 0.0], requires_grad=True)
        rejected = torch.tensor([[0.0, -1.0], [-4000.0, -4000.0]], requires_grad=True)
        loss = dmpo_loss(chosen, rejected, beta=1.0, variant=variant).loss
        loss.backward()
        assert loss.item() == pytest.approx(2000, rel=1e-3)
        assert chosen.grad.isfinite().all()
        assert rejected.grad.isfinite().all()


def test_the_release_is_one_configuration():
    """2.2: -log sig(beta (log pi(w) - log pi(l))) per pair, plus the per-token cross-entropy of the chosen answer."""
    chosen, rejected, *_ = draw(users=3, k=2, paired=True)
    lengths = torch.tensor([[3, 5], [4, 4], [9, 2]])
    by_hand = (-torch.log(torch.sigmoid(0.1 * (chosen - rejected))) - chosen / lengths).mean()
    out = DMPOLoss(beta=0.1, variant="mean_outside", ftx=1.0)(chosen, rejected, chosen_lengths=lengths)
    torch.testing.assert_close(out.loss, by_hand)


def test_half_precision_is_computed_in_float32():
    inputs = draw(dtype=torch.bfloat16)
    out = dmpo_loss(*inputs)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, dmpo_loss(*(x.float() for x in inputs)).loss)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": "ipo"}, "variant is 'ipo'; expected one of dmpo, mean_outside, sdpo, mult"),
        ({"beta": 0.0}, "beta is 0.0; expected a positive finite number"),
        ({"beta": math.inf}, "beta is inf; expected a positive finite number"),
        ({"ftx": -1.0}, "ftx is -1.0; expected a weight, a finite number of at least 0"),
        ({"ftx": math.nan}, "ftx is nan; expected a weight"),
        (
            {"chosen": torch.zeros(5, dtype=torch.complex64)},
            "chosen has dtype torch.complex64; expected a floating dtype",
        ),
        ({"rejected": torch.zeros(5, 4).long()}, "rejected has dtype torch.int64; expected a floating dtype"),
        ({"ref_rejected": torch.zeros(5, 4).cfloat()}, "ref_rejected has dtype torch.complex64"),
        ({"ref_chosen": torch.zeros(5, device="meta")}, "ref_chosen is on meta and rejected on cpu"),
        (
            {"rejected": torch.zeros(5, 0)},
            r"rejected has shape \(5, 0\); a preference loss needs a user and a rejected",
        ),
        ({"chosen": torch.zeros(0), "rejected": torch.zeros(0, 4)}, r"rejected has shape \(0, 4\); a preference loss"),
        (
            {"chosen_lengths": torch.tensor([3, 1, 0, 2, 5])},
            r"chosen_lengths holds 0 at \(2,\); expected values above 0",
        ),
        ({"chosen_lengths": torch.ones(5).cfloat()}, "chosen_lengths has dtype torch.complex64"),
        ({"chosen": torch.zeros(3)}, "chosen has shape"),
        ({"chosen": torch.zeros(5, 2)}, "several positives need variant 'mult'"),
        ({"rejected": torch.zeros(5)}, "chosen has shape"),
        ({"ref_rejected": None}, "ref_chosen and ref_rejected go together"),
        ({"ref_chosen": torch.zeros(2)}, r"ref_chosen has shape \(2,\); expected \(5,\)"),
        ({"rejected_mask": torch.ones(5, 4)}, "rejected_mask has dtype torch.float32; expected bool"),
        ({"rejected_mask": torch.zeros(5, 4, dtype=torch.bool)}, "no user has a rejected answer"),
    ],
)
def test_mistakes_name_the_argument(change, said):
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    given = dict(zip(names, draw(dtype=torch.float32))) | change
    with pytest.raises(AlroFastError, match=said):
        dmpo_loss(*[given.pop(name) for name in names], **given)


def test_the_module_refuses_them_when_it_is_made():
    for change, said in (({"ftx": -1.0}, "ftx is -1.0"), ({"beta": math.nan}, "beta is nan")):
        with pytest.raises(AlroFastError, match=said):
            DMPOLoss(**change)
