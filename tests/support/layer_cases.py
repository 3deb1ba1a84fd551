"""Layers of transformers and their fused twins, run with their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from alro_fast.modeling import layers
from alro_fast.modeling.layers import FusedNorm, fuse_layers
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


needs_kernels = pytest.mark.skipif(cpp._cpp is None, reason="this install has no C++ kernels")


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


def fused_modules(model):
    fuse_layers(model)
    return model.modules()
