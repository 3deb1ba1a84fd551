"""DDP, FSDP2, ZeRO-2 and ZeRO-3 by the configurations that are shipped: N processes train what one does, and go on."""

from __future__ import annotations

import importlib.util
import json

import pytest
from launched.engine_runs import launch
from safetensors.torch import load_file
from tiny import byte_tokenizer, catalogue, random_lists, save_base

from alro_fast import train
from alro_fast.data.lists import write_prepared

NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed, which is not here"
)
STEPS = 5  # of one epoch; its end has rules of its own
BATCHES = 4  # a step, over processes and accumulation
LORA = ["--lora_r", 4, "--save_strategy", "steps", "--save_steps", 3, "--eval_strategy", "steps", "--eval_steps", 5]
LORA += ["--baselines", "none"]
QUIET = ["--eval_strategy", "no", "--save_strategy", "no"]
RUNS = {  # name: what a run adds to COMMON
    "lora": ["--max_steps", STEPS, *LORA],
    "whole": ["--use_peft", "false", "--max_steps", STEPS, "--baselines", "none", *QUIET],
    "hardest": ["--objective", "dmpo", "--negatives", "hardest", "--max_steps", 3, *QUIET],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, lists, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("engines")
    save_base(folder / "base", byte_tokenizer())
    lists = random_lists(56, range(3, 6), seed=3, history=2, items=40)
    splits = {"train": lists[:48], "valid": lists[48:52], "test": lists[52:]}
    write_prepared(folder / "data", catalogue(40), splits, {"dataset": "made", "tie_rule": "none needed"})
    for name in RUNS:
        train.main([*map(str, command(folder, "one", name)), "--use_cpu", "true"])
    return folder


def command(folder, engine, name, processes=1, output=None):
    words = ["--model_name_or_path", folder / "base", "--data_dir", folder / "data", "--disable_tqdm", "true"]
    words += ["--tokens_per_batch", 900, "--learning_rate", 0.003, "--logging_steps", 1]
    words += ["--gradient_accumulation_steps", BATCHES // processes]
    if engine == "ddp":  # which then fails where a trained weight had no part in a step
        words += ["--ddp_find_unused_parameters", "false"]
    return [*words, *RUNS[name], "--output_dir", folder / engine / (output or name)]


def resumed(folder, engine, processes):
    """The first run again, from its checkpoint."""
    words = command(folder, engine, "lora", processes, output=f"resumed by {processes}")
    return [*words, "--resume_from_checkpoint", folder / engine / "lora" / "checkpoint-3"]


def weights(folder):
    file = folder / "adapter_model.safetensors"
    return load_file(file if file.is_file() else folder / "model.safetensors")


def difference(one, other):
    """The largest of any weight, of those that differ from where they began."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert max(value.abs().max() for value in one.values()) > 0.1
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        ("ddp", 2),
        ("fsdp2", 2),
        pytest.param("zero2", 2, marks=NEEDS_DEEPSPEED),
        pytest.param("zero3", 2, marks=NEEDS_DEEPSPEED),
    ],
)
def test_several_processes_train_what_one_does(folder, engine, processes):
    here = folder / engine
    here.mkdir()
    jobs = [command(folder, engine, name, processes) for name in RUNS]
    jobs = [jobs[0], resumed(folder, engine, processes), *(["marks"] if engine == "fsdp2" else []), *jobs[1:]]
    launch(engine, processes, jobs, here)
    if engine == "fsdp2":
        launch(engine, 4, [resumed(folder, engine, 4)], here)
    found = {name: difference(here / name, folder / "one" / name) for name in RUNS}
    again = [at.name for at in here.glob("resumed*")]
    found |= {name: difference(here / name, here / "lora") for name in again}
    print(f"{engine}, {processes} processes:", ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    assert max(found[name] for name in RUNS) <= 1e-5, found
    assert max(found[name] for name in again) <= 1e-6, found
    assert len(again) == 1 + (engine == "fsdp2")
    one, several = (json.loads((at / "lora" / "results.json").read_text()) for at in (folder / "one", here))
    for ranker in ("untuned", "tuned"):
        measured = {name: value for name, value in one[ranker].items() if isinstance(value, float)}
        assert measured == pytest.approx({name: several[ranker][name] for name in measured}, abs=1e-6)
