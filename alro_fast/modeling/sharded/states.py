"""Weights before an engine takes them apart, and put together again to be saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.integrations import deepspeed


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models loaded in here have all their weights, also where ZeRO-3 will shard them: they are looked at first.

    transformers would have ZeRO-3 take every weight apart as it is read, and no forward pass before training finds it.
    """
    named = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = None if named is None else named()
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


def trained_weights(model: nn.Module) -> dict[str, Any]:
    """On the first process the state of an FSDP2 model, whole and on the CPU, of an adapter's model the adapter alone;
    on others nothing. All processes must call it."""
    adapter = hasattr(model, "peft_config")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
    return get_model_state_dict(model, options=options)


def held(weight: Tensor) -> Tensor:
    """What this process holds of a weight: under FSDP2 and ZeRO-3 its shard, else all of it."""
    sharded = cast(Any, weight)
    if hasattr(sharded, "ds_tensor"):
        return cast(Tensor, sharded.ds_tensor)
    return cast(Tensor, sharded.to_local()) if hasattr(sharded, "to_local") else weight
