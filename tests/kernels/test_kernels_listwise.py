from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE
from kernel_strategies import examples

from alro_fast.ops.backends import eager

kernel = pytest.importorskip("alro_fast.kernels.listwise")


def lists(sizes: list[int], grades: int, seed: int) -> dict:
    """Random lists with some ungraded candidates and tied ratings; list l > 0 has list l - 1 as its twin, sometimes."""
    generator = torch.Generator().manual_seed(seed)
    count, longest = len(sizes), max(sizes)
    ratings = torch.randint(0, 6, (count, longest), generator=generator).float()
    ratings[torch.rand(count, longest, generator=generator) < 0.15] = float("nan")
    ranks = torch.zeros(count, longest, dtype=torch.int64)
    for row, size in enumerate(sizes):
        ranks[row, :size] = torch.randperm(size, generator=generator) + 1
    twin = torch.arange(count) - 1
    twin[torch.rand(count, generator=generator) < 0.3] = -1
    return {
        "logits": 3 * torch.randn(count, longest, grades or longest, generator=generator),
        "ratings": ratings,
        "ranks": ranks,
        "sizes": torch.tensor(sizes),
        "twin": twin,
        "values": torch.arange(1.0, grades + 1) if grades else None,
    }


def compare(tensors: dict, **options) -> None:
    on_device = {name: None if value is None else value.to(DEVICE) for name, value in tensors.items()}
    got = kernel.listwise(**on_device, **options)
    exact = {name: v.double() if v is not None and v.is_floating_point() else v for name, v in tensors.items()}
    wanted = eager.listwise(**exact, **options)
    for name, mine, reference in zip(wanted._fields, got, wanted):
        assert (mine is None) == (reference is None), name
        if mine is not None:
            size = max(float(reference.abs().max()), 1.0)
            assert torch.allclose(mine.cpu().double(), reference, atol=1e-5 * size, rtol=0), name


OPTIONS = {
    "gamma": 1.0, "sigma": 1.0, "normalise": True, "divergence": "kl", "detach": True, "mask_emitted": False
}  # fmt: skip


@examples(40)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 10, 16, 17, 25]), min_size=1, max_size=4),
    grades=st.sampled_from([0, 0, 1, 5, 10]),
    seed=st.integers(0, 99),
    options=st.fixed_dictionaries(
        {
            "gamma": st.sampled_from([1.0, 2.5]),
            "sigma": st.sampled_from([1.0, 0.4]),
            "normalise": st.booleans(),
            "divergence": st.sampled_from(["none", "kl", "ce", "symmetric"]),
            "detach": st.booleans(),
            "mask_emitted": st.booleans(),
        }
    ),
)
def test_terms_and_gradients_equal_float64(sizes: list[int], grades: int, seed: int, options: dict) -> None:
    compare(lists(sizes, grades, seed), **options)


@pytest.mark.parametrize("divergence", ["kl", "ce", "symmetric"])
def test_emitted_candidates_are_left_out(divergence: str) -> None:
    """A candidate is left out from the slot after its own on, in the list and in its twin."""
    tensors = {**lists([5, 5, 17, 17], 0, seed=2), "twin": torch.tensor([-1, 0, -1, 2])}
    compare(tensors, **{**OPTIONS, "divergence": divergence, "detach": False, "mask_emitted": True})
    same = tensors["ranks"][[0, 0, 2, 2]]  # as in training: one target for both
    compare({**tensors, "ranks": same}, **{**OPTIONS, "divergence": divergence, "detach": False, "mask_emitted": True})


@pytest.mark.parametrize("grades", [0, 7])
def test_lists_of_128(grades: int) -> None:
    compare(lists([128, 100], grades, seed=3), **{**OPTIONS, "detach": False})


def test_large_logits_do_not_overflow() -> None:
    tensors = lists([8, 8], 0, seed=1)
    tensors["logits"] *= 40
    compare(tensors, **{**OPTIONS, "gamma": 5.0, "detach": False, "divergence": "symmetric"})


def test_equal_bits_on_rerun() -> None:
    tensors = {name: None if value is None else value.to(DEVICE) for name, value in lists([9, 20, 4], 0, 5).items()}
    one, two = kernel.listwise(**tensors, **OPTIONS), kernel.listwise(**tensors, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(one[:5], two[:5]))


def test_lists_without_candidates_give_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: new(*args, **options).fill_(9))
    tensors = {**lists([4, 4], 0, seed=0), "sizes": torch.zeros(2, dtype=torch.int64)}
    for name in ("ratings", "ranks"):
        tensors[name] = tensors[name][:, :0]
    tensors["logits"] = tensors["logits"][:, :0, :0]
    on_device = {name: None if value is None else value.to(DEVICE) for name, value in tensors.items()}
    soft_lambda, permutation, *_ = kernel.listwise(**on_device, **OPTIONS)
    assert soft_lambda.tolist() == permutation.tolist() == [0.0, 0.0]


def test_bad_arguments_are_named() -> None:
    tensors = lists([4], 0, seed=0)
    with pytest.raises(ValueError, match="float64"):
        kernel.listwise(**{**tensors, "logits": tensors["logits"].double()}, **OPTIONS)
    with pytest.raises(ValueError, match="divergence"):
        kernel.listwise(**tensors, **{**OPTIONS, "divergence": "js"})
    with pytest.raises(ValueError, match="at most 128"):
        kernel.listwise(**lists([129], 0, seed=0), **OPTIONS)
