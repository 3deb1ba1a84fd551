"""What a list costs before a step was taken, against what a step of it takes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from alro_fast.modeling.attention import tree_hidden_states
from alro_fast.modeling.packing import Branch, Tree, collate
from alro_fast.training.speed import costs
from alro_fast.training.speed.costs import Costs
from alro_fast.training.speed.meter import Meter


def tree(length, branches=3):
    own = [[1, 2, 3, *range(4, length), 50 + b, 60 + b, 70 + b] for b in range(branches)]
    return Tree([Branch(ids, len(ids) - 2) for ids in own])


@pytest.fixture
def model():
    made = tiny_llama(97, num_hidden_layers=8)
    return get_peft_model(made, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))


def test_extent_is_rows_and_visible_pairs():
    one = tree(9)
    for share in ("batch", "list", "none"):
        packed = collate([one], [0], share)
        assert one.extent(share) == (packed.unique_tokens, int((packed.position_ids + 1).sum()))


def test_costs_are_the_flops_of_a_step(model, monkeypatch):
    """Of trees of other lengths and answers: the last layer's keys and the first layer's inputs alone make the rest."""
    monkeypatch.setattr(costs, "ATTENTION_RATE", {})
    for one in (tree(9), tree(40), tree(90, branches=2)):
        packed = collate([one], [0])
        meter = Meter(model)
        meter.take(packed)
        with meter.forward(packed):
            hidden = tree_hidden_states(model, packed)
        hidden.sum().backward()
        rows, pairs = one.extent("batch")
        (cost,) = Costs.of(model, "cpu").of_lists([rows], [pairs], [len(packed.segments.distinct_rows)], 0)
        assert 1e6 * cost == pytest.approx(meter.flops().total, rel=0.05, abs=1e6)


def test_attention_counts_at_its_rate_and_common_rows_once(model):
    cpu, other = Costs.of(model, "cpu"), Costs.of(model, "somewhere else")
    assert cpu.pair == pytest.approx(other.pair / costs.ATTENTION_RATE["cpu"])
    assert (cpu.row, cpu.answer_row) == (other.row, other.answer_row)
    alone, shared = (Costs(1e6, 1e6, 0.0).of_lists([10, 20], [55, 210], [1, 1], common) for common in (0, 10))
    assert alone == [65, 230]
    assert shared == [1, 165]


def test_a_head_that_is_trained_costs_more():
    frozen, trained = tiny_llama(97), tiny_llama(97)
    frozen.lm_head.requires_grad_(False)
    more = Costs.of(trained, "cpu").answer_row - Costs.of(frozen, "cpu").answer_row
    assert more == 2 * frozen.lm_head.weight.numel()
    assert isinstance(frozen.lm_head.weight, torch.Tensor)
