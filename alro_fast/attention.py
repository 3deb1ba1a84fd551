"""Attention over packed trees (`alro_fast.packing`) for the decoders of transformers.

`use_tree_attention(model)` puts a loaded model on the attention implementation "alro_tree";
`tree_hidden_states(model, batch)` runs its trunk once over the packed stream and returns the rows answers are read
from.
The layout of the stream travels with the forward as a keyword argument of the model, which every decoder layer hands to
the attention function: no patch per architecture, and LoRA and gradient checkpointing see nothing unusual.

Three bodies compute the same sums:

- *cascade* (CPU): the prefix and the first branch in one causal call; every other branch twice, against the prefix (no
  mask) and against itself (causal), the two merged by their log-sum-exps. With O, L the merged output and log-sum-exp,
  P_ij = exp(s_ij - L_i) and D_i = dO_i . O_i hold for both parts, so each part's backward runs on (O, L) and the
  gradients add up. No mask is read and no score of a pair that may not see each other is computed.
- *varlen* (CUDA, half precision): keys and values gathered by one index, one FlashAttention call for all branches of
  all trees, len_q <= len_k, causal and aligned at the end.
- *dense* (anything else: sliding windows and soft-capping on the CPU, float32 on CUDA): one masked SDPA call per tree.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from .errors import AlroFastError
from .packing import Branch, PackedBatch, Segments, Tree, TreeSpan, collate

ATTENTION = "alro_tree"
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
    trunk = trunk_of(model)
    if trunk.config._attn_implementation != ATTENTION:
        raise AlroFastError(
            f"the model runs on attention {trunk.config._attn_implementation!r}, in which packed branches see each "
            "other; call alro_fast.attention.use_tree_attention(model) once after loading it"
        )
    return _trunk_rows(trunk, batch).index_select(0, batch.answer_rows)


def use_tree_attention(model: nn.Module) -> nn.Module:
    """Put a loaded model on tree attention, after proving on a small tree that its branches do not see each other.

    Returns the same model. Ordinary forwards (padded batches, `generate`) need the former implementation back:
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
        alone = torch.cat([_alone(trunk, ids)[start - 1 : -1] for ids, start in zip(tree.ids, tree.answer_starts)])
        trunk.set_attn_implementation(ATTENTION)
        try:
            batch = collate([tree], [0]).to(alone.device)
            together = _trunk_rows(trunk, batch).index_select(0, batch.answer_rows)
            error = (together.float() - alone.float()).norm() / alone.float().norm()
            allowed = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 5e-2
            if not error <= allowed:
                raise AlroFastError(
                    f"{type(trunk).__name__} gives other hidden states for a packed tree than for its branches alone "
                    f"(relative difference {error:.2g}, allowed {allowed:g}): its tokens meet outside the attention"
                    " interface"
                )
        except BaseException:
            trunk.set_attn_implementation(former)
            raise
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
        model = model.get_base_model()
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
    alro_segments: Segments | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "alro_tree".

    Args:
        query: [1, heads, T, D]; key, value: [1, kv_heads, T, D], position embeddings applied.
        scaling: factor of the scores, default D**-0.5.
        sliding_window: a query sees positions p with 0 <= its own - p < sliding_window.
        softcap: scores become softcap * tanh(score / softcap).
        alro_segments: the layout of the stream.

    Returns:
        [1, T, heads, D], None. Padding rows get zeros or values that no other row depends on.
    """
    _refuse(module, attention_mask, dropout, alro_segments, unused)
    layout = alro_segments
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest else None
    cap = softcap or None
    same_width = query.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and window is None and cap is None and same_width:
        return _Cascade.apply(query, key, value, layout, scale), None
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and same_width:
        backend = varlen_backend(cap is not None)
        if backend is not None:
            return varlen_attention(backend, query, key, value, layout, scale, window, cap), None
    return dense_attention(query, key, value, layout, scale, window, cap), None


AttentionInterface.register(ATTENTION, tree_attention)


# --- dense: the definition -------------------------------------------------------------------------------------------


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Segments, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One masked call per tree over plain differentiable operations; arguments as `tree_attention`."""
    masks = _masks(layout, window, query)
    lengths = [span.end - span.start for span in layout.spans]
    padding = layout.num_rows - layout.num_tokens
    parts = zip(*(tensor.split([*lengths, padding], dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_dense_call(*part, mask, scale, softcap) for part, mask in zip(parts, masks)]
    outputs.append(query.new_zeros(1, query.shape[1], padding, value.shape[-1]))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _dense_call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap)) + mask
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


def _masks(layout: Segments, window: int | None, like: Tensor) -> list[Tensor]:
    """Per tree an additive mask [rows, rows]: 0 where the row (query) may see the column (key), else -inf."""
    where = (window, like.dtype, like.device)
    if where not in layout.masks:
        layout.masks[where] = [_mask(span, window, like) for span in layout.spans]
    return layout.masks[where]


