"""Attention over packed trees (`alro_fast.modeling.packing`) for the decoders of transformers.

`use_tree_attention(model)` puts a loaded model on the attention implementation "alro_tree";
`tree_hidden_states(model, batch)` runs its trunk once over the packed stream and returns the rows answers are read
from.
The layout of the stream travels with the forward as a keyword argument of the model, which every decoder layer hands to
the attention function: no patch per architecture, and LoRA and gradient checkpointing see nothing unusual.

The last layer computes keys and values of all rows, but queries and everything after them for the answer rows alone:
nobody reads the others. The sums themselves are in `alro_fast.modeling.attention_bodies`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import AlroFastError
from ..modeling import cpp_attention
from .attention_bodies import (
    cascade_attention,
    dense_attention,
    flash_serves,
    gather_rows,
    varlen_attention,
    varlen_backend,
)
from .packing import Branch, PackedBatch, Segments, Tree, collate

ATTENTION = "alro_tree"
ROWS_ONLY = "_alro_answer_rows_only"  # attribute of a trunk whose last layer may be restricted to the answer rows
LAYER_TYPES = {"full_attention", "sliding_attention"}

logger = logging.getLogger(__name__)


def tree_hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Final hidden states (after the last norm, before the LM head) of the rows that predict the batch's labels.

    Args:
        model: a causal LM of transformers, with or without PEFT, prepared by `use_tree_attention`.
        batch: on the model's device.

    Returns:
        [N, H] in the model's dtype, in the order of `batch.labels`; differentiable.
    """
    return by_label(answer_hidden_states(model, batch), batch)


