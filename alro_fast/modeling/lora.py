"""LoRA linears in as few passes as they need: y = x W^T + b + s (x A^T) B^T, W and b frozen.

PEFT's module makes three [T, out] tensors on the way to y and as many on the way back. Here the low-rank product is
added into the base product in place, forward and backward, and only x A^T ([T, r]) is kept besides x:

    forward   h = x A^T        y = x W^T + b;  y += s h B^T
    backward  g = s dy B       dx = dy W;  dx += g A       dA = g^T x       dB = s dy^T h

On the CPU in float32, where the rows are many, adding into [T, out] and [T, in] costs more than adding into [out, in]:

    forward   W' = W + s B A   y = x W'^T + b
    backward  W' = W + s B A   dx = dy W'                  h, g, dA and dB as above

W' lives for one product. Its rounding is that of float32, no coarser than the sums of the product itself; in bfloat16
it would lose small updates, so there it is not done.

A and B may be float32 over a base in bfloat16: the products are then the base's, the matrices and their gradients stay
float32, as autocast would have it.

`fuse_lora(model)` turns PEFT's own modules into these where that is exact; parameters, names and files stay PEFT's. A
call that something else watches over goes PEFT's way, through the modules of A and B themselves: where they have hooks
(FSDP2 and ZeRO-3 gather weights in them) or are wrapped (FSDP1), weights read past them may be shards.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from .layers import FusedLinear
from .products import product


def fuse_lora(model: nn.Module) -> int:
    """Speed up the plain LoRA linears of a PEFT model, in place; returns how many. DoRA and the like stay PEFT's."""
    fused = 0
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) in (nn.Linear, FusedLinear):
            module.__class__ = LoRALinear
            fused += 1
    return fused


class LoRALinear(PeftLinear):
    """PEFT's LoRA linear with a fused forward and backward where one plain adapter is active over a frozen base."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._plain_adapter()
        if adapter is None or args or kwargs or not self._is_bare(adapter):
            return super().forward(x, *args, **kwargs)
        down, up, weight = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.base_layer.weight
        casts = torch.is_autocast_enabled(x.device.type)
        compute = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
        if weight.dtype != compute or any(matrix.dtype not in (compute, torch.float32) for matrix in (down, up)):
            return super().forward(x)
        return _LoRA.apply(x.to(compute), weight, self.base_layer.bias, down, up, self.scaling[adapter])

    def _plain_adapter(self) -> str | None:
        """The one active adapter, when the formula above is all it does."""
        if self.disable_adapters or self.merged or self.base_layer.weight.requires_grad:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or self.lora_bias.get(active[0]):
            return None
        dropout = self.lora_dropout[active[0]]
        return active[0] if isinstance(dropout, nn.Identity) or not dropout.training else None

    def _is_bare(self, adapter: str) -> bool:
        """Whether the weights of base, A and B lie there whole, and nothing waits for their modules to be called."""
        parts = (self.base_layer, self.lora_A[adapter], self.lora_B[adapter])
        return all(
            type(part) in (nn.Linear, FusedLinear)
            and not (part._forward_pre_hooks or part._forward_hooks or part._backward_hooks or part._backward_pre_hooks)
            and not hasattr(part.weight, "full_tensor")
            and part.weight.shape == (part.out_features, part.in_features)
            for part in parts
        )


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        ctx.kept = down.dtype, up.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        low = None
        if _merging_pays(rows, weight):
            y = product(rows, torch.addmm(weight, up, down, alpha=scaling), bias)
        else:
            low = product(rows, down)
            y = product(rows, weight, bias)
            y.addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        needs_x, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        grad_low = product(grad, up.T) if needs_down or (needs_x and low is not None) else grad[:0]
        grad_x = grad_down = grad_up = None
        if needs_x and low is None:
            grad_x = product(grad, torch.addmm(weight, up, down, alpha=ctx.scaling).T).view(ctx.shape)
        elif needs_x:
            grad_x = product(grad, weight.T).addmm_(grad_low, down, alpha=ctx.scaling).view(ctx.shape)
        if needs_down:
            grad_down = product(grad_low.T, rows.T).to(ctx.kept[0]).mul_(ctx.scaling)
        if needs_up:
            low = product(rows, down) if low is None else low
            grad_up = product(low.T, grad.T).to(ctx.kept[1]).mul_(ctx.scaling).T
        return grad_x, None, None, grad_down, grad_up, None


def _merging_pays(rows: Tensor, weight: Tensor) -> bool:
    """Whether W + s B A, made twice, is less to write than what is added to y and dx otherwise."""
    out, width = weight.shape
    exact = rows.dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
    return rows.device.type == "cpu" and exact and len(rows) * (out + width) > 2 * out * width