def _mask(span: TreeSpan, window: int | None, like: Tensor) -> Tensor:
    branches = torch.arange(len(span.lengths)).repeat_interleave(torch.tensor(span.lengths))
    owner = torch.cat([torch.full((span.prefix,), -1), branches])
    position = torch.cat([torch.arange(span.prefix), *(span.prefix + torch.arange(length) for length in span.lengths)])
    distance = position[:, None] - position[None, :]
    visible = ((owner[None, :] == -1) | (owner[:, None] == owner[None, :])) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    return torch.zeros(visible.shape, dtype=like.dtype).masked_fill_(~visible, -torch.inf).to(like.device)


# --- cascade: the CPU ------------------------------------------------------------------------------------------------

CHUNK = 96  # query rows of a causal call: torch's CPU kernel skips no key of a block of 512, smaller chunks waste fewer

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Rows(NamedTuple):
    """Rows `low:high` of each of `count` runs of `length` rows, the first run at row `start` of the stream."""

    start: int
    count: int
    length: int
    low: int
    high: int

    def of(self, tensor: Tensor) -> Tensor:
        """[1, heads, T, D] -> the view [count, heads, high - low, D]."""
        if self.count == 1:
            return tensor[:, :, self.start + self.low : self.start + self.high]
        runs = tensor[0, :, self.start : self.start + self.count * self.length].unflatten(1, (self.count, self.length))
        return runs[:, :, self.low : self.high].transpose(0, 1)


class _Call(NamedTuple):
    """One kernel call: which queries on which keys, in which order."""

    queries: _Rows
    keys: _Rows
    causal: bool
    mask: Tensor | None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The output of `queries` over `keys` alone, and its log-sum-exp with a last axis of 1."""
        out, lse = _flash(
            self.queries.of(query),
            self.keys.of(key),
            self.keys.of(value),
            is_causal=self.causal,
            attn_mask=self.mask,
            scale=scale,
        )
        return out, lse.unsqueeze(-1)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What this call adds to the gradients of its queries, keys and values; out, lse: over all keys of a query."""
        return _flash_backward(
            self.queries.of(grad),
            self.queries.of(query),
            self.keys.of(key),
            self.keys.of(value),
            self.queries.of(out),
            self.queries.of(lse).squeeze(-1),
            0.0,
            self.causal,
            attn_mask=self.mask,
            scale=scale,
        )


def _calls(layout: Segments, dtype: torch.dtype) -> tuple[list[_Call], list[_Call]]:
    """The calls that write a row's output first, and the calls that are merged into what a row already has."""
    where = ("cascade", dtype)
    if where not in layout.masks:
        corner = torch.full((CHUNK, layout.longest), -torch.inf, dtype=dtype).triu(layout.longest - CHUNK + 1)
        first, second = [], []
        for span in layout.spans:
            row = span.start
            for count, length in _runs((span.prefix + span.lengths[0], *span.lengths[1:])):
                first += _causal_calls(row, count, length, corner)
                row += count * length
            head, rows = span.prefix + span.lengths[0], span.end - span.start
            if span.prefix and rows > head:
                prefix = _Rows(span.start, 1, span.prefix, 0, span.prefix)
                second.append(_Call(_Rows(span.start, 1, rows, head, rows), prefix, False, None))
        layout.masks[where] = first, second
    return layout.masks[where]


