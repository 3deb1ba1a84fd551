"""Arguments that do not fit are refused by name."""

from __future__ import annotations

import pytest
import torch
from head_runs import make_head

from alro_fast import ops
from alro_fast.errors import AlroFastError
from alro_fast.losses import reference

INF, NAN = float("inf"), float("nan")


def bad(**change):
    hidden, weight, bias = make_head(4, 8, 23, bias=True)
    arguments = {"hidden": hidden, "weight": weight, "targets": torch.tensor([0, 1, -100, 22]), "bias": bias, **change}
    return ops.linear_logprobs(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 23, 1, 1])}, r"targets holds 23 at \(1,\); expected values below 23 or ignored"),
        ({"targets": torch.tensor([0, 1, -1, 1])}, r"targets holds -1 at \(2,\)"),
        ({"targets": torch.tensor([0, 1, 2])}, r"targets has shape \(3,\); expected \[N\] or \[N, C\] with N = 4"),
        ({"targets": torch.zeros(4)}, "targets has dtype torch.float32; expected an integer dtype"),
        ({"targets": torch.zeros(4, dtype=torch.long, device="meta")}, "targets is on meta and hidden on cpu"),
        ({"hidden": torch.randn(4, 9)}, "hidden has 9 columns and weight 8; expected one hidden size H"),
        ({"hidden": torch.randn(4, 2, 8)}, "hidden has 3 dimensions; expected 2"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.long)}, "hidden has dtype torch.int64"),
        ({"hidden": torch.randn(4, 8).bfloat16()}, "hidden has dtype torch.bfloat16 and weight torch.float32"),
        ({"weight": torch.randn(23, 8, device="meta")}, "weight is on meta and hidden on cpu"),
        ({"weight": torch.randn(8)}, "weight has 1 dimensions; expected 2"),
        ({"bias": torch.randn(22)}, "bias has 22 entries; expected one per row of weight, 23"),
        ({"bias": torch.randn(23).double()}, "bias has dtype torch.float64 and weight torch.float32"),
        ({"weight": torch.randn(0, 8), "bias": None}, r"weight has shape \(0, 8\); expected at least one token"),
        ({"hidden": torch.randn(4, 0), "weight": torch.randn(23, 0)}, r"weight has shape \(23, 0\)"),
        *(({"softcap": x}, f"softcap is {x}; expected a positive finite") for x in (0.0, -1.0, INF, NAN)),
        *(({"scale": x}, f"scale is {x}; expected a finite number other than 0") for x in (0.0, -INF, INF, NAN)),
        *(({"mass_bound": x}, f"mass_bound is {x}; expected a number of at least 0") for x in (-0.1, 1.0, INF, NAN)),
        ({"backend": "cuda"}, "backend is 'cuda'; expected 'auto' or one of triton, cpp, eager"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(AlroFastError, match=message):
        bad(**change)
    bad()


@pytest.mark.parametrize("name", ["gamma", "sigma"])
@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
def test_sharpness_and_slope_are_positive(name, value):
    scores, mask = torch.randn(1, 3, 3), torch.ones(1, 3, dtype=torch.bool)
    numbers = {"gamma": 1.0, "sigma": 1.0, name: value}
    with pytest.raises(AlroFastError, match=f"{name} is {value}; expected a positive finite number"):
        ops.soft_lambda(scores, torch.ones(1, 3), mask, **numbers)
    if name == "gamma":
        with pytest.raises(AlroFastError, match=f"gamma is {value}"):
            ops.soft_argmax_ranks(scores, mask, gamma=value)


def test_an_infinite_bias_is_refused_where_distributions_are_compared(backend):
    hidden, weight, bias = make_head(4, 8, 23, bias=True)
    bias[5] = -INF
    logprobs, lse = ops.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]), bias=bias, backend=backend)
    want = reference.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]), bias=bias)
    torch.testing.assert_close((logprobs, lse), want)  # a token that cannot occur is no trouble here
    with pytest.raises(AlroFastError, match=r"bias holds -inf at \(5,\); expected values finite"):
        ops.linear_kl(hidden[:2], hidden[2:], weight, bias=bias, backend=backend)


@pytest.mark.parametrize(
    ("relabel", "message"),
    [
        (([[1, 2]], [[1, 2]]), r"relabel\[0\] has shape \(1, 2\)"),
        (([[1, 2], [3, 4]], [[2, 1], [3, 5]]), r"relabel pairs tokens \[3, 4\] with \[3, 5\] in row 1"),
        (([[1, 1], [3, 4]], [[1, 1], [3, 4]]), r"relabel pairs tokens \[1, 1\] with \[1, 1\] in row 0"),
        (([[1, 23], [3, 4]], [[1, 23], [3, 4]]), r"relabel\[0\] holds 23"),
        (([[1, -1], [3, 4]], [[-1, 1], [3, 4]]), r"relabel pairs tokens \[1, -1\] with \[-1, 1\]"),
    ],
)
def test_bad_relabelling(relabel, message):
    hidden, weight, _ = make_head(2, 8, 23)
    with pytest.raises(AlroFastError, match=message):
        ops.linear_kl(hidden, hidden, weight, relabel=tuple(map(torch.tensor, relabel)))


def test_kl_rows_must_match():
    hidden, weight, _ = make_head(3, 8, 23)
    with pytest.raises(AlroFastError, match=r"hidden_q has shape \(2, 8\); expected that of hidden_p, \(3, 8\)"):
        ops.linear_kl(hidden, hidden[:2], weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(2, 3, 4)}, r"scores has shape \(2, 3, 4\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\)"),
        ({"mask": torch.tensor([[True] * 3, [True, False, True]])}, "mask has a candidate after a pad"),
        ({"ratings": torch.zeros(2, 4)}, r"ratings has shape \(2, 4\)"),
        ({"ratings": torch.zeros(2, 3, device="meta")}, "ratings is on meta and scores on cpu"),
        ({"ranks": torch.tensor([1, 2, 3])}, r"ranks has shape \(3,\); expected that of mask, \(2, 3\)"),
        ({"ranks": torch.ones(2, 2, dtype=torch.long)}, r"ranks has shape \(2, 2\)"),
        ({"ranks": torch.tensor([[1.0, 2.0, 3.0]] * 2)}, "ranks has dtype torch.float32; expected an integer dtype"),
        ({"ratings": torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0]])}, r"ratings holds -2.0 at \(1, 1\)"),
        ({"ranks": torch.tensor([[1, 2, 3], [1, 1, 3]])}, r"ranks of list 1 are \[1, 1, 3\]; expected a permutation"),
    ],
)
def test_bad_lists_name_the_argument(change, message):
    arguments = {
        "scores": torch.randn(2, 3, 3),
        "ratings": torch.ones(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        **change,
    }
    with pytest.raises(AlroFastError, match=message):
        ops.soft_lambda(**arguments, gamma=1.0, sigma=1.0)
