"""Attention over packed trees gives the hidden states and gradients of each branch run alone.

Whole models: float32, 1e-5, beside the plain model of transformers with eager attention, one branch at a time (its
norms and its softmax compute in float32 whatever the dtype, so no more can be asked). The attention
alone: float64, 1e-11.
"""

import copy
import functools
import inspect
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from alro_fast.errors import AlroFastError
from alro_fast.modeling import attention, attention_bodies
from alro_fast.modeling.attention import tree_attention, tree_hidden_states, trunk_of, use_tree_attention
from alro_fast.modeling.attention_bodies import (
    dense_attention,
    flash_attn_varlen,
    flash_serves,
    torch_varlen,
    varlen_attention,
)
from alro_fast.modeling.packing import Branch, Tree, collate

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in transformers 5.2x

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
    """A pair, a single branch, a branch that is its tree's prefix, an empty prefix, answers inside the prefix."""
    generator = np.random.default_rng(seed)

    def ids(length):
        return generator.integers(3, VOCABULARY, length).tolist()

    stem = [ids(n) for n in (20, 6, 9)]
    return [
        Tree([Branch(stem[0] + ids(9), 22), Branch(stem[0] + ids(5), 20)]),
        Tree([Branch(ids(13), 8)]),
        Tree(
            [Branch(stem[1], 3), Branch(stem[1] + ids(4), 4), Branch(stem[1] + ids(4), 6), Branch(stem[1] + ids(1), 6)]
        ),
        Tree([Branch([3, *ids(5)], 1), Branch([4, *ids(3)], 2)]),
        Tree([Branch(stem[2] + ids(2), 2), Branch(stem[2] + ids(2), 9), Branch(stem[2] + ids(30), 10)]),
    ]


def plain_copy(model):
    """The same weights on eager attention, without gradient checkpointing."""
    plain = copy.deepcopy(model)
    trunk_of(plain).set_attn_implementation("eager")
    trunk_of(plain).gradient_checkpointing_disable()
    return plain


def branch_by_branch(plain, trees):
    """The rows of `tree_hidden_states`, each branch in a plain forward of its own."""
    rows = []
    for ids, start in itertools.chain(*(zip(tree.ids, tree.answer_starts) for tree in trees)):
        output = trunk_of(plain)(input_ids=torch.as_tensor(ids)[None], use_cache=False)
        rows.append(output.last_hidden_state[0, start - 1 : -1])
    return torch.cat(rows)


def gradients(model, hidden):
    """Gradients of a loss with a different weight on every element."""
    torch.manual_seed(1)
    model.zero_grad()
    (hidden * torch.randn(hidden.shape, dtype=hidden.dtype)).sum().div(len(hidden)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, trees, tolerance=1e-5):
    plain = plain_copy(model)
    expected = branch_by_branch(plain, trees)
    expected_gradients = gradients(plain, expected)
    hidden = tree_hidden_states(model, collate(trees, range(len(trees))))
    assert hidden.dtype == expected.dtype
    torch.testing.assert_close(hidden, expected, atol=tolerance, rtol=tolerance)
    found = gradients(model, hidden)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        size = max(1.0, expected_gradients[name].abs().max().item())
        torch.testing.assert_close(gradient, expected_gradients[name], atol=tolerance * size, rtol=0, msg=name)


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer_rows_only", [True, False])
def test_every_family_agrees_with_plain_forwards(family, answer_rows_only):
    """The last layer's MLP shows whether it was spared the rows that nobody reads."""
    model = use_tree_attention(make_model(family), answer_rows_only)
    trees, seen = make_trees(), []
    handle = trunk_of(model).layers[-1].mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    tree_hidden_states(model, batch := collate(trees, range(len(trees))))
    assert seen == [len(batch.labels) if answer_rows_only else len(batch.input_ids)]
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


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mistral"])
def test_branches_do_not_see_each_other(family):
    """One token of one branch changed: every row of other branches and trees keeps its bits."""
    model = use_tree_attention(make_model(family))
    trees = make_trees()
    with torch.no_grad():
        before = collate(trees, range(len(trees)))
        hidden = tree_hidden_states(model, before)
        for t, b in [(0, 0), (0, 1), (1, 0), (2, 1), (2, 2), (3, 0), (4, 2)]:
            changed = list(trees)
            branches = [Branch(ids.tolist(), start) for ids, start in zip(trees[t].ids, trees[t].answer_starts)]
            ids = branches[b].ids
            ids[-2] = ids[-2] + 1 if ids[-2] + 1 < VOCABULARY else 3
            changed[t] = Tree(branches)
            assert changed[t].prefix_length == trees[t].prefix_length
            after = tree_hidden_states(model, collate(changed, range(len(trees))))
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
        ("longrope", 16, 9, False),
        ("longrope", 17, 17, False),
        ("longrope", 17, 16, True),
        ("dynamic", 16, 9, False),
        ("dynamic", 17, 17, True),
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


