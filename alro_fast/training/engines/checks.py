"""What an engine cannot do, refused before work starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...errors import AlroFastError
from ..batches import Cursor

if TYPE_CHECKING:
    from transformers import Trainer

    from ...options import RankerTrainingArguments

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # set by torchrun, or MPI
# What an engine leaves in a checkpoint that no other does.
MARKS = {"FSDP": "pytorch_model_fsdp*", "DeepSpeed": "global_step*"}


def check_launch(training: RankerTrainingArguments) -> None:
    """AlroFastError where a launcher started fewer processes than it was asked for, or FSDP would give a model to the
    first process alone: every process looks at its base first."""
    if "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ and not any(map(os.environ.get, SIZES)):
        raise AlroFastError(
            "accelerate launch --cpu starts one process, whatever its --num_processes; give --multi_gpu in place of "
            "--cpu, which serves the CPU as well, or launch with torchrun --nproc_per_node"
        )
    if _asks_fsdp(training) and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise AlroFastError(
            "FSDP with cpu_ram_efficient_loading leaves all processes but the first without weights to check; set "
            "fsdp_cpu_ram_efficient_loading: false"
        )


def check_engine(trainer: Trainer, checkpoint: str | None) -> None:
    """AlroFastError where the engine that was asked for is not the one that would train, or cannot train or save this
    run, or go on from its checkpoint."""
    args: Any = trainer.args
    state: Any = trainer.accelerator.state
    engine = engine_of(trainer)
    if _asks_fsdp(args) and args.world_size == 1:
        raise AlroFastError("FSDP shards over processes, and one was launched; leave it out, or launch more")
    if _asks_fsdp(args) and engine != "FSDP":
        raise AlroFastError(
            f"FSDP shards over accelerators, and this run is on {args.device}, where accelerate trains whole models "
            "(DDP); leave --fsdp and use_fsdp out, or run on GPUs"
        )
    if engine == "FSDP" and state.fsdp_plugin.fsdp_version != 2:
        raise AlroFastError("FSDP version 1 keeps the LM head in parts; set fsdp_version: 2 (--fsdp_config version 2)")
    if shards_by_zero(trainer):
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise AlroFastError(
                "ZeRO-3 would save no weights that can be loaded; set zero3_save_16bit_model: true "
                "(stage3_gather_16bit_weights_on_model_save in a file of --deepspeed)"
            )
    if checkpoint is not None:
        check_same_engine(Path(checkpoint), engine, args.world_size)


def check_same_engine(checkpoint: Path, engine: str, processes: int) -> None:
    """AlroFastError where `engine` cannot read a checkpoint, or not with so many processes."""
    written = next((name for name, mark in MARKS.items() if any(checkpoint.glob(mark))), "plain or DDP")
    if written != engine:
        raise AlroFastError(
            f"--resume_from_checkpoint: {checkpoint} was written by {written} training, this run is {engine}; launch "
            "it as before"
        )
    before = Cursor.of(str(checkpoint)).processes
    if engine == "DeepSpeed" and before not in (None, processes):
        raise AlroFastError(
            f"--resume_from_checkpoint: DeepSpeed kept {checkpoint} in {before} parts, and {processes} processes were "
            f"launched; launch {before}"
        )


def engine_of(trainer: Trainer) -> str:
    """FSDP, DeepSpeed, or plain or DDP, which write the same checkpoints."""
    kind = cast(Any, trainer.accelerator).distributed_type.value
    return {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}.get(kind, "plain or DDP")


def shards_weights(trainer: Trainer) -> bool:
    """Whether no process will hold the whole model in training: FSDP2 and ZeRO-3."""
    return engine_of(trainer) == "FSDP" or shards_by_zero(trainer)


def measured_later(trainer: Trainer, use_peft: bool) -> bool:
    """Whether the untuned model is measured after training, its adapter off: where weights are sharded, one device
    might not hold them before. Else it is put on the device now."""
    if shards_weights(trainer):
        return use_peft  # tuned weights cannot be switched off: those are measured before, where they were loaded
    cast(Any, trainer.model).to(trainer.args.device)
    return False


def shards_by_zero(trainer: Trainer) -> bool:
    """Whether ZeRO-3 will."""
    plugin = cast(Any, trainer.accelerator.state).deepspeed_plugin if engine_of(trainer) == "DeepSpeed" else None
    return plugin is not None and plugin.zero_stage == 3


def _asks_fsdp(args: Any) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