def _causal_calls(start: int, count: int, length: int, corner: Tensor) -> Iterator[_Call]:
    """Each of `count` runs attends to itself: chunk by chunk, to the keys up to the chunk's end."""
    chunks = -(-length // CHUNK)
    edges = [length * chunk // chunks for chunk in range(chunks + 1)]
    for low, high in itertools.pairwise(edges):
        queries, keys = _Rows(start, count, length, low, high), _Rows(start, count, length, 0, high)
        mask = corner[CHUNK - (high - low) :, corner.shape[1] - high :] if low else None
        yield _Call(queries, keys, not low, mask)


def _runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Neighbours of equal length as (how many, length), empty ones left out."""
    for length, run in itertools.groupby(lengths):
        if length:
            yield len(list(run)), length


class _Cascade(torch.autograd.Function):
    """Attention of a packed stream without scores of pairs that may not see each other; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Segments, scale: float) -> Tensor:
        first, second = _calls(layout, query.dtype)
        _, heads, rows, width = query.shape
        out = query.new_zeros(1, rows, heads, width).transpose(1, 2)
        lse = query.new_zeros(1, rows, heads, 1, dtype=torch.promote_types(query.dtype, torch.float32)).transpose(1, 2)
        for call in first:
            part, part_lse = call.forward(query, key, value, scale)
            call.queries.of(out).copy_(part)
            call.queries.of(lse).copy_(part_lse)
        for call in second:
            part, part_lse = call.forward(query, key, value, scale)
            own, own_lse = call.queries.of(out), call.queries.of(lse)
            share = torch.sigmoid(part_lse - own_lse)  # of the part's keys in the softmax over both
            own.lerp_(part, share.to(part.dtype))
            own_lse.copy_(torch.logaddexp(own_lse, part_lse))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for call in itertools.chain(*_calls(ctx.layout, query.dtype)):
            parts = call.backward(grad.transpose(1, 2), query, key, value, out, lse, ctx.scale)
            call.queries.of(grad_query).add_(parts[0])
            call.keys.of(grad_key).add_(parts[1])
            call.keys.of(grad_value).add_(parts[2])
        return grad_query, grad_key, grad_value, None, None


# --- varlen: CUDA ----------------------------------------------------------------------------------------------------

# backend(query [Tq, heads, D], key, value [Tk, kv_heads, D], layout, scale, window, softcap) -> [Tq, heads, D]
VarlenBackend = Callable[[Tensor, Tensor, Tensor, Segments, float, int | None, float | None], Tensor]


def varlen_attention(
    backend: VarlenBackend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """All branches of all trees in one call of a variable-length kernel; arguments as `tree_attention`.

    The first branch of a tree brings the prefix's queries, so its len_q = len_k; the others have only their own queries
    and the keys of prefix and branch. Aligned at the end, causal (and windowed) order is that of the branch alone.
    """
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.kv_index is not None:
        key, value = _Gather.apply(key, layout.kv_index), _Gather.apply(value, layout.kv_index)
    return backend(query, key, value, layout, scale, window, softcap).unsqueeze(0)


class _Gather(torch.autograd.Function):
    """rows.index_select(0, index) whose backward adds in float32: a prefix row's gradient is a sum over branches."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.num_rows, *grad.shape[1:], dtype=wide)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


@functools.cache
def varlen_backend(softcap: bool) -> VarlenBackend | None:
    """The variable-length kernel to use, chosen and logged once; None: there is none for soft-capped scores."""
    if not softcap:
        from torch.nn.attention.varlen import varlen_attn

        name = _activate_newest_flash()
        logger.info("tree attention: torch.nn.attention.varlen (%s)", name)
        return torch_varlen(varlen_attn)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        logger.info("tree attention: the flash-attn package (soft-capped scores)")
        return flash_attn_varlen(flash_attn_varlen_func)
    logger.info("tree attention: dense SDPA per tree (soft-capped scores need the flash-attn package for more)")
    return None


def torch_varlen(varlen_attn: Callable[..., Tensor]) -> VarlenBackend:
    """`torch.nn.attention.varlen.varlen_attn`, whose spelling changed: `enable_gqa` came after torch 2.11.

    Without the flag the kernel takes fewer key heads as they are; with it the flag has to be set.
    """
    extra = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def run(query, key, value, layout, scale, window, softcap):
        assert softcap is None
        return varlen_attn(
            query,
            key,
            value,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **extra,
        )

    return run


def flash_attn_varlen(flash_attn_varlen_func: Callable[..., Tensor]) -> VarlenBackend:
    """`flash_attn_varlen_func` of the flash-attn package (2.6 and later: soft-capping)."""

    def run(query, key, value, layout, scale, window, softcap):
        return flash_attn_varlen_func(
            query,
            key,
            value,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
            softcap=softcap or 0.0,
        )

    return run


def _activate_newest_flash() -> str:
    """Let torch's FlashAttention dispatch to FA3 (Hopper) or FA4 (Blackwell) where its package is installed."""
    from torch.nn import attention

    if current := attention.current_flash_attention_impl():
        return current
    major, _ = torch.cuda.get_device_capability()
    name, package = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}.get(major, (None, ""))
    if name is None or importlib.util.find_spec(package.split(".")[0]) is None:
        return "FlashAttention-2"
    try:
        attention.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        logger.info("tree attention: %s is not usable here (%s)", name, error)
        return "FlashAttention-2"
    return name


# --- checks and the probe --------------------------------------------------------------------------------------------


def _refuse(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, layout: Segments | None, unused: dict[str, Any]
) -> None:
    name = type(module).__name__
    if layout is None:
        raise AlroFastError(
            f"{name} runs on tree attention but was given no packed batch; call tree_hidden_states(model, batch), or "
            'model.set_attn_implementation("sdpa") for ordinary forwards'
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


def _trunk_rows(trunk: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """[T, H] hidden states of the whole stream."""
    output = trunk(
        input_ids=batch.input_ids.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        use_cache=False,
        alro_segments=batch.segments,
    )
    return output.last_hidden_state[0]


def _alone(trunk: PreTrainedModel, ids: Any) -> Tensor:
    device = trunk.get_input_embeddings().weight.device
    return trunk(input_ids=torch.as_tensor(ids, device=device).unsqueeze(0), use_cache=False).last_hidden_state[0]


def _probe_tree(trunk: PreTrainedModel) -> Tree:
    """Three branches of different lengths behind a prefix of three tokens, ids spread over the vocabulary."""
    vocabulary = trunk.get_input_embeddings().weight.shape[0]
    spread = [(7 * step * vocabulary) // 101 % vocabulary for step in range(1, 15)]
    prefix, tails = spread[:3], (spread[3:8], spread[8:10], spread[10:14])
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
