"""A decoder's layers around its matrix products in one visit of memory each: norm, gated activation, rotation, linear.

`fuse_layers(model)` gives modules that are known by structure, and by what they compute on a small random input, a
class derived from their own whose forward is fused. Parameters, names, hooks and files stay as they are. Where no fused
kernel serves a call (torch.compile, autocast to another dtype, other dtypes, no compiled extension) the module's own
forward runs.

    norm    y = x / sqrt(mean(x^2) + eps) * (weight + offset)     offset 1: Gemma
    gated   y = activation(gate) * up                             activation: SiLU, or GELU by tanh
    rotary  y = x cos + rotate_half(x) sin
    linear  y = x W^T + b                                         `alro_fast.modeling.products`

float32 and bfloat16; all sums are float32 and the result is rounded once. CPU: csrc/. CUDA: liger-kernel, where it is
installed and gives what the module gives.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.backends import cpp
from .products import prefers_onednn, product

logger = logging.getLogger(__name__)
ROTARY = "apply_rotary_pos_emb"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
}


def fuse_layers(model: nn.Module) -> int:
    """Speed up the norms, gated MLPs, attentions and plain linears of a model, in place; returns how many modules."""
    norms = mlps = attentions = linears = 0
    for module in model.modules():
        if isinstance(module, FusedNorm | FusedMLP | FusedAttention | FusedLinear) or "forward" in vars(module):
            continue
        if (constants := _norm_constants(module)) is not None:
            _derive(module, FusedNorm, norm_constants=constants)
            norms += 1
        elif (parts := _mlp_parts(module)) is not None:
            _derive(module, FusedMLP, mlp_parts=parts)
            mlps += 1
        elif (forward := _attention_forward(type(module))) is not None:  # type: ignore[arg-type]  # classes are hashable
            _derive(module, FusedAttention, attention_forward=forward)
            attentions += 1
        elif type(module) is nn.Linear and prefers_onednn():
            module.__class__ = FusedLinear
            linears += 1
    logger.debug("fused layers: %d norms, %d gated MLPs, %d attentions, %d linears", norms, mlps, attentions, linears)
    return norms + mlps + attentions + linears


# --- modules ---------------------------------------------------------------------------------------------------------


class FusedNorm(nn.Module):
    """Mixin in front of a module's own class."""

    norm_constants: tuple[float, float]  # eps, offset
    weight: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs:
            x, (eps, offset) = args[0], self.norm_constants
            if _cpu_serves(x, self.weight):
                return _Norm.apply(x, self.weight, eps, offset)
            if (liger := _liger_for(f"norm {offset:.0f}", x, self.weight)) is not None:
                return liger(x, self.weight, eps)
        return super().forward(*args, **kwargs)


class FusedMLP(nn.Module):
    """Mixin in front of a module's own class; the projections may be anything, LoRA included."""

    mlp_parts: tuple[str, str]  # name of the activation's module, key of ACTIVATIONS
    gate_proj: nn.Module
    up_proj: nn.Module
    gate_up_proj: nn.Module  # in place of both
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        module, kind = self.mlp_parts
        if hasattr(self, "gate_up_proj"):
            both = self.gate_up_proj(x)
            if _cpu_serves(both):
                return self.down_proj(_Gated.apply(both, None, kind))
            gate, up = both.chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
            if _cpu_serves(gate, up):
                return self.down_proj(_Gated.apply(gate, up, kind))
        if (liger := _liger_for(kind, gate, up)) is not None:
            return self.down_proj(liger(gate, up))
        return self.down_proj(getattr(self, module)(gate) * up)


class FusedAttention(nn.Module):
    """Mixin in front of a module's own class, whose forward runs with a fused `apply_rotary_pos_emb`."""

    attention_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention_forward(self, *args, **kwargs)


