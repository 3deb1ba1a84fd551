"""Runs under the engines of `alro_fast/recipes/distributed`, on the CPU, in processes that share one import of torch.

`launch(engine, processes, jobs, folder)` gives every process the environment that `accelerate launch --config_file`
would give it. A job is a command line of `alro_fast.train`, or "marks": all of a sharded adapter comes back from a
checkpoint.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

from places import ROOT

RECIPES = ROOT / "alro_fast" / "recipes" / "distributed"
PRELOAD = [
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "alro_fast.train",
    "alro_fast.training.kinds",
    "launched.engine_runs",
]
SECONDS = 240  # after which processes that wait for each other are ended


def launch(engine: str, processes: int, jobs: list, folder: Path) -> None:
    """Run the jobs one after the other in each process; AssertionError, with what a process printed, if one fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    environment = environment_of(engine, processes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(target=_work, args=(environment, rank, processes, port, jobs, folder))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    ends = time.monotonic() + SECONDS
    while any(process.is_alive() for process in started) and time.monotonic() < ends:
        if any(process.exitcode for process in started):
            ends = min(ends, time.monotonic() + 10)
        time.sleep(0.05)
    said = [(process.exitcode, (folder / f"rank-{rank}.txt").read_text()) for rank, process in enumerate(started)]
    for process in started:
        process.kill()
        process.join()
    assert [code for code, _ in said] == [0] * processes, "\n".join(text[-3000:] for _, text in said)


def environment_of(engine: str, processes: int) -> dict[str, str]:
    """What accelerate's launcher adds to the environment of every process."""
    from accelerate.commands import launch as launcher
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(RECIPES / f"{engine}.yaml"), "--num_processes", str(processes), "script.py"]
    args, defaults, _ = launcher._validate_launch_command(launcher.launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {key: value for key, value in found.items() if os.environ.get(key) != value}


def _work(environment: dict[str, str], rank: int, processes: int, port: int, jobs: list, folder: Path) -> None:
    log = (folder / f"rank-{rank}.txt").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ |= environment | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    try:
        _jobs(jobs, folder)
    except BaseException:
        traceback.print_exc()
        log.flush()
        os._exit(1)
    log.flush()
    os._exit(0)  # without the goodbyes of process groups, which wait for each other


def _jobs(jobs: list, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    from alro_fast import train
    from alro_fast.training import run

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _shard_on_the_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # compiled at first use, in a minute
    made = []

    class Watched(run.RankerTrainer):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            made.append(self)

    run.RankerTrainer = Watched
    for job in jobs:
        if job == "marks":
            marks(made[-1], folder / "marked")
        else:
            train.main([str(word) for word in job])
    sys.stdout.flush()


def _shard_on_the_cpu() -> None:
    """FSDP shards over processes on the CPU, which accelerate's list of devices leaves out."""
    import accelerate.state
    from accelerate.utils import DistributedType

    class WithCPU:
        MULTI_NEURON = DistributedType.MULTI_CPU

        def __getattr__(self, name):
            return getattr(DistributedType, name)

    accelerate.state.DistributedType = WithCPU()


def marks(trainer, folder: Path) -> None:
    """Every process marks its slices of the adapter, saves, wipes, loads: its own marks are back, and nobody else's."""
    import torch
    from accelerate.utils import load_fsdp_model, save_fsdp_model
    from torch import distributed as dist

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
