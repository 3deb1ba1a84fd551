"""The fused LoRA linear against PEFT's own module: values, every gradient, and when it steps aside."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from torch import nn

from alro_fast.modeling.layers import fuse_layers
from alro_fast.modeling.lora import LoRALinear, _merging_pays, fuse_lora


def pair(bias=False, dtype=torch.float64, **options):
    """PEFT's module and its fused twin, same weights, away from their start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5, bias=bias, dtype=dtype))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False, **options)
    plain = get_peft_model(net, config, autocast_adapter_dtype=False)
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 1
    return plain, fused


def outcome(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
    return y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (1, 7)])
def test_values_and_gradients_are_pefts(bias, shape):
    plain, fused = pair(bias)
    x = torch.randn(shape, dtype=torch.float64)
    expected, got = outcome(plain, x), outcome(fused, x)
    assert len(expected) == len(got) == 4
    for one, other in zip(expected, got):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_of_many_rows_are_pefts(bias):
    """Rows enough for W + s B A to be made: the same sums in another order, of the adapter as it stands."""
    plain, fused = pair(bias)
    x = torch.randn(64, 7, dtype=torch.float64)
    assert _merging_pays(x, torch.empty(5, 7, dtype=torch.float64))
    assert not _merging_pays(x[:5], torch.empty(5, 7, dtype=torch.float64))
    assert not _merging_pays(x.bfloat16(), torch.empty(5, 7, dtype=torch.bfloat16))
    for one, other in zip(outcome(plain, x), outcome(fused, x), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_frozen_input_and_frozen_matrices_get_no_gradient():
    _, fused = pair()
    layer = next(m for m in fused.modules() if isinstance(m, LoRALinear))
    layer.lora_A["default"].weight.requires_grad_(False)
    fused(torch.randn(4, 7, dtype=torch.float64)).sum().backward()
    assert layer.lora_A["default"].weight.grad is None
    assert layer.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_dropout_and_dora_stay_pefts(options):
    plain, fused = pair(dtype=torch.float32, **options)
    x = torch.randn(64, 7)
    for mode in (True, False):
        plain.train(mode), fused.train(mode)
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        torch.testing.assert_close(fused(x), expected)


def test_a_disabled_or_merged_adapter_is_honoured():
    plain, fused = pair()
    x = torch.randn(4, 7, dtype=torch.float64)
    with fused.disable_adapter(), plain.disable_adapter():
        off = fused(x)
        torch.testing.assert_close(off, plain(x))
    on = fused(x)
    assert not torch.allclose(on, off)
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), on)


def test_autocast_computes_as_peft_does():
    plain, fused = pair(dtype=torch.float32)
    x = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_matrices_over_a_bfloat16_base(autocast):
    """As close to float64 as PEFT's own, without a float32 product; gradients of the matrices in float32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 80, bias=False, dtype=torch.bfloat16))
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    plain = get_peft_model(net, config)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fuse_lora(fused)
    x = torch.randn(64, 96).bfloat16()
    wanted = outcome(exact, x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, got = outcome(plain, x), outcome(fused, x)
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for true, one, other in zip(wanted, expected, got):
        assert (other - true).norm() < 1.5 * (one - true).norm() + 1e-3 * true.norm()


def test_saved_files_are_plain_peft(tmp_path):
    base = tiny_llama(50)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2))
    assert fuse_lora(model) == 14
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(50), tmp_path)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_parts_that_are_sharded_by_themselves_are_gathered(one_process, dtype):
    """FSDP2 around every linear, those of A and B too: its hooks gather and cast; nothing is read past them."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def sharded(fuse: bool) -> nn.Module:
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_llama(50), LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2, lora_alpha=1)
        )
        model.base_model.model.set_attn_implementation("sdpa")
        if fuse:
            fuse_layers(model)
            assert fuse_lora(model) == 14
        for part in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            fully_shard(part, mesh=one_process, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, output_dtype=dtype))
        return model

    ids, outcomes = torch.arange(18).view(2, 9), []
    for fuse in (False, True):
        model = sharded(fuse)
        logits = model(input_ids=ids).logits
        logits.float().log_softmax(-1).square().mean().backward()
        grads = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
        outcomes.append((logits, *grads))
    assert len(outcomes[0]) == len(outcomes[1]) == 29
    for one, other in zip(*outcomes):
        assert one.dtype == other.dtype
        assert (other - one).norm() <= (1e-4 if dtype is None else 0.1) * one.norm()
