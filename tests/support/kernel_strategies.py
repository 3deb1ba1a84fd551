"""Hypothesis strategies of the kernel tests."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from kernel_cases import Head, head


def examples(count: int) -> settings:
    """The same examples in every run, not shrunk: an interpreted kernel takes long, and every case is small."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )


@st.composite
def heads(draw, *, dtypes=(torch.float32, torch.bfloat16, torch.float16), with_pairs: bool = True) -> Head:
    """Ragged shapes around tile edges, every dtype, with and without bias, soft-cap, scale and pairs, odd strides."""
    made = head(
        draw(st.sampled_from([1, 2, 7, 16, 17, 33])),
        draw(st.sampled_from([1, 8, 32, 45])),
        draw(st.sampled_from([1, 5, 32, 123, 161])),
        draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 4.0])),
        scale=draw(st.sampled_from([1.0, 0.5])),
        pairs=draw(st.sampled_from([0, 1, 6])) if with_pairs else 0,
        seed=draw(st.integers(0, 99)),
    )
    if draw(st.booleans()):  # every other row of a larger tensor, and a transposed weight
        made.hidden = made.hidden.repeat_interleave(2, dim=0)[::2]
        made.weight = made.weight.T.contiguous().T
    return made
