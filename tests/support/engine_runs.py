"""What every process of a test of engines does: `engine_runs.py JOBS.json`, under torchrun or accelerate launch.

JOBS.json: a list of command lines of `alro_fast.train`, run one after the other; "marks" checks that all of a sharded
adapter comes back from a checkpoint, with the trainer of the run before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import accelerate.state
import torch
from accelerate.utils import DistributedType, load_fsdp_model, save_fsdp_model
from torch import distributed as dist

from alro_fast import train
from alro_fast.training import run


class _WithCPU:
    """Kinds of distribution, as accelerate knows them, with processes on the CPU among those that FSDP shards over."""

    MULTI_NEURON = DistributedType.MULTI_CPU

    def __getattr__(self, name):
        return getattr(DistributedType, name)


def marks(trainer, folder: Path) -> None:
    """Every process marks its slices of the adapter, saves, wipes, loads: its own marks are back, and nobody else's."""
    plugin, shards = trainer.accelerator.state.fsdp_plugin, []
    for number, (name, parameter) in enumerate(trainer.model.named_parameters()):
        if parameter.requires_grad:
            local = parameter.to_local().detach()
            local.copy_(1000 * (dist.get_rank() + 1) + number + torch.linspace(0, 0.5, local.numel()).view_as(local))
            shards.append((name, local, local.clone()))
    assert len(shards) > 10
    save_fsdp_model(plugin, trainer.accelerator, trainer.model, str(folder), adapter_only=True)
    for _, local, _ in shards:
        local.zero_()
    load_fsdp_model(plugin, trainer.accelerator, trainer.model, str(folder), adapter_only=True)
    for name, local, marked in shards:
        assert torch.equal(local, marked), name
    sliced = torch.tensor([local.numel() for _, local, _ in shards])
    dist.all_reduce(sliced)
    whole = torch.tensor([p.numel() for p in trainer.model.parameters() if p.requires_grad])
    assert torch.equal(sliced, whole)


def main() -> None:
    if os.environ.get("ENGINE_DUMP"):
        import faulthandler
        faulthandler.dump_traceback_later(float(os.environ["ENGINE_DUMP"]), exit=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        accelerate.state.DistributedType = _WithCPU()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # compiled at first use, in a minute
    made = []

    class Watched(run.RankerTrainer):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            made.append(self)

    run.RankerTrainer = Watched
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job == "marks":
            marks(made[-1], Path(sys.argv[1]).parent / "marked")
        else:
            train.main(job)


if __name__ == "__main__":
    main()
