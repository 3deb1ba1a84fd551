"""Checkpoints that would run code, tokens that must not be kept, and two runs that want one folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from tiny import catalogue, random_lists, refused, save_base

from alro_fast import evaluate, train
from alro_fast.data.lists import write_prepared
from alro_fast.errors import AlroFastError
from alro_fast.run_folder import held
from alro_fast.training import checkpoints


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, lists, and a run of four steps with a checkpoint at the second: two are left."""
    folder = tmp_path_factory.mktemp("runs")
    save_base(folder / "base", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    lists = random_lists(8, 4, seed=3, history=2, items=60)
    write_prepared(folder / "data", catalogue(60), {"train": lists})
    train.main([*words(folder), "--output_dir", str(folder / "run"), "--hub_token", "hf_secret"])
    return folder


def words(folder) -> list[str]:
    given = "--max_steps 4 --save_strategy steps --save_steps 2 --save_total_limit 9 --disable_tqdm true --use_cpu true"
    return ["--model_name_or_path", str(folder / "base"), "--data_dir", str(folder / "data"), *given.split()]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_would_run_code_is_refused(place, tmp_path, monkeypatch, name):
    run, owned = tmp_path / "run", tmp_path / "owned"
    shutil.copytree(place / "run", run)
    torch.save({"state": Bomb(owned)}, run / "checkpoint-2" / name)
    again = [*words(place), "--output_dir", str(run), "--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert f"{name} would run code ({os.mkdir.__module__}.mkdir)" in refused(again)
    assert not owned.exists()
    monkeypatch.setattr(checkpoints, "_calls", lambda path: None)  # transformers would not have run it either
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        train.main(again)
    assert not owned.exists()


def test_the_same_checkpoint_without_it_goes_on(place, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    (run / "trainer_state.json").unlink()
    train.main([*words(place), "--output_dir", str(run), "--resume_from_checkpoint", str(run / "checkpoint-2")])
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 4


def test_the_token_of_the_hub_is_in_no_file(place):
    files = [path for path in (place / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"hf_secret" in path.read_bytes() or path.name == "training_args.bin"]


def test_the_token_is_not_in_what_is_pickled_for_a_moment(place, tmp_path, monkeypatch):
    seen, save = [], torch.save

    def watched(what, *where):
        seen.append(getattr(what, "hub_token", "no options"))
        save(what, *where)

    monkeypatch.setattr(torch, "save", watched)
    train.main([*words(place), "--output_dir", str(tmp_path / "run"), "--hub_token", "hf_secret"])
    assert None in seen
    assert "hf_secret" not in seen


def test_two_runs_do_not_share_a_folder(place, tmp_path):
    run = tmp_path / "run"
    with held(run):
        for more in ("", "--dry_run true", "--resume_from_checkpoint auto", "--overwrite_output_dir true"):
            assert f"another process is at work in {run}" in refused(
                [*words(place), "--output_dir", run, *more.split()]
            )
        assert not list(run.iterdir())
    assert not run.exists()  # made for it, and left empty
    with held(run), pytest.raises(AlroFastError, match="another process is at work"):
        evaluate.main(f"--adapter {place / 'run'} --lists {place / 'data'} --split train --output_dir {run}".split())


def test_a_run_that_is_refused_leaves_its_folder_free(place, tmp_path):
    run = tmp_path / "a" / "run"
    assert "--lora_target_modules x" in refused([*words(place), "--output_dir", run, "--lora_target_modules", "x"])
    assert not run.parent.exists()
    with held(run):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    folder = tmp_path / "run"
    code = "import sys, pathlib; from alro_fast.run_folder import held\nwith held(pathlib.Path(sys.argv[1])): "
    code += "print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(AlroFastError, match="another process is at work"), held(folder):
            pass
        assert folder.is_dir()  # which the other has made
        other.kill()
        other.wait()
    with held(folder):
        pass
