"""Attention over packed trees gives the hidden states and gradients of each branch run alone.

float32, 1e-5, beside the plain model of transformers with eager attention, one branch at a time (its norms and its
softmax compute in float32 whatever the dtype, so no more can be asked).
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from tree_models import (
    FAMILIES,
    SIZES,
    VOCABULARY,
    assert_same,
    branch_by_branch,
    make_model,
    make_trees,
    plain_copy,
)

from alro_fast.errors import AlroFastError
from alro_fast.modeling.attention import tree_hidden_states, trunk_of, use_tree_attention
from alro_fast.modeling.packing import Branch, Tree, collate

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in transformers 5.2x


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer_rows_only", [True, False])
def test_every_family_agrees_with_plain_forwards(family, answer_rows_only):
    """The last layer's MLP shows whether it was spared the rows that nobody reads."""
    model = use_tree_attention(make_model(family), answer_rows_only)
    trees, seen = make_trees(), []
    handle = trunk_of(model).layers[-1].mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    tree_hidden_states(model, batch := collate(trees, range(len(trees))))
    assert seen == [len(batch.segments.distinct_rows) if answer_rows_only else len(batch.input_ids)]
    handle.remove()
    assert_same(model, trees)


def test_an_architecture_that_counts_its_rows_keeps_them_all():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0)
    config._attn_implementation = "eager"
    assert_same(use_tree_attention(AutoModelForCausalLM.from_config(config).eval()), make_trees())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_lora_and_gradient_checkpointing(family, reentrant):
    model = use_tree_attention(make_model(family, lora=True))
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
    assert_same(model, make_trees())
    assert all("lora" in name for name, p in model.named_parameters() if p.grad is not None)


def test_long_branches_go_through_chunks():
    generator = np.random.default_rng(3)
    stem = generator.integers(0, VOCABULARY, 230).tolist()
    tails = [generator.integers(0, VOCABULARY, length).tolist() for length in (130, 97, 97, 3)]
    trees = [Tree([Branch(stem + tail, 225) for tail in tails])]
    assert_same(use_tree_attention(make_model()), trees)


