"""What a ranking list costs a training step, before any step was taken: c1 rows + c2 visible pairs + c3 answer rows.

The constants are FLOPs of the model's layers (`flops`), those of attention over the rate it reaches, as a share of
large matrix products. They are a function of the model alone: a plan is the same in all processes and in a run that is
repeated, and a run goes on with it on a device of another kind. The last layer counts for answer rows; its keys and
values do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ...modeling.attention import trunk_of
from ...modeling.packing import Extent, visible_pairs
from .flops import linear_flops, linears_of_layers, windows_of

# Measured: attention forward and backward, heads of 64, by csrc/ on one thread of an AMD EPYC with AVX-512, of the rate
# of large float32 products. Other devices have other rates; docs/speed has what that does to batches.
ATTENTION_RATE = 0.6


class Costs(NamedTuple):
    """FLOPs, or what takes as long: of a row of the stream, a visible pair of a layer, an answer row.

    windows: of the layers (`modeling.packing.visible_pairs`).
    """

    row: float
    pair: float
    answer_row: float
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Costs:
        """Of a causal LM as it is trained; experts of a mixture are left out."""
        trunk, head = trunk_of(model), model.get_output_embeddings().weight  # type: ignore[operator]
        config: Any = trunk.config
        *deep, last = [sum(linear_flops(one, True, True) for one in each) for each in linears_of_layers(trunk)]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pair = 12.0 * width * config.num_attention_heads / ATTENTION_RATE
        return cls(sum(deep), pair, last + 2.0 * (2 + head.requires_grad) * head.numel(), tuple(windows_of(config)))

    def of_lists(self, extents: Sequence[Extent], common: np.ndarray) -> list[int]:
        """In MFLOP, at least 1, of each list by what it takes alone, less the rows that a batch takes once.

        common: int64 [rows], their positions.
        """
        shared = Extent(len(common), 0, visible_pairs(common, common[:0], self.windows))
        own = (np.array(extents, dtype=np.float64).reshape(-1, 3) - shared) @ [self.row, self.answer_row, self.pair]
        costs: list[int] = np.maximum(np.rint(own / 1e6), 1).astype(np.int64).tolist()
        return costs
