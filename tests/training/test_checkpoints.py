"""Checkpoints that a kill left in parts are found out before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from alro_fast import train
from alro_fast.errors import AlroFastError
from alro_fast.training.batches import CURSOR, Cursor
from alro_fast.training.checkpoints import damage, find_checkpoint, newest_checkpoint, settle_auto
from alro_fast.training.checks.folders import claim_folder
from alro_fast.training.config import parse


def config(folder: Path, wanted: str = "true"):
    return parse(["--output_dir", str(folder), "--resume_from_checkpoint", wanted, "--use_cpu", "true"])


@pytest.fixture
def run(tmp_path):
    """A run's folder with two whole checkpoints."""
    for step in (4, 12):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "config.yaml").write_text(yaml.safe_dump(config(tmp_path).to_dict()))
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 0.5}))
        save_file({"weight": torch.ones(64, 64)}, checkpoint / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": torch.ones(64, 64)}, checkpoint / name)
    (tmp_path / "checkpoint-old").mkdir()
    return tmp_path


def edit(file: Path, **changes) -> None:
    read, write = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    file.write_text(write(read(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "share", "reason"),
    [
        ("trainer_state.json", None, "it has no trainer_state.json"),
        ("config.yaml", None, "it has no config.yaml"),
        ("trainer_state.json", 0.5, "trainer_state.json is damaged"),
        ("optimizer.pt", 0.9, "optimizer.pt is damaged"),
        ("optimizer.pt", 0, "optimizer.pt is damaged"),
        ("adapter_model.safetensors", 0.9, "adapter_model.safetensors is damaged"),
        ("config.yaml", 0, "config.yaml is damaged"),
        ("optimizer.pt", None, "it has no optimizer.pt"),
        ("scheduler.pt", None, "it has no scheduler.pt"),
        ("rng_state.pth", None, "it has no rng_state.pth"),
        ("adapter_model.safetensors", None, "it has no adapter_model.safetensors"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken(run, capsys, name, share, reason):
    assert find_checkpoint(config(run), run) == str(run / "checkpoint-12")
    file = run / "checkpoint-12" / name
    if share is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert find_checkpoint(config(run), run) == str(run / "checkpoint-4")
    assert capsys.readouterr().out == f"{run / 'checkpoint-12'} is skipped: {reason}\n"
    with pytest.raises(AlroFastError, match=re.escape(f"checkpoint-12 cannot be resumed from: {reason}")):
        find_checkpoint(config(run, str(run / "checkpoint-12")), run)


def test_no_whole_checkpoint_says_so(run):
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink(missing_ok=True)
    with pytest.raises(AlroFastError, match=r"no whole checkpoint in .*; begin anew with --overwrite_output_dir true"):
        find_checkpoint(config(run), run)
    with pytest.raises(AlroFastError, match="checkpoint-3: no such folder; give a checkpoint of a run, or true"):
        find_checkpoint(config(run, str(run / "checkpoint-3")), run)
    shutil.rmtree(run)
    assert newest_checkpoint(run) is None


def test_a_checkpoint_of_several_processes_has_the_random_state_of_each(run):
    newest = run / "checkpoint-12"
    for rank in range(2):
        shutil.copy(newest / "rng_state.pth", newest / f"rng_state_{rank}.pth")
    (newest / "rng_state.pth").unlink()
    cursor = Cursor(0, step=11).advanced(2, 6, 1, "abc")
    edit(newest / "trainer_state.json", stateful_callbacks={CURSOR: cursor.to_dict()})
    assert damage(newest) is None
    (newest / "rng_state_1.pth").unlink()
    assert damage(newest) == "it has no rng_state_1.pth"
    edit(newest / "trainer_state.json", stateful_callbacks={CURSOR: {"epoch": 1}})
    assert damage(newest) == "its trainer_state.json does not say what was trained"


def test_every_shard_of_a_model_is_looked_at(run):
    newest = run / "checkpoint-12"
    edit(newest / "config.yaml", use_peft=False)
    assert damage(newest) == "it has no model.safetensors"
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in shards:
        save_file({name: torch.ones(64, 64)}, newest / name)
    (newest / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: n for n in shards}}))
    assert damage(newest) is None
    whole = (newest / shards[1]).read_bytes()
    (newest / shards[1]).write_bytes(whole[:-100])
    assert damage(newest) == f"{shards[1]} is damaged"
    (newest / shards[1]).unlink()
    assert damage(newest) == f"it has no {shards[1]}"


def test_an_optimiser_state_with_a_hole_is_damaged(run):
    file = run / "checkpoint-12" / "optimizer.pt"
    whole = file.read_bytes()
    file.write_bytes(bytes(200) + whole[200:])
    assert damage(run / "checkpoint-12") == "optimizer.pt is damaged"


def test_fsdp_and_deepspeed_keep_theirs_in_folders(run):
    newest = run / "checkpoint-12"
    for name in ("optimizer.pt", "adapter_model.safetensors"):
        (newest / name).unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (newest / name).mkdir()
        (newest / name / "__0_0.distcp").write_bytes(b"shard")
    assert damage(newest) is None
    (newest / "optimizer_0" / "__0_0.distcp").write_bytes(b"")
    assert damage(newest) == "optimizer_0/__0_0.distcp is damaged"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        shutil.rmtree(newest / name)
    assert damage(newest) == "it has no adapter_model.safetensors"
    (newest / "global_step12").mkdir()
    (newest / "scheduler.pt").unlink()
    assert damage(newest) is None


def test_a_model_alone_cannot_be_resumed_from(run):
    for checkpoint in run.glob("checkpoint-*[0-9]"):
        edit(checkpoint / "config.yaml", save_only_model=True)
    with pytest.raises(AlroFastError, match=r"\(checkpoint-12: it holds the model alone, as --save_only_model true"):
        find_checkpoint(config(run), run)
    with pytest.raises(AlroFastError, match=r"cannot be resumed from: it holds the model alone"):
        find_checkpoint(config(run, str(run / "checkpoint-12")), run)


def test_auto_goes_on_where_it_can(run, tmp_path_factory):
    def settled(folder):
        asked = config(folder, "auto")
        settle_auto(asked, folder)
        return asked.training.resume_from_checkpoint, asked.training.overwrite_output_dir

    assert settled(run) == (True, False)
    assert settled(tmp_path_factory.mktemp("new")) == (None, False)
    for checkpoint in run.glob("checkpoint-*[0-9]"):
        (checkpoint / "trainer_state.json").unlink()
    assert settled(run) == (None, True)  # it broke off before it had saved anything
    save_file({"weight": torch.ones(1)}, run / "adapter_model.safetensors")
    assert settled(run) == (None, False)  # finished: never replaced unasked


def test_an_emptied_config_locks_no_checkpoint_out(run):
    (run / "config.yaml").write_text("")
    with pytest.raises(AlroFastError, match="holds something else than a run of alro_fast"):
        claim_folder(config(run), run)
    edit(run / "checkpoint-4" / "config.yaml", alro_fast_version="0.1.0")
    claim_folder(config(run), run)


def test_a_checkpoint_of_the_version_before_is_resumed_from(run):
    """It recorded all options of all objectives, whatever was read, no answers, and lacks the options since."""
    for step in (4, 12):
        file = run / f"checkpoint-{step}" / "config.yaml"
        edit(file, alro_fast_version="0.1.0", dpo_beta=0.1, hybrid="code", stage_epochs=None, scratch_layers=4)
        edit(file, preference_answer="pairs", do_eval=True)
        options = yaml.safe_load(file.read_text())
        del options["baselines"]
        file.write_text(yaml.safe_dump(options))
    assert find_checkpoint(config(run), run) == str(run / "checkpoint-12")
    edit(run / "checkpoint-12" / "config.yaml", beta=0.7)
    with pytest.raises(AlroFastError, match=r"was trained with beta=0\.7, this run has 0\.1; resume with the same"):
        find_checkpoint(config(run), run)


def test_fewer_processes_go_on_on_the_cpu(run):
    """Several set --use_cpu by themselves where there is no GPU; one finds the CPU without it."""
    edit(run / "checkpoint-12" / "config.yaml", use_cpu=True)
    asked = config(run)
    asked.training.use_cpu = False
    assert find_checkpoint(asked, run) == str(run / "checkpoint-12")


def test_what_a_checkpoint_does_not_record_was_at_its_default(run):
    edit(run / "checkpoint-12" / "config.yaml", weight_decay=0.3)
    with pytest.raises(AlroFastError, match=r"was trained with weight_decay=0\.3, this run has 0\.0;"):
        find_checkpoint(config(run), run)


def test_weights_have_the_mode_of_other_files_and_no_pickle_of_options_is_left(tmp_path):
    """Another account serves what this one trained; the umask decides, not safetensors."""
    before = os.umask(0o027)
    try:
        words = f"--max_train_lists 20 --max_test_lists 4 --max_eval_lists 4 --output_dir {tmp_path / 'run'}"
        train.main(words.split())
    finally:
        os.umask(before)
    weights = sorted((tmp_path / "run").rglob("*.safetensors"))
    assert len(weights) == 2  # the adapter's, and its checkpoint's
    assert {path.stat().st_mode & 0o777 for path in weights} == {0o640}
    assert not list((tmp_path / "run").rglob("training_args.bin"))
