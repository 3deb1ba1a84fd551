"""What a ranking list costs a training step, before any step was taken: c1 rows + c2 visible pairs + c3 answer rows.

The constants are FLOPs of the model's layers (`flops`) over the rate at which a device does each kind, as a share of
its large matrix products. They are a function of the model and the kind of device alone, so that a plan is the same in
all processes, in a run that goes on, and in one that is repeated. The last layer counts for answer rows; its keys and
values do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ...modeling.attention import trunk_of
from .flops import linear_flops, linears_of_layers

# Measured: attention forward and backward, heads of 64, by csrc/ on one thread of an AMD EPYC with AVX-512, of the rate
# of large float32 products. No GPU was measured: there FLOPs count alike.
ATTENTION_RATE = {"cpu": 0.6}


class Costs(NamedTuple):
    """FLOPs, or what takes as long: of a row of the stream, a visible pair in all layers, an answer row."""

    row: float
    pair: float
    answer_row: float

    @classmethod
    def of(cls, model: nn.Module, device: str) -> Costs:
        """Of a causal LM as it is trained on a kind of device, "cpu" or "cuda"; experts of a mixture are left out."""
        trunk, head = trunk_of(model), model.get_output_embeddings().weight  # type: ignore[operator]
        config: Any = trunk.config
        *deep, last = [sum(linear_flops(one, True, True) for one in each) for each in linears_of_layers(trunk)]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pair = 12.0 * width * config.num_attention_heads * len(deep)
        pair /= ATTENTION_RATE.get(device, 1.0)
        return cls(sum(deep), pair, last + 2.0 * (2 + head.requires_grad) * head.numel())

    def of_lists(self, rows: Sequence[int], pairs: Sequence[int], answer_rows: Sequence[int], common: int) -> list[int]:
        """In MFLOP, of each list by what it takes alone, less the `common` rows that a batch takes once."""
        own = self.row * (np.asarray(rows, dtype=np.float64) - common)
        own += self.pair * (np.asarray(pairs, dtype=np.float64) - common * (common + 1) / 2)
        own += self.answer_row * np.asarray(answer_rows, dtype=np.float64)
        costs: list[int] = np.maximum(np.rint(own / 1e6), 1).astype(np.int64).tolist()
        return costs
