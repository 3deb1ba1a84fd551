"""Fused layers beside the modules they stand in for: values, gradients, what is left alone and who steps aside."""

from __future__ import annotations

import contextlib
import copy
import types

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from alro_fast.modeling import layers, products
from alro_fast.modeling.layers import ACTIVATIONS, FusedAttention, FusedLinear, FusedMLP, FusedNorm, fuse_layers
from alro_fast.modeling.lora import fuse_lora
from alro_fast.ops.backends import cpp

SIZES = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
NORMS = {"Llama": 5, "Qwen2": 5, "Qwen3": 9, "Mistral": 5, "Gemma2": 9, "Gemma3Text": 13, "Phi3": 5}
SHAPES = [(1, 1), (3, 7), (5, 16), (2, 3, 33), (4, 128), (130, 515)]
needs_kernels = pytest.mark.skipif(cpp._cpp is None, reason="this install has no C++ kernels")


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def _instruction_set(request):
    _cpp = pytest.importorskip("alro_fast._cpp", reason="this install has no C++ kernels")
    widest = _cpp.instruction_set()
    if not _cpp.select_instruction_set(request.param):
        pytest.skip("not on this machine")
    yield
    _cpp.select_instruction_set(widest)


def outcome(function, *inputs):
    """The value and the gradients of a loss with a different weight on every element."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(*inputs)
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y).cos()
    return y.detach(), *torch.autograd.grad(y, inputs, weights)


def assert_close(got, wanted, tolerance):
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        size = other.abs().max().clamp(min=1)
        assert (one.double() - other.double()).abs().max() <= tolerance * size


def norm(offset, width, eps=1e-6, dtype=torch.float32):
    """A module of transformers with a weight of its own, and its fused twin."""
    own = (Gemma2RMSNorm if offset else LlamaRMSNorm)(width, eps).to(dtype)
    nn.init.uniform_(own.weight, 0.5, 2.0)
    fused = copy.deepcopy(own)
    assert fuse_layers(fused) == 1
    assert isinstance(fused, FusedNorm)
    return own, fused


def gated(kind):
    return lambda gate, up: layers._Gated.apply(gate, up, kind)


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(offset, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    got = outcome(lambda x, w: layers._Norm.apply(x, w, 1e-3, offset), x, weight)
    wanted = outcome(lambda x, w: layers._plain_norm(x, w, 1e-3, offset), x.double(), weight.double())
    assert_close(got, wanted, 2e-6)


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(kind, shape):
    torch.manual_seed(0)
    gate, up = torch.randn(shape) * 5, torch.randn(shape)
    wanted = outcome(lambda gate, up: ACTIVATIONS[kind](gate) * up, gate.double(), up.double())
    assert_close(outcome(gated(kind), gate, up), wanted, 1e-6)
    both = torch.cat([gate, up], -1)
    y, d_both = outcome(lambda both: layers._Gated.apply(both, None, kind), both)
    assert_close((y, *d_both.chunk(2, -1)), wanted, 1e-6)


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_at_the_ends(kind):
    gate = torch.tensor([[-1e4, -200.0, -88.5, -20.0, -0.0, 0.0, 1e-30, 20.0, 200.0, 1e4, torch.nan]])
    got = outcome(gated(kind), gate, torch.ones_like(gate))
    wanted = outcome(lambda gate, up: ACTIVATIONS[kind](gate) * up, gate.double(), torch.ones_like(gate).double())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one[:, :-1].double(), other[:, :-1], rtol=1e-6, atol=1e-6)
        assert one[0, -1].isnan()


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_bfloat16_norm_is_as_exact_as_the_module(offset):
    torch.manual_seed(0)
    own, fused = norm(offset, 77, dtype=torch.bfloat16)
    x = torch.randn(40, 77).bfloat16()
    wanted = outcome(lambda x, w: layers._plain_norm(x, w, 1e-6, offset), x.double(), own.weight.double())
    eager, got = (
        outcome(lambda x, w, one=one: torch.func.functional_call(one, {"weight": w}, (x,)), x, own.weight)
        for one in (own, fused)
    )
    assert_as_exact(got, eager, wanted)


def assert_as_exact(got, eager, wanted):
    for one, other, truth in zip(got, eager, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - truth).norm() <= 2 * (other.double() - truth).norm()


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_bfloat16_gate_is_as_exact_as_torch(kind):
    torch.manual_seed(0)
    gate, up = 3 * torch.randn(40, 77).bfloat16(), torch.randn(40, 77).bfloat16()
    wanted = outcome(lambda gate, up: ACTIVATIONS[kind](gate) * up, gate.double(), up.double())
    eager = outcome(lambda gate, up: ACTIVATIONS[kind](gate) * up, gate, up)
    assert_as_exact(outcome(gated(kind), gate, up), eager, wanted)


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 3, 5, 6), (2, 4, 7, 40), (1, 2, 130, 128)])
@pytest.mark.parametrize("lying", ["by heads", "by rows", "every other"])
def test_rotary(shape, lying):
    torch.manual_seed(0)
    batches, heads, rows, width = shape
    x = torch.randn(shape)
    if lying == "by rows":
        x = torch.randn(batches, rows, heads, width).transpose(1, 2)
    elif lying == "every other":
        x = torch.randn(batches, heads, rows, 2 * width)[..., ::2]
    tables = torch.randn(2, batches, rows, width)  # halves that differ, so that a mix-up shows
    got = outcome(lambda x: layers._Rotary.apply(x, *tables), x)
    assert_close(got, outcome(lambda x: layers._plain_rotary(x, *tables.double()), x.double()), 1e-6)
    assert got[0].transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("_instruction_set")
def test_bfloat16_rotary_is_as_exact_as_torch():
    torch.manual_seed(0)
    x, cos, sin = torch.randn(1, 3, 20, 24).bfloat16(), *torch.randn(2, 1, 20, 24).bfloat16()
    wanted = outcome(lambda x: layers._plain_rotary(x, cos.double(), sin.double()), x.double())
    eager = outcome(lambda x: layers._plain_rotary(x, cos, sin), x)
    assert_as_exact(outcome(lambda x: layers._Rotary.apply(x, cos, sin), x), eager, wanted)


@pytest.mark.usefixtures("_instruction_set")
def test_bfloat16_is_float32_rounded_once():
    """To nearest, ties to even; NaN and infinities survive."""
    torch.manual_seed(0)
    x, up, weight = (torch.randn(shape).bfloat16() for shape in ((40, 130), (40, 130), (130,)))
    up[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for half, single in (
        (cpp.gated(x, up, "silu"), cpp.gated(x.float(), up.float(), "silu")),
        (cpp.rms_norm(x, weight, 1e-6, 1.0)[0], cpp.rms_norm(x.float(), weight.float(), 1e-6, 1.0)[0]),
        (cpp.gated(up, x, "silu"), cpp.gated(up.float(), x.float(), "silu")),
    ):
        torch.testing.assert_close(half, single.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_autocast_to_the_dtype_at_hand_changes_nothing():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6).bfloat16(), torch.randn(6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layers._cpu_serves(x, weight)
        assert not layers._cpu_serves(x.float(), weight.float())


def refuse(*_):
    raise AssertionError


@needs_kernels
def test_rotary_leaves_the_rest_to_the_model():
    """Part of the width, other keywords, one angle for all, learned angles: the model's own function."""
    own = modeling_llama.apply_rotary_pos_emb
    query, key, cos, sin = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6), *torch.randn(2, 1, 5, 6)
    for one, other in zip(layers._rotary(refuse, query, key, cos, sin), own(query, key, cos, sin)):
        torch.testing.assert_close(one, other)
    swapped = query.transpose(1, 2), key.transpose(1, 2)
    for one, other in zip(layers._rotary(own, *swapped, cos, sin, unsqueeze_dim=2), own(*swapped, cos, sin, 2)):
        assert torch.equal(one, other)
    for args in (
        (query, key, cos[..., :4], sin[..., :4]),
        (query, key, cos, sin.requires_grad_()),
        (query, key, cos.double(), sin.double()),
    ):
        with pytest.raises(AssertionError):
            layers._rotary(refuse, *args)