# --- the attention alone: random trees against a loop over branches --------------------------------------------------


def naive(query, key, value, batch, scale, window, softcap):
    """[1, T, heads, D], one branch at a time: the definition, in plain operations."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.zeros_like(query)
    for span in batch.segments.spans:
        prefix, own = torch.arange(span.start, span.start + span.prefix), span.start + span.prefix
        for length in span.lengths:
            rows = torch.cat([prefix, torch.arange(own, own + length)])
            scores = query[:, :, rows] @ key[:, :, rows].transpose(-1, -2) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
            hidden = (distance < 0) | (distance >= (len(rows) if window is None else window))
            out = out.index_copy(2, rows, scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, :, rows])
            own += length
    return out.transpose(1, 2)


def reference_varlen(query, key, value, cu_q, cu_k, scale, window, softcap):
    """What a variable-length kernel does: per sequence, causal order aligned at the end."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist())):
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        hidden = (distance < 0) | ((distance > window) if window >= 0 else torch.tensor(False))
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[k0:k1]))
    return torch.cat(parts)


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """As torch 2.11 spells it; the kernel takes fewer key heads without being told."""
    check_varlen_arguments(cu_seq_q, cu_seq_k, max_q, max_k)
    assert window_size[1] == 0, "not causal"
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0], None)


def varlen_attn_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
    num_splits=None,
):  # fmt: skip
    """As torch 2.12 and 2.13 spell it: fewer key heads have to be announced."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_attn_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale, window_size=window_size
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """As the flash-attn package spells it."""
    check_varlen_arguments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert causal
    assert dropout_p == 0
    return reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], softcap)


def check_varlen_arguments(cu_q, cu_k, max_q, max_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert isinstance(max_q, int)
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    assert (cu_q.diff() > 0).all()
    assert (cu_q.diff() <= cu_k.diff()).all()


def answer_rows_of(body):
    """A body that computes the answer rows alone, made comparable with one that computes all."""

    def run(query, key, value, layout, *rest):
        return body(query.index_select(2, layout.answer_rows), key, value, layout, *rest)

    return run


def varlen(kernel, which="stream"):
    return lambda query, key, value, layout, *rest: varlen_attention(
        kernel, query, key, value, getattr(layout, which), *rest
    )


BODIES = {
    "tree": lambda q, k, v, layout, scale, window, softcap: tree_attention(
        torch.nn.Module(), q, k, v, None, scaling=scale, sliding_window=window, softcap=softcap, alro_segments=layout
    )[0],
    "dense": dense_attention,
    "dense, answers": answer_rows_of(lambda *arguments: dense_attention(*arguments, answers=True)),
    "varlen 2.11": varlen(torch_varlen(varlen_attn_2_11)),
    "varlen 2.13": varlen(torch_varlen(varlen_attn_2_13)),
    "varlen 2.13, answers": answer_rows_of(varlen(torch_varlen(varlen_attn_2_13), "answers")),
    "flash-attn": varlen(flash_attn_varlen(flash_attn_varlen_func)),
}
LENGTHS = st.sampled_from([1, 2, 5, 31, 127, 128, 129, 191, 192, 193, 385])


@st.composite
def layouts(draw):
    """Trees by their lengths: prefix 0, 1 or around a tile's edge, branches of 0 to 385 own rows, neighbours alike."""
    trees = []
    for _ in range(draw(st.integers(1, 3))):
        prefix = draw(st.one_of(st.just(0), LENGTHS))
        tails = draw(st.lists(st.one_of(st.sampled_from([1, 1, 7]), LENGTHS), min_size=1, max_size=5))
        branches = [[1] * prefix + [10 + b] * max(length, 2 - prefix) for b, length in enumerate(tails)]
        if prefix > 1 and draw(st.booleans()):
            branches.insert(draw(st.integers(0, len(branches))), [1] * prefix)  # the prefix itself is a branch
        trees.append(Tree([Branch(ids, 1) for ids in branches]))
    return collate(trees, range(len(trees)))