class FusedLinear(nn.Linear):
    """nn.Linear by `alro_fast.modeling.products`, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and x.device.type == "cpu" and _plain_call(x, self.weight):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)


def _derive(module: nn.Module, mixin: type[nn.Module], **attributes: Any) -> None:
    module.__class__ = _derived(type(module), mixin)  # type: ignore[arg-type]  # classes are hashable
    vars(module).update(attributes)


@functools.cache
def _derived(own: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    return type(mixin.__name__ + own.__name__, (mixin, own), {"__module__": own.__module__})


# --- what a module computes ------------------------------------------------------------------------------------------


def _norm_constants(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) of an RMS norm."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if len(module._parameters) > 1 or module._buffers or module._modules:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(4, 24) * torch.tensor([[1.0], [eps**0.5], [30.0], [1.0]])  # eps is a large part of the second
        factor = torch.rand(24) + 0.5
    twin = _twin(module, _parameters={"weight": nn.Parameter(factor)})
    for offset in (0.0, 1.0):
        if _gives(twin, x, _plain_norm(x.double(), factor.double(), eps, offset)):
            return eps, offset
    return None


def _plain_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + offset)


def _mlp_parts(module: nn.Module) -> tuple[str, str] | None:
    """(name of the activation's module, what it is) of a gated MLP."""
    names = set(module._modules)
    fused = "gate_up_proj" in names
    rest = names - ({"gate_up_proj", "down_proj"} if fused else {"gate_proj", "up_proj", "down_proj"})
    if len(rest) != 1 or len(names) != (3 if fused else 4) or module._parameters or module._buffers:
        return None
    (activation,) = rest
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        up, down = nn.Linear(8, 12 if fused else 6), nn.Linear(6, 8)
        gate = nn.Linear(8, 6)
        x = 3 * torch.randn(5, 8)
    act = cast(nn.Module, module._modules[activation])
    projections = {"gate_up_proj": up} if fused else {"gate_proj": gate, "up_proj": up}
    twin = _twin(module, _modules={activation: act, "down_proj": down, **projections})
    with torch.no_grad():
        gated, factor = up(x).chunk(2, dim=-1) if fused else (gate(x), up(x))
        for kind, function in ACTIVATIONS.items():
            grid = torch.linspace(-12, 12, 97)
            if _gives(act, grid, function(grid.double())) and _gives(twin, x, down(function(gated) * factor).double()):
                return activation, kind
    return None


@functools.cache
def _attention_forward(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The class's own forward, calling `_rotary` for its module's function `apply_rotary_pos_emb`.

    transformers offers no other place for it: the function is a global of the module that defines the class. What is
    made here is a second function over the same code; the module and the class stay as they are.
    """
    forward = kind.forward
    if ROTARY not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    own = forward.__globals__.get(ROTARY)
    if own is None or not _rotates_halves(own):
        return None
    names = forward.__globals__ | {ROTARY: functools.partial(_rotary, own)}
    bound = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    bound.__kwdefaults__ = forward.__kwdefaults__
    return bound


def _rotates_halves(function: Callable[..., Any]) -> bool:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        query, key = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6)
        cos, sin = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    try:
        found = function(query, key, cos, sin)
        return len(found) == 2 and all(
            torch.allclose(y, _plain_rotary(x, cos, sin), rtol=1e-5, atol=1e-5) for y, x in zip(found, (query, key))
        )
    except Exception:
        return False


def _plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _twin(module: nn.Module, **own: dict[str, Any]) -> nn.Module:
    """The module with other parameters or children, small ones."""
    twin = copy.copy(module)
    vars(twin).update(own)
    return twin


@torch.no_grad()
def _gives(module: nn.Module, x: Tensor, wanted: Tensor) -> bool:
    try:
        got = module.forward(x)
    except Exception:  # whatever the module is, it is not what it was taken for
        return False
    return got.shape == wanted.shape and torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5)


# --- the CPU ---------------------------------------------------------------------------------------------------------


def _plain_call(*tensors: Tensor) -> bool:
    """One device, one dtype, nothing that traces, or casts to another dtype."""
    first = tensors[0]
    kind = first.device.type
    return (
        all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)
        and (not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == first.dtype)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _cpu_serves(*tensors: Tensor) -> bool:
    first = tensors[0]
    return first.device.type == "cpu" and cpp.unavailable(first.device, first.dtype) is None and _plain_call(*tensors)


def _rows(x: Tensor) -> Tensor:
    """[..., H] -> [rows, H], columns next to each other."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, scale = cpp.rms_norm(_rows(x), weight, eps, offset)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        d_x, d_weight = cpp.rms_norm_backward(_rows(x), weight, ctx.offset, scale, _rows(grad), needs_weight)
        return d_x.view(x.shape), None if d_weight is None else d_weight.to(weight.dtype), None, None


class _Gated(torch.autograd.Function):
    """up None: gate holds both, side by side."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        y = cpp.gated(*_gate_and_up(gate, up), kind)
        return y.view(*gate.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = gate.new_empty(gate.shape), None if up is None else up.new_empty(up.shape)
        cpp.gated_backward(*_gate_and_up(gate, up), ctx.kind, _rows(grad), *_gate_and_up(d_gate, d_up))
        return d_gate, d_up, None


def _gate_and_up(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return _rows(gate), _rows(up)
    first, second = _rows(gate).chunk(2, dim=1)
    return first, second


def _rotary(
    own: Callable[..., Any], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """own(query, key, cos, sin): `own` rotates halves, and anything beyond that is left to it."""
    if args or kwargs or not _rotary_fits(query, key, cos, sin):
        return own(query, key, cos, sin, *args, **kwargs)
    if _cpu_serves(query, key, cos, sin):
        cos, sin = (table.expand(len(query), -1, -1) for table in (cos, sin))
        return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
    if (liger := _liger_for("rotary", query, key, cos, sin)) is not None:
        return liger(query, key, cos, sin)
    return own(query, key, cos, sin)


def _rotary_fits(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if (
        query.dim() != 4
        or key.dim() != 4
        or cos.requires_grad
        or sin.requires_grad
        or cos.shape[0] not in (1, len(query))
    ):
        return False
    shape = (cos.shape[0], query.shape[2], query.shape[3])
    return (cos.shape == sin.shape == shape and key.shape[2:] == query.shape[2:] and len(key) == len(query)) and (
        query.shape[3] % 2 == 0 and cos.stride(2) == sin.stride(2) == 1
    )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return cpp.rotary(_with_rows(x), cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return cpp.rotary(_with_rows(grad), cos, sin, True), None, None


def _with_rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        d_x = product(grads, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = product(grads.T, rows.T) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, grads.sum(0) if ctx.needs_input_grad[2] else None


# --- CUDA ------------------------------------------------------------------------------------------------------------


def _liger_for(what: str, *tensors: Tensor) -> Callable[..., Any] | None:
    first = tensors[0]
    fast = _liger(what, first.dtype, first.device) if first.device.type == "cuda" and _plain_call(*tensors) else None
    return None if fast is None else functools.partial(_on_their_device, fast)


def _on_their_device(function: Callable[..., Any], *args: Any) -> Any:
    """Triton launches on the current device, whichever holds the tensors."""
    with torch.cuda.device_of(args[0]):
        return function(*args)


@functools.cache
@torch.inference_mode(False)
def _liger(what: str, dtype: torch.dtype, device: torch.device) -> Callable[..., Any] | None:
    """liger-kernel's norm ("norm 0", "norm 1": the offset), gated activation or "rotary"; None: not installed, or not
    the same. Its rotation may overwrite its input."""
    shapes: dict[str, list[tuple[int, ...]]] = {
        "norm 0": [(5, 64), (64,)],
        "norm 1": [(5, 64), (64,)],
        "rotary": [(1, 4, 5, 64), (1, 2, 5, 64)],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = [torch.randn(shape) for shape in shapes.get(what, [(5, 64)] * 2)]
        if what == "rotary":
            angle = torch.randn(1, 5, 32).repeat(1, 1, 2)  # one for each pair of channels
            inputs += [angle.cos(), angle.sin()]
    try:
        fast = _liger_function(what)
        got = _outcome(functools.partial(_on_their_device, fast), *(tensor.to(device, dtype) for tensor in inputs))
    except Exception as reason:
        logger.info("liger-kernel does not serve %s of %s on %s (%s)", what, dtype, device, reason)
        return None
    wanted = _outcome(_plain_function(what), *(tensor.to(device, dtype).double() for tensor in inputs))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    if all(torch.allclose(one.double(), other, rtol=tolerance, atol=tolerance) for one, other in zip(got, wanted)):
        logger.info("liger-kernel serves %s of %s on %s", what, dtype, device)
        return fast
    logger.warning("liger-kernel's %s of %s on %s gives other values: not used", what, dtype, device)
    return None


def _liger_function(what: str) -> Callable[..., Any]:
    if what == "silu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Function
    elif what == "gelu_tanh":
        from liger_kernel.ops.geglu import LigerGELUMulFunction as Function
    elif what == "rotary":
        from liger_kernel.ops.rope import LigerRopeFunction as Function
    else:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        casting, offset = ("llama", 0.0) if what == "norm 0" else ("gemma", 1.0)
        return lambda x, weight, eps=1e-6: LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)
    return Function.apply


def _plain_function(what: str) -> Callable[..., Any]:
    if what in ACTIVATIONS:
        return lambda gate, up: ACTIVATIONS[what](gate) * up
    if what == "rotary":
        return lambda query, key, cos, sin: (_plain_rotary(query, cos, sin), _plain_rotary(key, cos, sin))
    return lambda x, weight: _plain_norm(x, weight, 1e-6, float(what == "norm 1"))


@torch.enable_grad()
def _outcome(function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The values and the gradients of the first two inputs, which are left as they are."""
    copies = [tensor.clone() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in copies[:2]]
    y = function(*(tensor * 1 for tensor in leaves), *copies[2:])
    values = y if isinstance(y, tuple) else (y,)
    directions = [value.detach().cos() for value in values]
    return *(value.detach().clone() for value in values), *torch.autograd.grad(values, leaves, directions)