def test_a_model_that_rotates_otherwise_keeps_its_attention():
    """GPT-J's kind: neighbours are rotated, not halves."""
    config = transformers.GlmConfig(**SIZES)
    assert not any(isinstance(m, FusedAttention) for m in fused_modules(AutoModelForCausalLM.from_config(config)))


def fused_modules(model):
    fuse_layers(model)
    return model.modules()


@needs_kernels
def test_any_layout():
    torch.manual_seed(0)
    own, fused = norm(0.0, 24)
    for x in (torch.randn(24, 9).T, torch.randn(9, 48)[:, ::2], torch.randn(3, 24).expand(4, 3, 24)):
        assert_close([fused(x)], [own(x)], 1e-6)
        inputs = x, torch.randn(x.shape).mT.contiguous().mT
        wanted = outcome(lambda gate, up: ACTIVATIONS["silu"](gate) * up, *inputs)
        assert_close(outcome(gated("silu"), *inputs), wanted, 1e-6)
    assert fused(torch.randn(2, 0, 24)).shape == (2, 0, 24)
    x = torch.randn(5, 24, requires_grad=True)
    fused(x).sum().backward()  # a gradient without strides
    assert_close([x.grad], [torch.autograd.grad(own(y := x.detach().requires_grad_()).sum(), y)[0]], 1e-6)