@pytest.mark.parametrize("share", ["list", "none"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_less_sharing_gives_the_same(family, share):
    assert_same(use_tree_attention(make_model(family, lora=True)), make_trees(), share=share)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mistral"])
@pytest.mark.parametrize("share", ["batch", "list", "none"])
def test_branches_do_not_see_each_other(family, share):
    """One token of one branch changed: every row of other branches and trees keeps its bits."""
    model = use_tree_attention(make_model(family))
    trees = make_trees()
    with torch.no_grad():
        before = collate(trees, range(len(trees)), share)
        hidden = tree_hidden_states(model, before)
        for t, b in [(0, 0), (0, 1), (1, 0), (2, 1), (2, 2), (3, 0), (4, 2), (5, 1), (5, 2), (5, 3), (6, 0), (6, 2)]:
            changed = list(trees)
            branches = [Branch(ids.tolist(), start) for ids, start in zip(trees[t].ids, trees[t].answer_starts)]
            ids = branches[b].ids
            ids[-2] = ids[-2] + 1 if ids[-2] + 1 < VOCABULARY else 3
            changed[t] = Tree(branches)
            other = collate(changed, range(len(trees)), share)
            assert other.segments.until.tolist() == before.segments.until.tolist()
            after = tree_hidden_states(model, other)
            own = (before.row_tree == t) & (before.row_branch == b)
            assert torch.equal(after[~own], hidden[~own])
            assert not torch.equal(after[own], hidden[own])


def test_parameters_agree_after_ten_steps():
    """AdamW divides by the gradient's size, so a rounding difference in a tiny gradient shows: hence 2e-4."""
    tolerance = 2e-4
    shared = use_tree_attention(make_model(tie_word_embeddings=False))
    plain = plain_copy(shared)
    start = {name: p.detach().clone() for name, p in shared.named_parameters()}
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (shared, plain)]
    for step in range(10):
        trees = make_trees(step)
        batch = collate(trees, range(len(trees)))
        for model, optimizer in zip((shared, plain), optimizers):
            hidden = tree_hidden_states(model, batch) if model is shared else branch_by_branch(model, trees)
            torch.nn.functional.cross_entropy(model.lm_head(hidden), batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(shared.named_parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0, msg=name)
        assert (one - start[name]).abs().max() > 100 * tolerance


def test_bfloat16_is_as_good_as_unshared_bfloat16():
    exact = make_model()
    half = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    trees = make_trees()
    with torch.no_grad():
        reference = branch_by_branch(exact, trees)
        unshared = (branch_by_branch(half, trees).float() - reference).norm()
        shared = (
            tree_hidden_states(use_tree_attention(half), collate(trees, range(len(trees)))).float() - reference
        ).norm()
    assert shared <= 2 * unshared


def test_a_forward_that_fails_leaves_the_last_layer_as_it_was():
    model = use_tree_attention(make_model())
    model.gradient_checkpointing_enable()
    batch = collate(make_trees(), [0, 1])
    handle = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        tree_hidden_states(model.train(), batch)
    handle.remove()
    last = model.model.layers[-1]
    assert last.gradient_checkpointing
    assert not last._forward_pre_hooks
    assert tree_hidden_states(model, batch).shape == (len(batch.labels), 32)


def test_autocast_mixes_dtypes_without_harm():
    """Queries and keys come out of the rotation in float32, values in bfloat16."""
    model = use_tree_attention(make_model())
    trees = make_trees()
    batch = collate(trees, range(len(trees)))
    plain = plain_copy(model)
    with torch.no_grad():
        exact = branch_by_branch(plain, trees)
        with torch.autocast("cpu", torch.bfloat16):
            shared, unshared = tree_hidden_states(model, batch), branch_by_branch(plain, trees)
    assert (shared - exact).norm() <= 2 * (unshared - exact).norm()


def test_the_head_is_never_run():
    model = use_tree_attention(make_model())
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head saw the stream"))
    trees = make_trees()
    rows = trees[0].num_answer_rows + trees[3].num_answer_rows
    assert tree_hidden_states(model, collate(trees, [0, 3])).shape == (rows, 32)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_model_on_other_attention_is_refused():
    with pytest.raises(AlroFastError, match=r"packed branches see each other.*use_tree_attention"):
        tree_hidden_states(make_model(), collate(make_trees(), [0]))


def test_a_batch_on_another_device_is_refused():
    with pytest.raises(AlroFastError, match=r"batch is on meta, the model on cpu; use batch.to\('cpu'\)"):
        tree_hidden_states(use_tree_attention(make_model()), collate(make_trees(), [0]).to("meta"))


@pytest.mark.parametrize(
    ("kind", "longest", "shortest", "refused"),
    [
        ("longrope", 17, 9, False),
        ("longrope", 18, 18, False),
        ("longrope", 18, 17, True),
        ("dynamic", 17, 9, False),
        ("dynamic", 18, 18, True),
    ],
)
def test_rotations_that_depend_on_the_longest_branch(kind, longest, shortest, refused):
    """Where they are served, they are exact; where packing would change them, they are refused."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if kind == "longrope" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    family = "Phi3" if kind == "longrope" else "Llama"
    lengths = {"original_max_position_embeddings": 16} if kind == "longrope" else {}
    model = make_model(family, rope_parameters=rope, max_position_embeddings=16 if kind == "dynamic" else 64, **lengths)
    use_tree_attention(model)
    trees = [Tree([Branch([3] * 5 + [4 + b] * (length - 5), 4)]) for b, length in enumerate((longest, shortest))]
    if refused:
        with pytest.raises(AlroFastError, match=f"{kind} position embeddings change beyond 16 tokens"):
            tree_hidden_states(model, collate(trees, [0, 1]))
    else:
        assert_same(model, trees)


def test_an_ordinary_forward_is_refused():
    model = use_tree_attention(make_model())
    with pytest.raises(AlroFastError, match="given no packed batch"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    model.set_attn_implementation("sdpa")
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCABULARY)


def test_attention_dropout_is_refused_in_training_only():
    model = use_tree_attention(make_model(attention_dropout=0.1))
    batch = collate(make_trees(), [0])
    tree_hidden_states(model.eval(), batch)
    with pytest.raises(AlroFastError, match="attention_dropout to 0"):
        tree_hidden_states(model.train(), batch)


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(AlroFastError, match="attention sinks"):
        use_tree_attention(model)
    assert model.config._attn_implementation == "eager"


def test_other_kinds_of_layers_are_refused():
    config = transformers.Lfm2Config(**SIZES | {"layer_types": ["conv", "full_attention"]})
    with pytest.raises(AlroFastError, match="layers of type conv"):
        use_tree_attention(AutoModelForCausalLM.from_config(config))


def test_tokens_that_meet_outside_attention_are_found_out():
    """An architecture that looks like a decoder but mixes neighbours of the stream in its MLP."""
    model = make_model()
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out + 0.1 * out.roll(1, dims=1))
    with pytest.raises(AlroFastError, match="gives other hidden states for a packed tree"):
        use_tree_attention(model)
    assert model.config._attn_implementation == "eager"


def test_prompt_tuning_and_strangers_are_refused():
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(AlroFastError, match="virtual tokens"):
        use_tree_attention(get_peft_model(make_model(), prompt))
    with pytest.raises(AlroFastError, match=r"expected a causal LM of transformers.*got Linear"):
        use_tree_attention(torch.nn.Linear(2, 2))


def test_the_self_check_restores_training_mode():
    model = make_model()
    model.train()
    model.model.layers[0].eval()
    use_tree_attention(model)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
