"""Tiny models of every family, trees of every shape, and the plain forwards their packed ones are compared with."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alro_fast.modeling.attention import tree_hidden_states, trunk_of
from alro_fast.modeling.packing import Branch, Tree, collate

VOCABULARY = 97


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 11},
    "Gemma2": {"sliding_window": 11, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "Gemma3Text": {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {},
}


def make_model(family="Llama", *, seed=0, lora=False, **overrides):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | overrides)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_trees(seed=0):
    """A pair, a single branch, a branch that is its tree's prefix, an empty prefix, answers inside the prefix; three
    levels, identical branches with other answers, and trees that begin alike."""
    generator = np.random.default_rng(seed)

    def ids(length):
        return generator.integers(3, VOCABULARY, length).tolist()

    stem = [ids(n) for n in (20, 6, 9)]
    root = ids(7)
    left, right = root + ids(5), root + ids(4)
    twin = left + ids(6)
    return [
        Tree([Branch(stem[0] + ids(9), 22), Branch(stem[0] + ids(5), 20)]),
        Tree([Branch(ids(13), 8)]),
        Tree(
            [Branch(stem[1], 3), Branch(stem[1] + ids(4), 4), Branch(stem[1] + ids(4), 6), Branch(stem[1] + ids(1), 6)]
        ),
        Tree([Branch([3, *ids(5)], 1), Branch([4, *ids(3)], 2)]),
        Tree([Branch(stem[2] + ids(2), 2), Branch(stem[2] + ids(2), 9), Branch(stem[2] + ids(30), 10)]),
        Tree(
            [
                *[Branch(twin, 12), Branch(left + ids(3), 11), Branch(right + ids(4), 12), Branch(right + ids(8), 7)],
                *[Branch(root + ids(3), 8), Branch(twin, 15)],
            ]
        ),
        Tree([Branch(root + ids(12), 9), Branch(twin + ids(4), 17), Branch(left + ids(5), 13)]),
        Tree([Branch(twin, 14)]),
    ]


def plain_copy(model):
    """The same weights on eager attention, without gradient checkpointing."""
    plain = copy.deepcopy(model)
    trunk_of(plain).set_attn_implementation("eager")
    trunk_of(plain).gradient_checkpointing_disable()
    return plain


def branch_by_branch(plain, trees):
    """The rows of `tree_hidden_states`, each branch up to its last but one token in a plain forward of its own."""
    rows, device = [], next(plain.parameters()).device
    for ids, start in itertools.chain(*(zip(tree.ids, tree.answer_starts) for tree in trees)):
        output = trunk_of(plain)(input_ids=torch.as_tensor(ids[:-1], device=device)[None], use_cache=False)
        rows.append(output.last_hidden_state[0, start - 1 :])
    return torch.cat(rows)


def gradients(model, hidden):
    """Gradients of a loss with a different weight on every element."""
    torch.manual_seed(1)
    model.zero_grad()
    (hidden * torch.randn(hidden.shape, dtype=hidden.dtype).to(hidden.device)).sum().div(len(hidden)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, trees, tolerance=1e-5, share="batch"):
    plain = plain_copy(model)
    expected = branch_by_branch(plain, trees)
    expected_gradients = gradients(plain, expected)
    hidden = tree_hidden_states(model, collate(trees, range(len(trees)), share).to(expected.device))
    assert hidden.dtype == expected.dtype
    torch.testing.assert_close(hidden, expected, atol=tolerance, rtol=tolerance)
    found = gradients(model, hidden)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        size = max(1.0, expected_gradients[name].abs().max().item())
        torch.testing.assert_close(gradient, expected_gradients[name], atol=tolerance * size, rtol=0, msg=name)