@needs_kernels
def test_threads_give_the_same():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    x, weight = torch.randn(700, 300), torch.randn(300)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(outcome(lambda x, w: layers._Norm.apply(x, w, 1e-6, 0.0), x, weight))
        results[-1] += outcome(gated("silu"), x, x.flip(0))
    torch.set_num_threads(before)
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_linear(bias, shape):
    torch.manual_seed(0)
    own = nn.Linear(7, 5, bias=bias)
    fused = copy.deepcopy(own)
    fused.__class__ = FusedLinear
    x = torch.randn(shape)
    wanted = outcome(lambda x, *p: nn.functional.linear(x, *p), x.double(), *(p.double() for p in own.parameters()))
    names = [name for name, _ in fused.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(fused, dict(zip(names, parameters)), (x,))

    assert_close(outcome(run, x, *fused.parameters()), wanted, 1e-6)


# --- whole models ----------------------------------------------------------------------------------------------------


def make_model(family, lora=False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**SIZES))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.2, 2.0)
    if lora:
        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    return model, copy.deepcopy(model)


def run(model):
    ids = torch.arange(3, 47).view(2, 22)
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model, fused):
    (loss, gradients), (fused_loss, fused_gradients) = run(model), run(fused)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        assert_close([fused_gradients[name]], [gradient], 1e-5)


@pytest.mark.parametrize("family", NORMS)
def test_every_family(family):
    model, fused = make_model(family)
    count = fuse_layers(fused)
    assert sum(isinstance(m, FusedNorm) for m in fused.modules()) == NORMS[family]
    assert sum(isinstance(m, FusedMLP) for m in fused.modules()) == 2
    linears = sum(isinstance(m, nn.Linear) for m in fused.modules())
    assert sum(isinstance(m, FusedAttention) for m in fused.modules()) == 2
    assert count == NORMS[family] + 4 + (linears if products.prefers_onednn() else 0)
    assert fuse_layers(fused) == 0
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert_same_training(model, copy.deepcopy(fused))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_and_gradient_checkpointing(family, reentrant):
    model, fused = make_model(family, lora=True)
    assert fuse_layers(fused) > 0
    assert fuse_lora(fused) == (8 if family == "Phi3" else 14)
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    fused.train()
    assert_same_training(model.train(), fused)


