"""Per-token log-probs of a transformers causal LM without its logits, and the lookup of its LM head.

score = fused_head(model)
logprobs = score(labels, input_ids=ids, attention_mask=mask)      # [B, T], 0 where labels are -100
loss = -logprobs.sum() / (labels[:, 1:] != -100).sum()
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import AlroFastError
from .attention import trunk_of
from .packing import IGNORED, PackedBatch

# How configurations name what their models do to logits. Factors first, divisors second; exceptions by model type.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)  # the rest divide by it
_IGNORE_LOGIT_SCALE = ("mpt",)


class Head(NamedTuple):
    """z = softcap(scale * (hidden @ weight.T + bias)), as `alro_fast.ops` defines it."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float

    @property
    def terms(self) -> dict[str, Any]:
        """All but the weight, as the keyword arguments of ops and losses."""
        return {"bias": self.bias, "softcap": self.softcap, "scale": self.scale}

    def label_logprobs(self, hidden: Tensor, batch: PackedBatch, *, backend: str = "auto") -> Tensor:
        """log p of every label of a packed batch: float32 [N]; hidden [U, H], its distinct answer rows: each goes
        through the head once, whatever number of labels it has."""
        found = self.logprobs(hidden, batch.label_table, ignore_index=IGNORED, backend=backend)
        return found.flatten() if batch.one_label_a_row else found.flatten().index_select(0, batch.label_places)

    def logprobs(self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100, backend: str = "auto") -> Tensor:
        """log p(label) of every row, full vocabulary: float32 of the labels' shape; 0 (no gradient) where ignored.

        hidden [N, H], of any floating dtype; labels [N], or [N, K]: several of each row.
        """
        hidden = hidden.to(self.weight.dtype)  # mixed precision hands the trunk's results out in another
        return ops.linear_logprobs(
            hidden, self.weight, labels, **self.terms, ignore_index=ignore_index, backend=backend
        )[0]  # fmt: skip


def head_of(model: Any) -> Head:
    """The LM head of `model` (any causal LM of transformers, with or without PEFT) as plain tensors.

    Found through `get_output_embeddings()`; scale and soft-cap come from the configuration (`prove_head` proves them).
    An adapter that is active on the head is added to its weight: exact, differentiable, at the cost of a [V, H] tensor.
    A DTensor (FSDP2) is gathered, once per call. Call it in every step, after the forward pass: what it returns is a
    snapshot, and FSDP2 may have gathered the head already.
    Raises AlroFastError where the head cannot be read exactly: quantised or partitioned weights (ZeRO-3, FSDP1), a
    trainable DTensor, DoRA, LoRA dropout in training, adapters other than LoRA.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise AlroFastError(f"{type(model).__name__} has no output embeddings; expected a causal LM with an LM head")
    weight, bias = _plain(*_effective(module))
    return Head(weight, bias, *_softcap_and_scale(model.config.get_text_config()))


@torch.no_grad()
def prove_head(model: Any) -> None:
    """Raises AlroFastError unless `head_of(model)` gives the model's own logits; one forward pass of three tokens.

    Finds models that treat logits in a way no configuration field we know of tells. Collective under FSDP and DDP.
    """
    captured = []
    hook = trunk_of(model).register_forward_hook(lambda _, __, output: captured.append(output[0]))
    try:
        ids = torch.tensor([[1, 2, 3]], device=model.get_input_embeddings().weight.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    head = head_of(model)
    hidden = captured[0][0].to(head.weight.dtype)
    ours, lse = ops.linear_logprobs(
        hidden,
        head.weight,
        torch.arange(logits.shape[1], device=hidden.device).expand(len(hidden), -1),
        **head.terms,
    )
    difference = (ours + lse[:, None] - logits).abs().max().item()
    rounding = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 0.03
    tolerance = rounding * max(logits.abs().max().item(), 1e-6)
    if ours.shape != logits.shape or not difference <= tolerance:
        raise AlroFastError(
            f"{type(model).__name__} (model_type {model.config.model_type!r}) changes its logits in a way that is not "
            f"known here: they differ from softcap(scale * (hidden weight^T + bias)) by {difference:.3g}; "
            "use the model's own logits with alro_loss_from_logits"
        )


def fused_head(model: nn.Module, *, check: bool = True, backend: str = "auto") -> FusedHead:
    """A callable that gives `model`'s per-token log-probs without logits. check: prove the head first, `prove_head`."""
    return FusedHead(model, check=check, backend=backend)


