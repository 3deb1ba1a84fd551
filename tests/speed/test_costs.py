"""What a list costs before a step was taken, against what a step of it takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from alro_fast.modeling.attention import tree_hidden_states
from alro_fast.modeling.packing import Branch, Extent, Tree, collate
from alro_fast.training.speed import costs
from alro_fast.training.speed.costs import Costs
from alro_fast.training.speed.meter import Meter

ALL = (None,) * 8  # layers without windows


def tree(length, branches=3):
    own = [[1, 2, 3, *range(4, length), 50 + b, 60 + b, 70 + b] for b in range(branches)]
    return Tree([Branch(ids, len(ids) - 2) for ids in own])


@pytest.fixture
def model():
    made = tiny_llama(97, num_hidden_layers=8)
    return get_peft_model(made, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))


@pytest.mark.parametrize("windows", [(None, None), (4, None, 4), (None, 2, 50, 3)])
@pytest.mark.parametrize("share", ["batch", "list", "none"])
def test_extent_is_rows_answer_rows_and_visible_pairs(share, windows):
    """Pairs one by one, layer by layer; an answer row that two branches go through is one."""
    one = Tree([Branch([1, 2, 3, 4, 5, 6], 3), Branch([1, 2, 3, 4, 7], 3), Branch([1, 8, 9], 1)])
    packed = collate([one], [0], share)
    position, until = packed.position_ids.tolist(), packed.segments.until.tolist()
    answering = set(packed.segments.distinct_rows.tolist())
    pairs = 0
    for n, window in enumerate(windows):
        for row, key in itertools.product(range(len(until)), repeat=2):
            near = window is None or position[row] - position[key] < window
            pairs += near and key <= row < until[key] and (n < len(windows) - 1 or row in answering)
    assert one.extent(share, windows) == (packed.unique_tokens, len(answering), pairs)
    assert one.rows(share) == packed.unique_tokens
    assert len(answering) < one.num_answer_rows or share == "none"


@pytest.mark.parametrize("window", [None, 5])
def test_costs_are_the_flops_of_a_step(model, monkeypatch, window):
    """Of trees of other lengths and answers: the last layer's keys and the first layer's inputs alone make the rest."""
    monkeypatch.setattr(costs, "ATTENTION_RATE", 1.0)
    model.config.use_sliding_window, model.config.sliding_window = True, window
    for one in (tree(9), tree(40), tree(90, branches=2)):
        packed = collate([one], [0])
        meter = Meter(model)
        meter.take(packed)
        with meter.forward(packed):
            hidden = tree_hidden_states(model, packed)
        hidden.sum().backward()
        prices = Costs.of(model)
        (cost,) = prices.of_lists([one.extent("batch", prices.windows)], np.empty(0, np.int64))
        assert 1e6 * cost == pytest.approx(meter.flops().total, rel=0.05, abs=1e6)
        attention = prices.pair * one.extent("batch", prices.windows).pairs
        assert attention == pytest.approx(meter.flops().attention)


def test_common_rows_count_once():
    prices = Costs(1e6, 1e6, 0.0, ALL[:2])
    extents = [Extent(10, 1, 55), Extent(20, 1, 210)]
    alone, shared = (prices.of_lists(extents, np.arange(common)) for common in (0, 10))
    assert alone == [65, 230]
    assert shared == [1, 165]
    assert Costs(1e6, 1e6, 0.0, (3, None)).of_lists(extents, np.arange(10)) == [28, 193]  # 1 + 2 + 8 * 3 pairs of them


def test_costs_do_not_depend_on_the_device(model):
    """So that a run goes on with its plan anywhere."""
    here = Costs.of(model)
    assert Costs.of(model.to("meta")) == here


def test_a_head_that_is_trained_costs_more():
    frozen, trained = tiny_llama(97), tiny_llama(97)
    frozen.lm_head.requires_grad_(False)
    more = Costs.of(trained).answer_row - Costs.of(frozen).answer_row
    assert more == 2 * frozen.lm_head.weight.numel()
    assert isinstance(frozen.lm_head.weight, torch.Tensor)
