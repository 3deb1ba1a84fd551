"""Attention over packed trees on a device: every family beside plain forwards of its branches there."""

from __future__ import annotations

import copy

import pytest
import torch
from tree_models import FAMILIES, assert_same, branch_by_branch, make_model, make_trees, plain_copy

from alro_fast.modeling.attention import tree_hidden_states, use_tree_attention
from alro_fast.modeling.packing import collate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # the CPU proves what a GPU runs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_plain_forwards(device, family):
    model = use_tree_attention(make_model(family).to(device))
    assert_same(model, make_trees(1), tolerance=1e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_good_as_that_of_plain_forwards(device, family):
    """The variable-length kernels serve half precision alone."""
    exact = make_model(family)
    half = copy.deepcopy(exact).to(device, torch.bfloat16)
    trees = make_trees(2)
    with torch.no_grad():
        wanted = branch_by_branch(exact.double(), trees)
        plain = branch_by_branch(plain_copy(half), trees)
        shared = tree_hidden_states(use_tree_attention(half), collate(trees, range(len(trees))).to(device))
    errors = [(rows.cpu().double() - wanted).norm() for rows in (shared, plain)]
    assert 0 < errors[0] <= 1.5 * errors[1]
