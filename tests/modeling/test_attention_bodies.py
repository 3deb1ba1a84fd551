"""The attention bodies alone, on random trees, against a loop over branches: float64, 1e-11."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tries import groups_of, plain_trie
from torch.utils._python_dispatch import TorchDispatchMode
from tree_models import (
    FAMILIES,
    assert_same,
    gradients,
    make_model,
    make_trees,
)

from alro_fast.errors import AlroFastError
from alro_fast.modeling import attention, attention_bodies, cpp_attention, trie
from alro_fast.modeling.attention import tree_attention, tree_hidden_states, use_tree_attention
from alro_fast.modeling.attention_bodies import dense_attention, trie_attention, varlen_attention
from alro_fast.modeling.packing import Branch, Tree, collate
from alro_fast.ops import flash
from alro_fast.ops.flash import flash_attn_varlen, torch_varlen

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


def naive(query, key, value, branches, scale, window, softcap):
    """[1, T, heads, D], one branch at a time: the definition, in plain operations. branches: stream rows of each."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.zeros_like(query)
    for rows in map(torch.tensor, branches):
        scores = query[:, :, rows] @ key[:, :, rows].transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
        hidden = (distance < 0) | (distance >= (len(rows) if window is None else window))
        out = out.index_copy(2, rows, scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, :, rows])
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
        return body(query.index_select(2, layout.distinct_rows), key, value, layout, *rest)

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
    """Trees by their lengths: stems under stems, of 0, 1 or around a tile's edge, branches of 0 to 385 own rows,
    neighbours alike; and the stream rows of every branch."""
    trees, root = [], [1] * draw(st.sampled_from([0, 0, 3, 130]))
    for number in range(draw(st.integers(1, 3))):
        branches = []
        stem = root + [2 + number] * draw(st.one_of(st.just(0), LENGTHS))
        for level in range(draw(st.integers(1, 2))):
            stem = stem + [6 + level] * (0 if level == 0 else draw(LENGTHS))
            tails = draw(st.lists(st.one_of(st.sampled_from([1, 1, 7]), LENGTHS), min_size=1, max_size=4))
            branches += [stem + [10 + b] * max(length, 2 - len(stem)) for b, length in enumerate(tails)]
        if len(stem) > 1 and draw(st.booleans()):
            branches.insert(draw(st.integers(0, len(branches))), stem)  # what others begin with is a branch
        trees.append(Tree([Branch(ids, draw(st.sampled_from([1, len(ids) - 1]))) for ids in branches]))
    share = draw(st.sampled_from(["batch", "batch", "list", "none"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie, "UNIT_ROWS", draw(st.sampled_from([1024, 200, 40])))
        batch = collate(trees, range(len(trees)), share)
    return batch, plain_trie(groups_of(trees, share)).branches


def attention_inputs(batch, heads, kv_heads, dtype=torch.float64):
    torch.manual_seed(0)
    rows = len(batch.input_ids)
    shapes = [(1, rows, n, 8) for n in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    return tensors, torch.randn(1, rows, heads, 8, dtype=dtype)


@given(
    layout=layouts(),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    window=st.sampled_from([None, None, 1, 6, 100]),
    softcap=st.sampled_from([None, None, 1.5]),
    body=st.sampled_from(list(BODIES)),
)
@settings(max_examples=80, deadline=None)
def test_bodies_agree_with_the_loop_over_branches(layout, heads, window, softcap, body):
    batch, branches = layout
    if body.startswith("varlen"):
        softcap = None
    (query, key, value), upstream = attention_inputs(batch, *heads)
    rows = batch.segments.distinct_rows if "answers" in body else torch.arange(batch.segments.num_rows)
    results = []
    for out in (
        naive(query, key, value, branches, 0.3, window, softcap)[:, rows],
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
    gathered = attention_bodies.gather_rows(rows, torch.tensor([0] * 300 + [1]))
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


@interpreted
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_whole_model_on_the_kernels_over_tries(family, monkeypatch):
    """What a CUDA step runs in float32, in Triton's interpreter; Gemma 2 has windows and soft-capped scores."""

    def body(query, key, value, layout, scale, window=None, softcap=None, answers=False):
        used.append(answers)
        return trie_attention(query, key, value, layout, scale, window, softcap, answers)

    used = []
    model = use_tree_attention(make_model(family, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))
    monkeypatch.setattr(attention.cpp_attention, "serves", lambda *_: False)
    monkeypatch.setattr(attention, "cascade_attention", body)
    monkeypatch.setattr(attention, "dense_attention", body)
    assert_same(model, make_trees(), tolerance=1e-5)
    assert used == [False, True]


@interpreted
@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("expected", [(1.0, 2.0), (2.0, 1.0)])
def test_cuda_takes_what_should_be_faster_and_says_so_once(answers, expected, monkeypatch, caplog):
    batch = collate(make_trees(), range(5))
    (query, key, value), _ = attention_inputs(batch, 2, 1, torch.float32)
    query = query[:, :, batch.segments.distinct_rows] if answers else query
    layout = (batch.segments, 0.3, None, None, answers)
    wanted, asked, ran = dense_attention(query, key, value, *layout), [], []
    kernel = flash_attn_varlen(flash_attn_varlen_func)

    def run(*arguments):
        ran.append("varlen")
        return kernel(*arguments)

    def seconds(query, key, tiles, q_lengths, k_lengths, gathered, window, newest):
        asked.append((len(query), len(key), int(q_lengths.sum()), int(k_lengths.sum()), gathered, newest))
        return expected

    monkeypatch.setattr(flash, "serves", lambda _: True)
    monkeypatch.setattr(flash, "varlen_backend", lambda *_: flash.Flash(run, "FlashAttention-3", True))
    monkeypatch.setattr(attention_bodies.trie_kernels, "expected_seconds", seconds)
    monkeypatch.setattr(attention_bodies, "_costs_logged", [])
    with caplog.at_level("INFO", logger="alro_fast.modeling.attention"):
        for _ in range(2):
            torch.testing.assert_close(attention_bodies.cuda_attention(query, key, value, *layout), wanted)
    sequences = batch.segments.answers if answers else batch.segments.stream
    gathered = len(sequences.kv_index)
    assert asked == [(query.shape[2], batch.segments.num_rows, query.shape[2], gathered, gathered, True)]
    assert ran == ([] if expected[0] < expected[1] else ["varlen"] * 2)
    with caplog.at_level("INFO", logger="alro_fast.modeling.attention"):  # another batch, where the other is faster
        first, expected = expected, expected[::-1]
        attention_bodies.cuda_attention(query, key, value, replace(batch.segments, cache={}), *layout[1:])
    assert len(asked) == 2
    said = [line for line in caplog.messages if "should take" in line]
    assert len(said) == (not answers)
    assert answers or said[0].endswith("Triton" if first[0] < first[1] else "varlen")


def test_the_kernel_is_chosen_by_what_is_installed(monkeypatch):
    """Hopper activates FA3 where its package is found and works; soft-capped scores need the flash-attn package."""
    activated, installed = [], {"flash_attn_interface"}
    asked = []  # which device's architecture: not the current one's
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *of: asked.extend(of) or (9, 0))
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    device = torch.device("cuda", 1)
    choose = functools.partial(flash.varlen_backend.__wrapped__, device=device)
    assert choose(False)[1:] == ("torch.nn.attention.varlen (FA3)", True)
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
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", broken)
    assert flash._activate_newest_flash(torch.device("cuda")) == "FlashAttention-2"


def test_flash_serves_half_precision_on_ampere(monkeypatch):
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert flash.serves(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))
    assert not flash.serves(torch.empty(1, 1, 1, 64))
    assert not flash.serves(torch.empty(1, 1, 1, 60, dtype=torch.float16))
    assert not flash.serves(torch.empty(1, 1, 1, 512, dtype=torch.float16))
    capability = (7, 5)
    assert not flash.serves(torch.empty(1, 1, 1, 64, dtype=torch.float16))


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


def test_masks_are_made_where_the_queries_are_and_refused_above_a_size(monkeypatch):
    """On the meta device: no mask goes through the CPU, and the widest intermediate holds four bytes an entry."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.dim() == 2:
                made.append((out.device.type, out.element_size()))
            return out

    layout = collate(make_trees(), range(5)).to("meta").segments
    with Watch():
        attention_bodies._masks(layout, 3, torch.empty(1, device="meta"), answers=False)
    assert {device for device, _ in made} == {"meta"}
    assert max(size for _, size in made) == 4
    monkeypatch.setattr(attention_bodies, "MOST_MASKED", 10)
    with pytest.raises(AlroFastError, match="lower --max_length"):
        attention_bodies._masks(layout, None, torch.empty(1, device="meta"), answers=False)


@pytest.mark.skipif(cpp_attention._cpp is None, reason="the C++ extension is not installed")
def test_masks_that_are_too_large_name_what_makes_them(monkeypatch):
    """On the CPU float64, and a machine without the kernels: half precision makes none."""
    monkeypatch.setattr(attention_bodies, "MOST_MASKED", 10)
    layout = collate(make_trees(), range(5)).segments

    def attend(dtype):
        rows = torch.randn(1, 2, layout.num_rows, 8, dtype=dtype)
        return tree_attention(torch.nn.Module(), rows, rows, rows, None, sliding_window=3, alro_segments=layout)

    attend(torch.bfloat16)
    with pytest.raises(
        AlroFastError, match="windows or soft caps in float64, or without the C\\+\\+ kernels, on the CPU"
    ):
        attend(torch.float64)
    monkeypatch.setattr(cpp_attention, "_cpp", None)
    with pytest.raises(AlroFastError, match="without the C\\+\\+ kernels, on the CPU"):
        attend(torch.bfloat16)


def test_a_torch_that_names_no_current_kernel_is_served(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.delattr(torch.nn.attention, "current_flash_attention_impl")
    assert flash._activate_newest_flash(torch.device("cuda")) == "FlashAttention-2"
