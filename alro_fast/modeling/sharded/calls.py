"""Work on a model as part of its forward pass, where engines gather the weights that they hold in parts.

FSDP2 and DeepSpeed gather weights by hooks on the modules that own them, and prepare the backward pass (DDP, too) by
hooks on what those return. So whatever reads weights is run by such a module, in the place of its own forward:

    within(model, work)                the whole model's; calls of the trunk belong in here
    with_head(model, hidden, work)     the LM head's; there `head_of` gives a plain tensor, trained or not
    together(model, work)              both, for work of many trunk calls that needs no gradient, such as ranking

On a model that nobody shards they are ordinary calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ...processes.dealing import is_sharded
from ..attention import trunk_of
from ..lm_head import Head, head_of

T = TypeVar("T")


def accept_work(model: nn.Module) -> None:
    """Let the causal LM inside `model` be called by `within`, through PEFT's and the engines' wrappers."""
    causal: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    ordinary = causal.forward
    if hasattr(ordinary, "takes_work"):
        return

    @functools.wraps(ordinary)
    def forward(*args: Any, alro_work: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return ordinary(*args, **kwargs) if alro_work is None else alro_work()

    cast(Any, forward).takes_work = True
    causal.forward = forward


def within(model: Any, work: Callable[[], T]) -> T:
    """work(), as the forward pass of `model`, which `accept_work` has seen; an engine's wrapper or what it wraps.

    Gradients flow through tensors that `work` returns, by themselves or in tuples.
    """
    result: T = model(alro_work=work)
    return result


def with_head(model: Any, hidden: Tensor, work: Callable[[Tensor, Head], T]) -> T:
    """work(hidden, head), as the forward pass of the LM head of `model` (a causal LM, with or without PEFT).

    The head's weights are there whole for that long, and get their gradient. hidden: [N, H], of any floating dtype;
    `work` gets it in the head's. Autocast, which would change what the fused ops compute in, is off.
    """
    module = model.get_output_embeddings()
    own = module.__dict__.get("forward")

    def forward(hidden: Tensor) -> T:
        head = head_of(model)
        with torch.autocast(hidden.device.type, enabled=False):
            return work(hidden.to(head.weight.dtype), head)

    module.forward = forward
    try:
        result: T = module(hidden)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    return result


@torch.no_grad()
def together(model: nn.Module, work: Callable[[], T]) -> T:
    """work(), which reads `model` without gradients by however many trunk calls: ranks, or takes log-probabilities.

    A sharded model gathers weights layer by layer in all processes at once: all must call this, and their `work` the
    trunk equally often. Embeddings and head are whole throughout.
    """
    if not is_sharded(model):
        return work()
    found: list[T] = []
    trunk = trunk_of(model)
    weight = cast(Tensor, trunk.get_input_embeddings().weight)
    nothing = torch.zeros(0, trunk.config.hidden_size, device=weight.device, dtype=weight.dtype)

    def inside(hidden: Tensor, _: Head) -> Tensor:
        found.append(work())
        return hidden

    def whole() -> Tensor:
        with torch.autocast(nothing.device.type, enabled=False):
            return with_head(model, nothing, inside)

    accept_work(model)
    within(model, whole)
    return found[0]
