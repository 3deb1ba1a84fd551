"""Checkpoints that a kill left in parts are found out before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from alro_fast.errors import AlroFastError
from alro_fast.training.checkpoints import find_checkpoint, newest_checkpoint
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
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        save_file({"weight": torch.ones(64, 64)}, checkpoint / "adapter_model.safetensors")
        torch.save({"state": torch.ones(64, 64)}, checkpoint / "optimizer.pt")
    (tmp_path / "checkpoint-old").mkdir()
    return tmp_path


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
