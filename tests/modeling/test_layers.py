"""Fused layers beside the modules they stand in for: values, gradients, refusals of the kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import assert_close, gated, needs_kernels, norm, outcome
from torch import nn
from transformers.models.llama import modeling_llama

from alro_fast.modeling import layers
from alro_fast.modeling.layers import ACTIVATIONS, FusedLinear
from alro_fast.ops.backends import cpp

SHAPES = [(1, 1), (3, 7), (5, 16), (2, 3, 33), (4, 128), (130, 515)]


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def _instruction_set(request):
    _cpp = pytest.importorskip("alro_fast._cpp", reason="this install has no C++ kernels")
    widest = _cpp.instruction_set()
    if not _cpp.select_instruction_set(request.param):
        pytest.skip("not on this machine")
    yield
    _cpp.select_instruction_set(widest)


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
