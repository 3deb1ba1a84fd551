"""Floating-point operations that a training step needs, by the model's own layers.

    trunk      forward: 2 a row and weight of every linear layer, LoRA's matrices included. As many for the gradient of
               the layer's input where anything before it is trained, and for its weights where they are. The last layer
               counts the answer rows, but for its keys and values.
    attention  forward: 2 (width of keys + width of values) for every head of a visible pair (query, key); gradients:
               twice that, in layers where anything is trained or anything before them
    head       2 H V a row; as many for the gradient of the rows, and again where the head is trained

What is needed counts, not what runs: neither what is computed twice (checkpointed layers, scores of attention in its
backward pass, the last layer's first pass) nor norms, activations and rotations. A head that skips improbable columns
runs fewer. Which rows a layer takes and which gradients it needs is seen in a forward and backward pass of the model as
it is trained (`Observer`), so no architecture is known by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ...modeling.attention import trunk_of
from ...modeling.packing import PackedBatch, pairs_of_layers

logger = logging.getLogger(__name__)


class Work(NamedTuple):
    """What a forward pass goes over; sums of several are sums of their fields."""

    stream_rows: int = 0  # distinct tokens
    answer_rows: int = 0  # those that predict an answer's token
    pairs: tuple[int, ...] = ()  # visible (query, key), of each layer

    @classmethod
    def of(cls, packed: PackedBatch, config: Any) -> Work:
        """Of one packed batch on the CPU, for the trunk of a model with this configuration."""
        positions, answering = packed.position_ids.numpy(), packed.segments.distinct_rows.numpy()
        pairs = pairs_of_layers(positions, positions[answering], windows_of(config))
        return cls(len(positions), len(answering), tuple(pairs))

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        pairs = (mine + others for mine, others in zip_longest(self.pairs, other.pairs, fillvalue=0))
        return Work(self.stream_rows + other.stream_rows, self.answer_rows + other.answer_rows, tuple(pairs))


class Flops(NamedTuple):
    """By part of the step."""

    trunk: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    def __add__(self, other: Flops) -> Flops:  # type: ignore[override]
        return Flops(*(mine + others for mine, others in zip(self, other)))

    def __sub__(self, other: Flops) -> Flops:
        return Flops(*(mine - others for mine, others in zip(self, other)))

    @property
    def total(self) -> float:
        return self.trunk + self.attention + self.head


class Prices(NamedTuple):
    """FLOPs of a unit of `Work`."""

    stream_rows: float  # in the trunk
    answer_rows: float  # in the trunk's last layer
    pairs: tuple[float, ...]  # of each layer
    head_rows: float  # of an answer row in the head

    def of(self, work: Work) -> Flops:
        return Flops(
            self.stream_rows * work.stream_rows + self.answer_rows * work.answer_rows,
            sum(price * pairs for price, pairs in zip(self.pairs, work.pairs)),
            self.head_rows * work.answer_rows,
        )


class Observer:
    """Watches one forward and backward pass of a causal LM on tree attention, for `prices`.

    Attributes:
        unknown: why nothing can be said of this model, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.trunk = trunk_of(model)
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.layers = layers_of(self.trunk)
        self.linears = {linear: n for n, layer in enumerate(linears_of_layers(self.trunk)) for linear in layer}
        self.calls: list[_Call] = []
        of_linears = {id(weight) for linear in self.linears for weight in linear.parameters()}
        others = [
            name for layer in self.layers for name, weight in layer.named_parameters()
            if weight.dim() > 1 and id(weight) not in of_linears
        ]  # fmt: skip
        self.unknown = f"{others[0]} is no weight of a linear layer" if others else None
        self._handles: list[Any] = []
        self._again = False

    @contextmanager
    def watching(self, packed: PackedBatch) -> Iterator[None]:
        """While this lasts the trunk runs once, with gradients; the backward pass may follow later.

        A layer that runs without gradients is checkpointed with reentry: it runs again, with them, in the backward
        pass, and is seen there, up to `end`.
        """
        stream, answers = len(packed.input_ids), len(packed.segments.distinct_rows)
        before = _trained_before(self.trunk, self.layers)
        self._handles = [
            linear.register_forward_hook(self._seen(stream, answers, before[n])) for linear, n in self.linears.items()
        ]
        try:
            yield
        finally:
            if not self._again:
                self.end()

    def end(self) -> None:
        """The backward pass is over, or will not come."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _seen(self, stream: int, answers: int, before: bool) -> Any:
        def hook(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                self._again = True
                return
            rows = output.numel() // output.shape[-1]
            if rows not in (stream, answers):
                self.unknown = f"a {type(linear).__name__} takes {rows} of {stream} rows"
            needs, trains = (x.requires_grad and (before or _of_parameters(x)) for x in (args[0], output))
            call = _Call(linear, rows == stream, needs, trains, bool(output.requires_grad))
            if output.requires_grad:
                output.register_hook(call.reach)  # type: ignore[no-untyped-call]
            self.calls.append(call)

        return hook

    def prices(self, gradients: bool) -> Prices:
        """With gradients: of a forward and a backward pass; without: of a forward pass alone."""
        of_rows = {True: 0.0, False: 0.0}
        for call in self.calls:
            if call.wanted:
                of_rows[call.whole_stream] += linear_flops(call.linear, call.input_needs, gradients)
        config: Any = self.trunk.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        trained = {id(call.linear) for call in self.calls if call.trains}
        pairs = tuple(
            4.0 * width * config.num_attention_heads
            * (3 if gradients and any(id(linear) in trained for linear in _linears(layer)) else 1)
            for layer in self.layers
        )  # fmt: skip
        weight = self.head.weight
        products = 2 + weight.requires_grad if gradients else 1
        return Prices(of_rows[True], of_rows[False], pairs, 2.0 * products * weight.numel())


class _Call:
    """One call of a linear layer: whether its input depends on what is trained, and its output, and whether anything
    depends on what it gave."""

    def __init__(
        self, linear: nn.Module, whole_stream: bool, input_needs: bool, trains: bool, output_needs: bool
    ) -> None:
        self.linear, self.whole_stream = linear, whole_stream
        self.input_needs, self.trains, self.output_needs, self.reached = input_needs, trains, output_needs, False

    def reach(self, grad: Tensor) -> None:
        self.reached = True

    @property
    def wanted(self) -> bool:
        """Where gradients tell, by them: the last layer's first pass has queries that nobody reads."""
        return self.reached or not self.output_needs