def attention_inputs(batch, heads, kv_heads, dtype=torch.float64):
    torch.manual_seed(0)
    rows = len(batch.input_ids)
    shapes = [(1, rows, n, 8) for n in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    return tensors, torch.randn(1, rows, heads, 8, dtype=dtype)


@given(
    batch=layouts(),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    window=st.sampled_from([None, None, 1, 6, 100]),
    softcap=st.sampled_from([None, None, 1.5]),
    body=st.sampled_from(list(BODIES)),
)
@settings(max_examples=120, deadline=None)
def test_bodies_agree_with_the_loop_over_branches(batch, heads, window, softcap, body):
    if body.startswith("varlen"):
        softcap = None
    (query, key, value), upstream = attention_inputs(batch, *heads)
    rows = batch.answer_rows if "answers" in body else torch.arange(batch.segments.num_rows)
    results = []
    for out in (
        naive(query, key, value, batch, 0.3, window, softcap)[:, rows],
        BODIES[body](query, key, value, batch.segments, 0.3, window, softcap)[:, : len(rows)],
    ):
        results.append([out, *torch.autograd.grad((out * upstream[:, rows]).sum(), (query, key, value))])
    for found, expected in zip(results[1], results[0]):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


def test_values_of_another_width_take_the_dense_body():
    batch = collate(make_trees(), range(5))
    (query, key, value), _ = attention_inputs(batch, 4, 2)
    narrow = value[..., :6]
    arguments = {"scaling": 0.3, "alro_segments": batch.segments}
    out, _ = tree_attention(torch.nn.Module(), query, key, narrow, None, **arguments)
    full, _ = tree_attention(torch.nn.Module(), query, key, value, None, **arguments)
    torch.testing.assert_close(out, full[..., :6], atol=1e-12, rtol=0)


def test_gather_adds_half_precision_gradients_in_float32():
    """CUDA's index_add rounds after every addend of a bfloat16 sum; the CPU's does not, so the dtype is watched."""
    sums = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.index_add_.default:
                sums.append(args[0].dtype)
            return function(*args, **kwargs or {})

    rows = torch.zeros(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gathered = attention_bodies._Gather.apply(rows, torch.tensor([0] * 300 + [1]))
    with Watch():
        gathered.backward(torch.full((301, 1, 1), 1.0078125, dtype=torch.bfloat16))
    assert sums == [torch.float32]
    assert rows.grad.flatten().tolist() == [302.0, 1.0078125]


def test_varlen_reads_nothing_back_from_the_device():
    """On the meta device any look at a tensor's values fails: the whole path, forward and backward, needs none."""
    batch = collate(make_trees(), range(5)).to("meta")
    (query, key, value), upstream = attention_inputs(batch, 4, 2)
    query, key, value = (tensor.detach().to("meta").requires_grad_() for tensor in (query, key, value))

    def kernel(query, key, value, sequences, scale, window, softcap):
        assert key.shape[0] == value.shape[0] == sequences.kv_index.shape[0]
        return query + key.sum(0).sum(0) + value.sum(0).sum(0)

    varlen_attention(kernel, query, key, value, batch.segments.stream, 0.3, None, None).backward(upstream.to("meta"))
    assert key.grad.shape == key.shape


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_whole_model_on_the_varlen_body(family, monkeypatch):
    """What a CUDA step runs, with the kernel replaced by its definition."""

    def body(query, key, value, layout, scale, window=None, softcap=None, answers=False):
        kernel = flash_attn_varlen(flash_attn_varlen_func)
        sequences = layout.answers if answers else layout.stream
        used.append(answers)
        return varlen_attention(kernel, query, key, value, sequences, scale, window, softcap)

    used = []
    model = use_tree_attention(make_model(family, lora=True))
    monkeypatch.setattr(attention.cpp_attention, "serves", lambda *_: False)
    monkeypatch.setattr(attention, "cascade_attention", body)
    monkeypatch.setattr(attention, "dense_attention", body)
    assert_same(model, make_trees())
    assert used == [False, True]


def test_the_kernel_is_chosen_by_what_is_installed(monkeypatch):
    """Hopper activates FA3 where its package is found and works; soft-capped scores need the flash-attn package."""
    activated, installed = [], {"flash_attn_interface"}
    asked = []  # which device's architecture: not the current one's
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *of: asked.extend(of) or (9, 0))
    monkeypatch.setattr(attention_bodies.importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    device = torch.device("cuda", 1)
    choose = functools.partial(attention_bodies.varlen_backend.__wrapped__, device=device)
    assert choose(False) is not None
    assert activated == ["FA3"]
    assert asked == [device]
    assert choose(True) is None
    installed.clear()
    choose(False)
    assert activated == ["FA3"]
    installed.add("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    assert choose(True) is not None


def test_a_broken_fa3_leaves_fa2(monkeypatch):
    def broken(name):
        raise RuntimeError("no kernels inside")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention_bodies.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", broken)
    assert attention_bodies._activate_newest_flash(torch.device("cuda")) == "FlashAttention-2"


def test_flash_serves_half_precision_on_ampere(monkeypatch):
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert flash_serves(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))
    assert not flash_serves(torch.empty(1, 1, 1, 64))
    assert not flash_serves(torch.empty(1, 1, 1, 60, dtype=torch.float16))
    assert not flash_serves(torch.empty(1, 1, 1, 512, dtype=torch.float16))
    capability = (7, 5)
    assert not flash_serves(torch.empty(1, 1, 1, 64, dtype=torch.float16))


def test_the_installed_varlen_takes_our_arguments():
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    stub = inspect.signature(varlen_attn_2_13 if "enable_gqa" in parameters else varlen_attn_2_11).parameters
    assert {"scale", "window_size"} <= parameters.keys() & stub.keys()
    assert list(stub)[:7] == list(parameters)[:7]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_agrees_with_the_cpu(family, dtype):
    model = use_tree_attention(make_model(family, seed=1))
    trees = make_trees()
    batch = collate(trees, range(len(trees)))
    hidden = tree_hidden_states(model, batch)
    expected = gradients(model, hidden)
    on_device = copy.deepcopy(model).to("cuda", dtype)
    found_hidden = tree_hidden_states(on_device, batch.to("cuda"))
    found = gradients(on_device, found_hidden.cpu())
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert (found_hidden.cpu().float() - hidden).norm() <= tolerance * hidden.norm()
    for name, gradient in found.items():
        assert (gradient.cpu().float() - expected[name]).norm() <= 2 * tolerance * expected[name].norm() + 1e-4, name
