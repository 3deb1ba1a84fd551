"""The LM head of a transformers causal LM."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Head(NamedTuple):
    """z = softcap(scale * (hidden weight^T + bias))."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


def head_of(model: Any) -> Head:
    """The output embedding of `model` and how its logits are scaled and capped."""
    linear: nn.Module = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear.weight, getattr(linear, "bias", None), getattr(config, "final_logit_softcapping", None), scale)