def by_label(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """[U, H] of `answer_hidden_states` -> [N, H], a row for every label; gradients are added up in float32."""
    return hidden if batch.one_label_a_row else gather_rows(hidden, batch.label_rows)


def answer_hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """As `tree_hidden_states`, each row once whatever branches need it.

    Returns:
        [U, H], in the order of `batch.segments.distinct_rows`; `batch.label_rows` counts its rows.
    """
    trunk = trunk_of(model)
    if trunk.config._attn_implementation != ATTENTION:
        raise AlroFastError(
            f"the model runs on attention {trunk.config._attn_implementation!r}, in which packed branches see each "
            "other; call alro_fast.attention.use_tree_attention(model) once after loading it"
        )
    device = trunk.get_input_embeddings().weight.device
    if batch.input_ids.device != device:
        raise AlroFastError(
            f"the batch is on {batch.input_ids.device}, the model on {device}; use batch.to({str(device)!r})"
        )
    _refuse_rotations(trunk, batch.segments)
    if getattr(trunk, ROWS_ONLY, False):
        with _last_layer_on_answer_rows(trunk, batch.segments):
            return _run(trunk, batch)
    return _run(trunk, batch).index_select(0, batch.segments.distinct_rows)


def use_tree_attention(model: nn.Module, answer_rows_only: bool = True) -> nn.Module:
    """Put a loaded model on tree attention, after proving on a small tree that its branches do not see each other.

    Args:
        model: a causal LM of transformers, with or without PEFT.
        answer_rows_only: the last layer computes the answer rows alone (and the keys and values of all rows); where an
            architecture does not bear it, the log says so.

    Returns:
        The same model. Ordinary forwards (padded batches, `generate`) need the former implementation back:
        `model.set_attn_implementation("sdpa")`.

    Raises:
        AlroFastError: the architecture mixes tokens by other means than causal attention through transformers'
            attention interface (state-space or convolution layers, chunked or bidirectional attention, sinks, ...).
    """
    trunk = trunk_of(model)
    if trunk.config._attn_implementation == ATTENTION:
        return model
    unknown = set(getattr(trunk.config, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise AlroFastError(
            f"{type(trunk).__name__} has layers of type {', '.join(sorted(unknown))}; tree attention serves "
            f"{' and '.join(sorted(LAYER_TYPES))} layers only"
        )
    former = trunk.config._attn_implementation
    with _evaluating(trunk), torch.no_grad():
        tree = _probe_tree(trunk)
        alone = torch.cat([_alone(trunk, ids[:-1])[start - 1 :] for ids, start in zip(tree.ids, tree.answer_starts)])
        batch = collate([tree], [0]).to(alone.device)
        trunk.set_attn_implementation(ATTENTION)
        try:
            error = _difference(tree_hidden_states(trunk, batch), alone)
            if not error <= _allowed(alone):
                raise AlroFastError(
                    f"{type(trunk).__name__} gives other hidden states for a packed tree than for its branches alone "
                    f"(relative difference {error:.2g}): its tokens meet outside the attention interface"
                )
        except BaseException:
            trunk.set_attn_implementation(former)
            raise
        if answer_rows_only:
            setattr(trunk, ROWS_ONLY, _bears_rows_only(trunk, batch, alone))
    return model


def trunk_of(model: nn.Module) -> PreTrainedModel:
    """The decoder below the LM head, adapters left in place.

    Raises:
        AlroFastError: not a model of transformers, or a PEFT method that adds virtual tokens to the prompt.
    """
    adapters = getattr(model, "peft_config", None)
    if adapters and hasattr(model, "get_base_model"):
        for name, adapter in adapters.items():
            if adapter.is_prompt_learning:
                raise AlroFastError(
                    f"adapter {name!r} ({adapter.peft_type.value}) adds virtual tokens to the prompt, which a packed "
                    "stream has no place for; use LoRA or another method that changes weights only"
                )
        model = cast(Any, model).get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise AlroFastError(f"expected a causal LM of transformers (with or without PEFT), got {type(model).__name__}")
    return model.get_decoder()


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alro_segments: Segments | _LastLayer | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "alro_tree".

    Args:
        query: [1, heads, T, D]; key, value: [1, kv_heads, T, D], position embeddings applied. In the last layer's
            second pass [1, ..., U, D]: the distinct answer rows.
        scaling: factor of the scores, default D**-0.5.
        sliding_window: a query sees positions p with 0 <= its own - p < sliding_window.
        softcap: scores become softcap * tanh(score / softcap).
        alro_segments: the layout of the stream.

    Returns:
        [1, T or U, heads, D], None. Padding rows get zeros or values that no other row depends on.
    """
    _refuse(module, attention_mask, dropout, alro_segments, unused)
    answers = isinstance(alro_segments, _LastLayer)
    if isinstance(alro_segments, _LastLayer):
        key, value = alro_segments.keys_and_values(key, value)
        layout = alro_segments.layout
    else:
        layout = cast(Segments, alro_segments)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves norms and rotations in float32
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest else None
    softcap = softcap or None
    same_width = query.shape[-1] == value.shape[-1]
    if query.device.type == "cuda" and same_width and flash_serves(query):
        backend = varlen_backend(softcap is not None, query.device)
        if backend is not None:
            sequences = layout.answers if answers else layout.stream
            return varlen_attention(backend, query, key, value, sequences, scale, window, softcap), None
    if cpp_attention.serves(query, value):
        return cpp_attention.tree_attention(query, key, value, layout, scale, window, softcap, answers), None
    if query.device.type == "cpu" and window is None and softcap is None and same_width and not answers:
        return cascade_attention(query, key, value, layout, scale), None
    return dense_attention(query, key, value, layout, scale, window, softcap, answers), None


AttentionInterface.register(ATTENTION, tree_attention)


# --- the last layer --------------------------------------------------------------------------------------------------


class _LastLayer:
    """What the last layer's attention is told instead of the layout: remember keys and values first, then use them."""

    def __init__(self, layout: Segments) -> None:
        self.layout = layout
        self.taken: tuple[Tensor, Tensor] | None = None

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.taken is None:
            self.taken = key, value
            raise _Taken
        return self.taken


class _Taken(BaseException):
    """Ends the last layer's first pass at its attention; not an Exception, so that nothing on the way handles it."""


@contextmanager
def _last_layer_on_answer_rows(trunk: PreTrainedModel, layout: Segments) -> Iterator[None]:
    """While this lasts, the trunk's last layer goes from all rows in to the answer rows out.

    It is run up to its attention with all rows, which yields their keys and values by whatever norms, projections and
    adapters the architecture has, and then as a whole with the answer rows. It is not checkpointed: it keeps little.
    """
    layer = _last_layer(trunk)

    def narrow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        last = _LastLayer(layout)
        kwargs = kwargs | {"alro_segments": last}
        try:
            layer.forward(*args, **kwargs)
        except _Taken:
            return _select(args, layout), _select(kwargs, layout)
        raise AlroFastError(f"{type(layer).__name__} does not reach tree attention")

    checkpointed = layer.gradient_checkpointing
    layer.gradient_checkpointing = False
    handle = layer.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        layer.gradient_checkpointing = checkpointed


def _last_layer(trunk: PreTrainedModel) -> GradientCheckpointingLayer:
    return [part for part in trunk.modules() if isinstance(part, GradientCheckpointingLayer)][-1]


def _select(value: Any, layout: Segments) -> Any:
    """The answer rows of every tensor [1, T, ...] in a layer's arguments (hidden states, positions, rotations)."""
    if isinstance(value, Tensor):
        by_row = value.dim() > 1 and value.shape[:2] == (1, layout.num_rows)
        return value.index_select(1, layout.distinct_rows) if by_row else value
    if isinstance(value, tuple):
        return tuple(_select(part, layout) for part in value)
    if isinstance(value, dict):
        return {name: _select(part, layout) for name, part in value.items()}
    return value


def _bears_rows_only(trunk: PreTrainedModel, batch: PackedBatch, expected: Tensor) -> bool:
    """Whether the restricted last layer gives the same rows; an architecture may count its rows later on."""
    try:
        with _last_layer_on_answer_rows(trunk, batch.segments):
            error = _difference(by_label(_run(trunk, batch), batch), expected)
    except Exception as reason:
        logger.info("%s: the last layer computes all rows (%s)", type(trunk).__name__, reason)
        return False
    if not error <= _allowed(expected):
        logger.info("%s: the last layer computes all rows (otherwise they differ by %.2g)", type(trunk).__name__, error)
        return False
    return True


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _allowed(hidden: Tensor) -> float:
    return 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 5e-2


# --- checks and the probe --------------------------------------------------------------------------------------------


def _refuse(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    layout: Segments | _LastLayer | None,
    unused: dict[str, Any],
) -> None:
    name = type(module).__name__
    if layout is None:
        raise AlroFastError(
            f"{name} runs on tree attention but was given no packed batch; call tree_hidden_states(model, batch), or "
            'model.set_attn_implementation("sdpa") for ordinary forwards (an architecture whose layers keep keyword '
            "arguments to themselves cannot run on trees)"
        )
    if dropout:
        raise AlroFastError(
            f"{name} drops attention weights (p = {dropout}): a shared prefix would be dropped alike in all its "
            "branches; set attention_dropout to 0 in the model's configuration"
        )
    if attention_mask is not None:
        raise AlroFastError(f"{name} was given an attention mask; a packed batch carries its own layout")
    if not getattr(module, "is_causal", True):
        raise AlroFastError(f"{name} is not causal; branches share a prefix only under causal attention")
    for argument, meaning in {"s_aux": "attention sinks", "position_bias": "a position bias on its scores"}.items():
        if unused.get(argument) is not None:
            raise AlroFastError(f"{name} uses {meaning}, which tree attention does not support")


def _refuse_rotations(trunk: PreTrainedModel, layout: Segments) -> None:
    """Some position embeddings depend on the longest sequence of a forward; packing must not change what they do."""
    parameters = getattr(trunk.config, "rope_parameters", None) or {}
    for rope in [parameters, *parameters.values()]:  # of the model, or of each layer type
        kind = rope.get("rope_type", "") if isinstance(rope, dict) else ""
        limit = rope.get("original_max_position_embeddings") if kind else None
        limit = limit or getattr(trunk.config, "max_position_embeddings", None)
        ntk, mixed = "dynamic" in kind, kind == "longrope" and limit is not None and layout.shortest <= limit
        if (ntk or mixed) and limit is not None and layout.longest > limit:
            raise AlroFastError(
                f"{kind} position embeddings change beyond {limit} tokens, and this batch holds branches of "
                f"{layout.shortest} to {layout.longest} tokens; shorten the longest or keep long and short ones apart"
            )


def _run(trunk: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """[T, H] hidden states of the stream, or [U, H] of the answer rows if the last layer is restricted to them."""
    output = trunk(
        input_ids=batch.input_ids.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        use_cache=False,
        alro_segments=batch.segments,
    )
    return output.last_hidden_state[0]


def _alone(trunk: PreTrainedModel, ids: Any) -> Tensor:
    device = cast(Tensor, trunk.get_input_embeddings().weight).device
    return trunk(input_ids=torch.as_tensor(ids, device=device).unsqueeze(0), use_cache=False).last_hidden_state[0]


def _probe_tree(trunk: PreTrainedModel) -> Tree:
    """Three branches of different lengths behind a prefix of three tokens, two of which share a fourth; ids spread over
    the vocabulary."""
    vocabulary = len(cast(Tensor, trunk.get_input_embeddings().weight))
    spread = [(7 * step * vocabulary) // 101 % vocabulary for step in range(1, 15)]
    prefix, tails = spread[:3], (spread[3:8], spread[8:10], [spread[3], *spread[10:14]])
    return Tree([Branch([*prefix, *tail], 3) for tail in tails], name="of the self-check")


class _evaluating:
    """The module in eval mode (no dropout) for a while, every submodule's mode restored."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = {part: part.training for part in module.modules()}
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        for part, training in self.modes.items():
            part.training = training