# --- left alone ------------------------------------------------------------------------------------------------------


class EpsOutside(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class GatedMLP(nn.Module):
    def __init__(self, activation, swapped=False, twice=1):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act, self.swapped, self.twice = activation, swapped, twice

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        gate, up = (up, gate) if self.swapped else (gate, up)
        return self.twice * self.down_proj(self.act(gate) * up)


@pytest.mark.parametrize(
    "module",
    [
        EpsOutside(4, 1e-3),
        nn.LayerNorm(4),
        nn.RMSNorm(4),  # its eps depends on the dtype
        GatedMLP(nn.ReLU()),
        GatedMLP(nn.GELU()),
        GatedMLP(nn.SiLU(), swapped=True),
        GatedMLP(nn.SiLU(), twice=2),
    ],
    ids=str,
)
def test_what_computes_something_else_is_left_alone(module, monkeypatch):
    monkeypatch.setattr(layers, "prefers_onednn", lambda: False)
    kind = type(module)
    assert fuse_layers(module) == 0
    assert type(module) is kind


def test_a_patched_forward_is_left_alone(monkeypatch):
    monkeypatch.setattr(layers, "prefers_onednn", lambda: True)
    norm, linear = LlamaRMSNorm(4), nn.Linear(4, 4)
    norm.forward = linear.forward = lambda x: x
    assert fuse_layers(nn.ModuleList([norm, linear])) == 0


def test_random_numbers_are_not_used_up():
    model, _ = make_model("Llama")
    before = torch.get_rng_state()
    fuse_layers(model)
    assert torch.equal(torch.get_rng_state(), before)


# --- stepping aside --------------------------------------------------------------------------------------------------


def small_mlp():
    torch.manual_seed(0)
    own = GatedMLP(nn.SiLU())
    fused = copy.deepcopy(own)
    assert fuse_layers(fused) >= 1
    return own, fused


@pytest.mark.parametrize("make", [lambda: norm(0.0, 4), lambda: norm(1.0, 4), small_mlp])
@pytest.mark.parametrize("reason", ["float64", "float16", "autocast", "mixed", "extension"])
def test_stepping_aside_gives_the_modules_own_values(make, reason, monkeypatch):
    own, fused = make()
    x = torch.randn(5, 4)
    if reason in ("float64", "float16"):
        dtype = getattr(torch, reason)
        own, fused, x = own.to(dtype), fused.to(dtype), x.to(dtype)
    elif reason == "mixed" and isinstance(fused, FusedNorm):
        x = x.bfloat16()
    elif reason == "extension":
        monkeypatch.setattr(cpp, "unavailable", lambda device, dtype: "it is not installed")
    with torch.autocast("cpu", enabled=reason == "autocast"):
        close = 1e-2 if reason == "autocast" and isinstance(fused, FusedMLP) else 1e-6  # its gate is in bfloat16 then
        torch.testing.assert_close(fused(x), own(x), rtol=close, atol=close)
        assert fused(x).dtype == own(x).dtype


def test_inputs_by_name_reach_the_module():
    own, fused = norm(0.0, 4)
    x = torch.randn(2, 4)
    assert torch.equal(fused(hidden_states=x), own(hidden_states=x))


@pytest.mark.parametrize("what", ["norm 0", "norm 1", "silu", "gelu_tanh", "rotary"])
def test_liger_is_used_only_where_it_gives_the_same(what, monkeypatch):
    device = torch.device("cpu")
    plain = layers._plain_function(what)
    for fast, accepted in (
        (lambda *args: plain(*args), True),
        (lambda first, *rest: plain(first + 0.1, *rest), False),
        (lambda *args: plain(args[0], args[1].detach() + 0 * args[1], *args[2:]), False),  # a gradient is wrong
        (lambda x: x, False),  # another signature
    ):
        layers._liger.cache_clear()
        monkeypatch.setattr(layers, "_liger_function", lambda _, fast=fast: fast)
        assert (layers._liger(what, torch.float32, device) is fast) == accepted
    layers._liger.cache_clear()


def test_liger_runs_on_the_device_of_its_tensors(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def fast(gate, up):
        seen.append(current[-1] if current else None)
        return torch.nn.functional.silu(gate) * up

    seen, like_cuda = [], types.SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(layers, "_plain_call", lambda *tensors: True)
    monkeypatch.setattr(layers, "_liger", lambda what, dtype, device: fast)
    gate, up = torch.randn(2, 3, 4)
    layers._liger_for("silu", like_cuda, like_cuda)(gate, up)
    assert len(seen) == 1
    assert seen[0] is gate
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(layers, "_liger_function", lambda what: fast)
    layers._liger.cache_clear()
    assert layers._liger("silu", torch.float32, torch.device("cpu")) is fast  # tried on that device too
    layers._liger.cache_clear()
    assert all(tensor is not None for tensor in seen)


@pytest.mark.parametrize("inference", [False, True])
def test_liger_is_tried_with_gradients_whatever_the_mode(inference, monkeypatch):
    """Its verdict holds for the whole process."""
    plain = layers._plain_function("silu")
    monkeypatch.setattr(layers, "_liger_function", lambda what: plain)
    layers._liger.cache_clear()
    with torch.inference_mode(inference):
        assert layers._liger("silu", torch.float32, torch.device("cpu")) is plain
    layers._liger.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["norm 0", "norm 1", "silu", "gelu_tanh", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_serves_cuda(what, dtype):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    assert layers._liger(what, dtype, torch.device("cuda")) is not None


# --- refusals of the kernels -----------------------------------------------------------------------------------------


@needs_kernels
def test_kernels_refuse_what_does_not_fit():
    x, y, scale = torch.randn(3, 4), torch.empty(3, 4), torch.empty(3)
    weight = torch.ones(1, 4)
    call = cpp._cpp.rms_norm
    call(x, weight, 1e-6, 0.0, y, scale, 1)
    for args, name in (
        ((x, weight[:, :3], 1e-6, 0.0, y, scale, 1), "weight"),
        ((x, weight.bfloat16(), 1e-6, 0.0, y, scale, 1), "weight"),
        ((x.double(), weight, 1e-6, 0.0, y, scale, 1), "x"),
        ((x, weight, 1e-6, 0.0, y[:2], scale, 1), "y"),
        ((x, weight, 1e-6, 0.0, y.T.contiguous().T, scale, 1), "y"),
        ((x, weight, 1e-6, 0.0, y, scale[:2], 1), "scale"),
        ((x, weight, float("nan"), 0.0, y, scale, 1), "eps"),
        ((x, weight, 1e-6, 0.0, y, scale, 0), "threads"),
    ):
        with pytest.raises(ValueError, match=name):
            call(*args)
    with pytest.raises(ValueError, match="up"):
        cpp._cpp.gated(x, x[:2], "silu", y, 1)
    with pytest.raises(ValueError, match="activation"):
        cpp._cpp.gated(x, x, "relu", y, 1)
    with pytest.raises(ValueError, match="d_up"):
        cpp._cpp.gated_backward(x, x, "silu", y, y, y[:, :3], 1)
    x, table = torch.randn(2, 3, 5, 4), torch.randn(2, 5, 4)
    for args, name in (
        ((x[..., :3], table, table, False, x, 1), "x"),
        ((x[0], table, table, False, x, 1), "x"),
        ((x, table[:1], table, False, x, 1), "cos"),
        ((x, table, table[:, :4], False, x, 1), "sin"),
        ((x, table.bfloat16(), table, False, x, 1), "cos"),
        ((x, table, table, False, x[:, :2], 1), "y"),
        ((x, table, table, False, x.transpose(2, 3).contiguous().transpose(2, 3), 1), "y"),
    ):
        with pytest.raises(ValueError, match=name):
            cpp._cpp.rotary(*args)
