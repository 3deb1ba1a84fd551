"""What an engine cannot do is one line before a model is trained; a trainer is what `check_engine` asks of one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from alro_fast.errors import AlroFastError
from alro_fast.options import RankerTrainingArguments
from alro_fast.training.batches import CURSOR, Cursor
from alro_fast.training.engines.checks import (
    SIZES,
    check_engine,
    check_launch,
    check_same_engine,
    measured_later,
    shards_weights,
)

GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}


def trainer_of(kind: DistributedType, *, fsdp=False, processes=2, version=2, stage=0, zero=None) -> SimpleNamespace:
    """A trainer as accelerate makes it of these: its kind, and the plugin of that kind."""
    deepspeed = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero or {}})
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version), deepspeed_plugin=deepspeed)
    return SimpleNamespace(
        args=SimpleNamespace(fsdp=fsdp, world_size=processes, device=torch.device("cpu")),
        accelerator=SimpleNamespace(distributed_type=kind, state=state),
        model=torch.nn.Linear(1, 1),
    )


def checkpoint_of(folder, left: str, processes: int):
    (folder / left).mkdir()
    state = {"global_step": 5, "stateful_callbacks": {CURSOR: Cursor(processes=processes, accumulation=1).to_dict()}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"kind": DistributedType.MULTI_CPU, "fsdp": True}, r"FSDP shards over accelerators, and this run is on cpu"),
        ({"kind": DistributedType.NO, "fsdp": True, "processes": 1}, r"FSDP shards over processes, and one was"),
        ({"kind": DistributedType.FSDP, "fsdp": True, "version": 1}, r"FSDP version 1 .* set fsdp_version: 2"),
        ({"kind": DistributedType.DEEPSPEED, "stage": 3}, r"ZeRO-3 would save no .* set zero3_save_16bit_model: true"),
        ({"kind": DistributedType.FSDP, "fsdp": True}, None),
        ({"kind": DistributedType.DEEPSPEED, "stage": 3, "zero": GATHERS}, None),
        ({"kind": DistributedType.DEEPSPEED, "stage": 2}, None),
        ({"kind": DistributedType.MULTI_GPU}, None),
        ({"kind": DistributedType.NO, "processes": 1}, None),
    ],
)
def test_an_engine_that_cannot_train_or_save_is_refused(monkeypatch, made, said):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if said is None:
        check_engine(trainer_of(**made), None)
        return
    with pytest.raises(AlroFastError, match=said):
        check_engine(trainer_of(**made), None)


def test_fsdp_is_asked_for_by_a_launcher_as_well(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(AlroFastError, match="on cpu, where accelerate trains whole models"):
        check_engine(trainer_of(DistributedType.MULTI_CPU), None)


@pytest.mark.parametrize("asked", ["option", "launcher"])
def test_fsdp_that_gives_weights_to_the_first_process_alone_is_refused(monkeypatch, tmp_path, asked):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    training = RankerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    check_launch(training)  # of a run without FSDP
    if asked == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        training.fsdp = True
    with pytest.raises(AlroFastError, match="set fsdp_cpu_ram_efficient_loading: false"):
        check_launch(training)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    check_launch(training)


@pytest.mark.parametrize(
    ("made", "shards"),
    [
        ({"kind": DistributedType.FSDP}, True),
        ({"kind": DistributedType.DEEPSPEED, "stage": 3}, True),
        ({"kind": DistributedType.DEEPSPEED, "stage": 2}, False),
        ({"kind": DistributedType.MULTI_GPU}, False),
    ],
)
def test_an_adapter_over_shards_is_switched_off_after_training(made, shards):
    trainer = trainer_of(**made)
    assert shards_weights(trainer) == measured_later(trainer, use_peft=True) == shards
    assert not measured_later(trainer, use_peft=False)


def test_a_checkpoint_of_another_engine_is_refused_by_the_run(tmp_path):
    checkpoint = checkpoint_of(tmp_path, "pytorch_model_fsdp_0", 2)
    with pytest.raises(AlroFastError, match="was written by FSDP training, this run is plain or DDP; launch it as"):
        check_engine(trainer_of(DistributedType.MULTI_GPU), str(checkpoint))
    check_engine(trainer_of(DistributedType.FSDP), str(checkpoint))


def test_a_launch_of_one_process_in_place_of_several_is_refused(monkeypatch, tmp_path):
    """What `accelerate launch --cpu --num_processes 2` sets for the one process it starts."""
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for name in SIZES:
        monkeypatch.delenv(name, raising=False)
    training = RankerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(AlroFastError, match=r"--cpu starts one process, .* give --multi_gpu in place of --cpu"):
        check_launch(training)
    monkeypatch.setenv("PMI_SIZE", "2")
    check_launch(training)


@pytest.mark.parametrize(
    ("left", "engine", "processes", "said"),
    [
        ("pytorch_model_fsdp_0", "plain or DDP", 2, "was written by FSDP training, this run is plain or DDP"),
        ("optimizer.pt", "FSDP", 2, "was written by plain or DDP training, this run is FSDP"),
        ("global_step5", "FSDP", 2, "was written by DeepSpeed training, this run is FSDP"),
        ("global_step5", "DeepSpeed", 4, "DeepSpeed kept .* in 2 parts, and 4 processes were launched; launch 2"),
        ("global_step5", "DeepSpeed", 2, None),
        ("pytorch_model_fsdp_0", "FSDP", 4, None),
        ("optimizer.pt", "plain or DDP", 1, None),
    ],
)
def test_a_checkpoint_goes_on_under_the_engine_that_wrote_it(tmp_path, left, engine, processes, said):
    checkpoint_of(tmp_path, left, 2)
    if said is None:
        check_same_engine(tmp_path, engine, processes)
        return
    with pytest.raises(AlroFastError, match=said):
        check_same_engine(tmp_path, engine, processes)
