"""FLOPs of a step: against torch's own counter, by hand, and pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from alro_fast.modeling.attention import tree_hidden_states, use_tree_attention
from alro_fast.modeling.lora import fuse_lora
from alro_fast.modeling.packing import Branch, Tree, collate
from alro_fast.training.speed.flops import Flops, Work
from alro_fast.training.speed.meter import Meter

PREFIX = [1, 2, 3, 4, 5]
TREE = Tree([Branch([*PREFIX, 6, 7, 8, 9], 7), Branch([*PREFIX, 10, 11, 12], 6), Branch([*PREFIX, 6, 13, 14], 6)])
BATCH = collate([TREE], [0])
H, I, V, HEADS, KV, D, R = 32, 64, 50, 4, 2, 8, 3
IN_OUT = [(H, HEADS * D), (H, KV * D), (H, KV * D), (HEADS * D, H), (H, I), (H, I), (I, H)]  # as in a layer


def adapted(layers=2, fuse=True):
    model = tiny_llama(V, num_hidden_layers=layers)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=R, init_lora_weights=False))
    if fuse:
        assert fuse_lora(model) == 7 * layers
    return model


def measured(model):
    """The meter after one step."""
    meter = Meter(model)
    meter.take(BATCH)
    with meter.forward(BATCH):
        hidden = tree_hidden_states(model, BATCH)
    hidden.sum().backward()
    return meter


def test_a_lora_step_by_hand():
    meter = measured(adapted())
    rows, answers = 11, 6  # without the branches' ends; the 6 that two branches go through is one row
    assert (len(BATCH.input_ids), len(BATCH.segments.distinct_rows)) == (rows, answers)
    assert meter.trained[:2] == (rows, answers)

    def linear(width, out, needs_input=True):
        return 2 * width * out * (1 + needs_input) + 2 * R * (width * (2 + needs_input) + out * 3)

    first = sum(linear(*shape, n > 2) for n, shape in enumerate(IN_OUT))  # nothing before q, k, v of layer 0 is trained
    keys, others = (sum(linear(*shape) for shape in part) for part in (IN_OUT[1:3], [IN_OUT[0], *IN_OUT[3:]]))
    pairs = int((BATCH.position_ids + 1).sum()) + int((BATCH.position_ids[BATCH.segments.distinct_rows] + 1).sum())
    expected = Flops(
        trunk=rows * (first + keys) + answers * others,
        attention=pairs * HEADS * 4 * D * 3,
        head=answers * 2 * 2 * V * H,
    )
    assert meter.flops() == pytest.approx(expected)
    assert meter.flops().total == pytest.approx(sum(expected))


@pytest.mark.parametrize("kind", ["lora", "lora as PEFT has it", "every weight", "every weight of the last layers"])
def test_a_whole_layer_is_what_torch_counts(kind):
    """One layer more of a model, over the same rows: the products that torch's counter sees, forward and backward."""
    counted, ours = [], []
    for layers in (3, 4):
        lora = kind.startswith("lora")
        model = adapted(layers, fuse=kind == "lora") if lora else tiny_llama(V, num_hidden_layers=layers)
        if kind == "every weight of the last layers":
            model.get_input_embeddings().requires_grad_(False)
            model.model.layers[0].requires_grad_(False)
        ours.append(measured(model).flops().trunk)
        plain = adapted(layers, fuse=False) if lora else model
        causal = plain.get_base_model() if lora else plain
        causal.set_attn_implementation("eager")
        plain.zero_grad()
        counter = FlopCounterMode(display=False)
        with counter:
            causal.model(input_ids=BATCH.input_ids[None]).last_hidden_state.sum().backward()
        of = counter.get_flop_counts()["Global"]
        counted.append(sum(flops for kind_, flops in of.items() if str(kind_) in ("aten.mm", "aten.addmm")))
    assert ours[1] - ours[0] == pytest.approx(counted[1] - counted[0])


def test_pairs_are_those_of_the_mask():
    """Counted one by one: a row sees the keys k <= row < until[k], of the window if there is one."""
    position, until = BATCH.position_ids.tolist(), BATCH.segments.until.tolist()
    answering = set(BATCH.segments.distinct_rows.tolist())
    for window in (None, 3):
        config = LlamaConfig(num_hidden_layers=3)
        config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
        config.sliding_window = window
        pairs = 0
        for layer, (row, key) in itertools.product(range(3), itertools.product(range(len(until)), repeat=2)):
            near = layer == 0 or window is None or position[row] - position[key] < window
            visible = key <= row < until[key] and near
            pairs += visible and (layer < 2 or row in answering)
        assert sum(Work.of(BATCH, config).pairs) == pairs


def test_passes_without_gradients_are_a_third_of_attention_and_half_of_the_head():
    model = adapted()
    meter = measured(model)
    with_gradients = meter.flops()
    with torch.no_grad(), meter.forward(BATCH):
        pass
    extra = meter.flops() - with_gradients
    assert extra.attention == pytest.approx(with_gradients.attention / 3)
    assert extra.head == pytest.approx(with_gradients.head / 2)
    assert 0.3 * with_gradients.trunk < extra.trunk < 0.5 * with_gradients.trunk


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_count_once(reentrant):
    """With reentry layers run without gradients first, and are seen when they run again, in the backward pass."""
    model = adapted()
    expected = measured(model).flops()
    model.enable_input_require_grads()  # as checkpointing does
    assert measured(model).flops() == pytest.approx(expected)  # nobody needs the gradients of frozen embeddings
    model.train()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.zero_grad()
    meter = measured(model)
    assert meter.flops() == pytest.approx(expected)
    with meter.forward(BATCH):  # the next step is counted by the first
        tree_hidden_states(model, BATCH).sum().backward()
    assert meter.flops() == pytest.approx(Flops(*(2 * part for part in expected)))


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("which", "factors"), [(1, (1, 3, 3)), (2, (1, 1, 3))])
def test_layers_below_what_is_trained_have_no_gradients(which, factors, reentrant):
    """LoRA in one layer of three: attention forward below it, thrice from there; the last one has few queries."""
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], r=R, layers_to_transform=[which])
    model = get_peft_model(tiny_llama(V, num_hidden_layers=3), lora)
    if reentrant is not None:
        model.train()
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    positions = BATCH.position_ids + 1
    pairs = [int(positions.sum())] * 2 + [int(positions[BATCH.segments.distinct_rows].sum())]
    expected = 4 * D * HEADS * sum(factor * each for factor, each in zip(factors, pairs))
    assert measured(model).flops().attention == expected


def test_a_trained_head_has_a_product_more():
    frozen, trained = tiny_llama(V), tiny_llama(V)
    frozen.lm_head.requires_grad_(False)
    heads = [measured(model).flops().head for model in (frozen, trained)]
    assert heads[1] == pytest.approx(1.5 * heads[0])


def test_mixtures_of_experts_are_not_counted():
    config = MixtralConfig(
        vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    meter = measured(use_tree_attention(MixtralForCausalLM(config).eval()))
    assert meter.flops() is None
    assert meter.utilisation() is None
