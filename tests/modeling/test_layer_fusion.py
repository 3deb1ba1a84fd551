"""Fusing whole models: what is left alone, and who steps aside."""

from __future__ import annotations

import contextlib
import copy
import types

import pytest
import torch
import transformers
from layer_cases import NORMS, SIZES, assert_close, fused_modules, norm
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from alro_fast.modeling import layers, products
from alro_fast.modeling.layers import FusedAttention, FusedMLP, FusedNorm, fuse_layers
from alro_fast.modeling.lora import fuse_lora
from alro_fast.ops.backends import cpp


def test_a_model_that_rotates_otherwise_keeps_its_attention():
    """GPT-J's kind: neighbours are rotated, not halves."""
    config = transformers.GlmConfig(**SIZES)
    assert not any(isinstance(m, FusedAttention) for m in fused_modules(AutoModelForCausalLM.from_config(config)))


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