class FusedHead:
    """See `fused_head`. Holds the model, no parameters of its own; works on DDP and FSDP2 wrappers alike."""

    def __init__(self, model: nn.Module, *, check: bool = True, backend: str = "auto") -> None:
        ops.check_backend(backend)
        self.model, self.backend = model, backend
        self._inner: Any = getattr(model, "module", model)  # DDP; FSDP2 keeps the model's own class
        self._trunk = trunk_of(self._inner)
        bare: Any = self._inner.get_base_model() if hasattr(self._inner, "get_base_model") else self._inner
        if "logits_to_keep" not in inspect.signature(bare.forward).parameters:
            raise AlroFastError(
                f"{type(bare).__name__}.forward takes no logits_to_keep, so its logits cannot be left out; "
                "use the model's own logits with alro_loss_from_logits"
            )
        if check:
            prove_head(self._inner)

    @property
    def head(self) -> Head:
        return head_of(self._inner)

    def hidden_states(self, input_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        """Last hidden states [B, T, H]: the model's own forward pass (hooks, wrappers, adapters), its head left out.

        The model hands out logits of no position at all. They stay part of the graph: DDP and FSDP2 prepare their
        backward pass by hooks on what a model returns, and would otherwise leave gradients unreduced.
        """
        captured = []
        hook = self._trunk.register_forward_hook(lambda _, __, output: captured.append(output[0]))
        try:
            device = self._inner.get_input_embeddings().weight.device
            nothing = torch.empty(0, dtype=torch.long, device=device)
            logits = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=nothing, **inputs).logits
        finally:
            hook.remove()
        return captured[0] + logits.sum().to(captured[0].dtype)  # 0

    def __call__(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        *,
        ignore_index: int = -100,
        every_row: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """log p(labels[:, t] | tokens before t), float32 [B, T]; 0 (no gradient) where ignored and at t = 0.

        labels [B, T] as transformers takes them, unshifted. inputs: the model's other arguments. every_row: take every
        position through the head, supervised or not, which needs no device synchronisation (the default reads on the
        device how many there are; under torch.compile every row is taken).
        """
        hidden = self.hidden_states(input_ids, **inputs)
        head = self.head
        if labels.shape != hidden.shape[:2]:
            raise AlroFastError(f"labels has shape {tuple(labels.shape)}; expected {tuple(hidden.shape[:2])}")
        rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if not (every_row or torch.compiler.is_compiling()):
            kept = (targets != ignore_index).nonzero()[:, 0]
            rows, targets = rows[kept], targets[kept]
        logprobs = head.logprobs(rows, targets, ignore_index=ignore_index, backend=self.backend)
        if not (every_row or torch.compiler.is_compiling()):
            everywhere = logprobs.new_zeros(labels[:, 1:].numel())
            logprobs = everywhere.index_copy(0, kept, logprobs)
        return nn.functional.pad(logprobs.view(len(labels), -1), (1, 0))


def _effective(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head, active adapters included."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        if module.disable_adapters:
            return _effective(module.original_module)
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        return _effective(module.modules_to_save[active[0]] if active else module.original_module)
    if hasattr(module, "base_layer"):
        return _with_lora(module)
    if not isinstance(module, nn.Linear | nn.Embedding) or not module.weight.is_floating_point():
        raise AlroFastError(
            f"the LM head is a {type(module).__name__} of {getattr(module, 'weight', torch.empty(0)).dtype}; "
            "expected a plain linear layer in floating point, without quantisation"
        )
    return module.weight, getattr(module, "bias", None)


def _with_lora(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    from peft.tuners.lora import Linear as LoraLinear

    weight, bias = _effective(module.base_layer)
    adapters = getattr(module, "active_adapters", [])
    if module.disable_adapters or module.merged:
        return weight, bias
    if type(module) is not LoraLinear:
        raise AlroFastError(
            f"the LM head carries an adapter of type {type(module).__name__}; expected LoRA or none: "
            "leave lm_head out of the adapter's target modules"
        )
    for name in adapters:
        if name not in module.lora_A:
            continue
        if name in module.lora_variant or module.use_dora.get(name):
            raise AlroFastError(
                f"adapter {name!r} is a variant of LoRA, such as DoRA, on the LM head; expected plain LoRA"
            )
        if module.lora_bias.get(name):
            raise AlroFastError(f"adapter {name!r} trains a LoRA bias on the LM head; expected lora_bias=False")
        dropout = getattr(module.lora_dropout[name], "p", 0.0)
        if module.training and dropout:
            raise AlroFastError(
                f"adapter {name!r} has dropout {dropout} on the LM head, which a fused head cannot draw; "
                "set lora_dropout to 0 or leave lm_head out of the target modules"
            )
        weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight, bias


def _plain(weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
    """Gathered tensors, or an error that says how to get them."""
    if weight.numel() == 0 or weight.dim() != 2:
        raise AlroFastError(
            f"the LM head's weight has shape {tuple(weight.shape)} here: ZeRO-3 or FSDP1 holds it in parts; "
            "use ZeRO stage 2, FSDP2, or keep the LM head out of the partitioning"
        )
    if not hasattr(weight, "full_tensor"):
        return weight, bias
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise AlroFastError(
            "the LM head is trainable and sharded (a DTensor): its gradient would not be reduced over processes; "
            "freeze it, or keep it gathered after the forward pass with reshard_after_forward=False on the root module"
        )
    return weight.full_tensor(), None if bias is None else bias.full_tensor()


def _softcap_and_scale(config: Any) -> tuple[float | None, float]:
    scale = 1.0
    for name in (*_FACTORS, *_DIVISORS):
        value = getattr(config, name, None)
        if value is None or (name == "logit_scale" and config.model_type in _IGNORE_LOGIT_SCALE):
            continue
        multiplies = name in _FACTORS or config.model_type.startswith(_MULTIPLY_BY_LOGITS_SCALING)
        scale = scale * value if multiplies else scale / value
    softcap = next((value for name in _SOFTCAPS if (value := getattr(config, name, None))), None)
    return softcap, float(scale)