def _trained_before(trunk: nn.Module, layers: list[nn.Module]) -> list[bool]:
    """Of each layer, whether any weight before it is trained; weights are registered in their order."""
    first = {id(next(layer.parameters())): n for n, layer in enumerate(layers)}
    found, trained = [False] * len(layers), False
    for weight in trunk.parameters():
        if id(weight) in first:
            found[first[id(weight)]] = trained
        trained = trained or weight.requires_grad
    return found


def _of_parameters(result: Tensor) -> bool:
    """Whether a weight is among what a tensor was computed from. Checkpointing has embeddings require gradients, and
    with reentry what layers take, that are no weights."""
    todo: list[Any] = [result.grad_fn]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        following = {each for each, _ in getattr(node, "next_functions", ()) if each is not None} - seen
        seen |= following
        todo += following
    return False


def layers_of(trunk: nn.Module) -> list[nn.Module]:
    """A decoder's layers, first to last."""
    return [part for part in trunk.modules() if isinstance(part, GradientCheckpointingLayer)]


def linears_of_layers(trunk: nn.Module) -> list[list[nn.Module]]:
    """The linear layers of each of them."""
    return [_linears(layer) for layer in layers_of(trunk)]


def _linears(layer: nn.Module) -> list[nn.Module]:
    """The linear layers below a module, adapters with what they adapt as one."""
    found: list[nn.Module] = []
    for child in layer.children():
        found += [child] if _shape(child) is not None else _linears(child)
    return found


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, adapted, quantised or transposed as it may be."""
    names = ("in_features", "out_features") if hasattr(module, "in_features") else ("nx", "nf")
    sizes = [getattr(module, name, None) for name in names]
    return (sizes[0], sizes[1]) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def linear_flops(linear: Any, input_needs: bool, gradients: bool) -> float:
    """A row's, of a linear layer and its active adapters."""
    width, out = _shape(linear)  # type: ignore[misc]
    base = getattr(linear, "base_layer", linear)
    products = [(width * out, base.weight.requires_grad, input_needs)]
    adapters = getattr(linear, "active_adapters", [])
    for name in adapters if not getattr(linear, "disable_adapters", False) else []:
        if name in getattr(linear, "lora_A", {}):
            trained = linear.lora_A[name].weight.requires_grad
            rank = linear.lora_A[name].weight.shape[0]
            products += [(width * rank, trained, input_needs), (rank * out, trained, trained or input_needs)]
    return sum(2.0 * size * (1 + (trains + needs if gradients else 0)) for size, trains, needs in products)


def windows_of(config: Any) -> list[int | None]:
    """Per layer, how many keys back its queries see, themselves included; None: all."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        uses = getattr(config, "use_sliding_window", True)
        return [window if uses else None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def trunk_config(model: nn.Module) -> Any:
    """Of the decoder below the head."""
    trunk: PreTrainedModel = trunk_of(model)
    return trunk.config
