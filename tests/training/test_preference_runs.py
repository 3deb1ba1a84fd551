"""The life of a preference run: replaced, killed and resumed, in several processes, in stages, and begun by mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from places import ROOT
from tiny import refused, save_base

from alro_fast import train
from alro_fast.data.preferences import read_preferences
from alro_fast.errors import AlroFastError
from alro_fast.evaluation.preferences import score_preferences
from alro_fast.evaluation.report import write_report
from alro_fast.modeling.loading import load_for_inference
from alro_fast.prompts.preference import PreferencePrompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and preference files of two domains."""
    folder = tmp_path_factory.mktemp("runs")
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    save_base(folder / "base", **small)
    for name in ("movies", "games"):
        rows = [{"prompt": f"{name} {u}:", "chosen": f" N{u}", "rejected": [f" E{u}", f" G{u}"]} for u in range(4)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def options(folder, output, *more):
    words = {
        "--model_name_or_path": folder / "base", "--preferences": folder / "movies.json", "--objective": "dmpo",
        "--output_dir": folder / output, "--tokens_per_batch": 40, "--max_steps": 2, "--lora_r": 2, "--use_cpu": True,
        "--disable_tqdm": True, "--save_strategy": "no",
    }  # fmt: skip
    if "--use_peft" in more:  # false, wherever it is given here
        del words["--lora_r"]
    return [str(word) for pair in words.items() for word in pair] + [str(word) for word in more]


PRECOMPUTE = ("--precompute_ref_log_probs", "true")


def test_a_replaced_run_leaves_nothing_behind(folder):
    """Old checkpoints and references of other data are gone before anything is written; a mistake loses nothing."""
    save = ("--save_strategy", "steps", "--save_steps", 1)
    train.main(options(folder, "old", *save, *PRECOMPUTE))
    again = options(folder, "old", *PRECOMPUTE, "--overwrite_output_dir", "true", "--max_steps", 1)
    before = sorted((folder / "old").rglob("*"))
    assert (folder / "old" / "checkpoint-2") in before
    refused([*again, "--eval_preferences", folder / "none.json"])
    assert sorted((folder / "old").rglob("*")) == before
    train.main([*again, "--preferences", str(folder / "games.json")])
    assert not list((folder / "old").glob("checkpoint-*"))
    assert json.loads((folder / "old" / "trainer_state.json").read_text())["global_step"] == 1
    assert list((folder / "old").glob("reference.safetensors"))


def test_a_run_killed_before_its_first_step_begins_again(folder):
    """It left its options and references, which may be of other data by now."""
    train.main(options(folder, "whole", *PRECOMPUTE))
    (folder / "killed").mkdir()
    for name in ("config.yaml", "reference.safetensors"):
        shutil.copy(folder / "whole" / name, folder / "killed")
    train.main(options(folder, "killed", *PRECOMPUTE, "--preferences", folder / "games.json"))
    assert (folder / "killed" / "adapter_model.safetensors").is_file()


def test_a_dry_run_computes_no_references(folder, tmp_path):
    kept = tmp_path / "kept" / "references.safetensors"
    train.main(options(folder, tmp_path / "dry", *PRECOMPUTE, "--ref_log_probs", kept, "--dry_run", "true"))
    assert not list(tmp_path.iterdir())


def test_a_process_that_saves_nothing_writes_nothing(folder, monkeypatch):
    run = train.run_for(train.parse(options(folder, "second")))
    monkeypatch.setattr(type(run.training), "should_save", False)
    run.trainer.save_model(str(folder / "second" / "checkpoint-1"))
    assert not list((folder / "second").rglob("README.md"))


def test_two_processes_save_a_checkpoint(folder):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = options(folder, "two", "--save_strategy", "epoch", "--max_steps", 1, *PRECOMPUTE)
    done = subprocess.run(
        [*launch, "-m", "alro_fast.train", *argv], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [checkpoint] = (folder / "two").glob("checkpoint-*")
    assert yaml.safe_load((checkpoint / "config.yaml").read_text())["objective"] == "dmpo"


def test_stages_follow_on_a_merged_base_and_may_move(folder):
    """A third stage begins from the second's merged base; a folder that moved finds the base beside its adapter."""
    staged = ["--stages", "sft,dmpo,dmpo", "--stage_adapter", "merged", "--max_steps", 1]
    train.main(options(folder, "staged", *staged))
    config = yaml.safe_load((folder / "staged" / "3-dmpo" / "config.yaml").read_text())
    assert config["model_name_or_path"] == str(folder / "staged" / "2-dmpo" / "merged_base")
    (folder / "staged").rename(folder / "moved")
    file = folder / "games.json"
    model, tokenizer = load_for_inference(folder / "moved" / "3-dmpo", device="cpu")
    assert len(score_preferences(model, PreferencePrompts(tokenizer), read_preferences(file))) == 4
    assert model.get_base_model().name_or_path == str(folder / "moved" / "3-dmpo" / "merged_base")
    again = ["--init_adapter", folder / "moved" / "2-dmpo", "--overwrite_output_dir", "true", "--max_steps", 1]
    base = ["--model_name_or_path", folder / "moved" / "2-dmpo" / "merged_base"]
    train.main(options(folder, folder / "moved" / "3-dmpo", *again, *base))
    assert not (folder / "moved" / "3-dmpo" / "merged_base").exists()


def test_an_adapter_is_followed_only_over_its_own_base(folder, tmp_path):
    """Another folder of the same name is another base; so is an adapter whose layers differ in rank refused."""
    train.main(options(folder, "first", "--max_steps", 1))
    shutil.copytree(folder / "base", tmp_path / "base")
    follow = options(folder, tmp_path / "next", "--init_adapter", folder / "first")
    assert "was trained over" in refused([*follow, "--model_name_or_path", tmp_path / "base"])
    near = os.path.relpath(folder / "base")
    train.main([*follow, "--model_name_or_path", near, "--dry_run", "true"])
    uneven = tmp_path / "uneven"
    shutil.copytree(folder / "first", uneven)
    config = json.loads((uneven / "adapter_config.json").read_text())
    (uneven / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"q_proj": 8}}))
    assert "has a rank_pattern" in refused(options(folder, tmp_path / "next", "--init_adapter", uneven))
    assert not (tmp_path / "next").exists()


def test_finished_stages_are_resumed_with_their_own_options_and_data(folder, tmp_path):
    """Not with other options, another training file, or another file of the same name to evaluate on."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "movies.json", tmp_path / name / "x.json")
    argv = ["--stages", "sft,dmpo", "--max_steps", 1, "--preferences", tmp_path / "a" / "x.json"]
    argv = options(folder, tmp_path / "out", *argv, "--eval_preferences", tmp_path / "b" / "x.json")
    train.main(argv)
    again = [*argv, "--resume_from_checkpoint", "true"]
    train.main(again)
    assert "was trained with dpo_beta=0.1" in refused([*again, "--dpo_beta", 0.2])
    for name in ("a", "b"):
        shutil.copy(folder / "games.json", tmp_path / name / "x.json")
        assert "was trained on other lists" in refused(again)
        shutil.copy(folder / "movies.json", tmp_path / name / "x.json")


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ({}, ["--stages", "sft,dmpoo"], "--stages names 'dmpoo'"),
        ({}, ["--stages", "sft,dmpo", "--use_peft", "false"], "leaves no reference"),
        ({"rejected": []}, ["--stages", "sft,dmpo"], "row 0 has no rejected answer"),
        ({"chosen": [" A", " B"]}, ["--stages", "sft,dmpo"], "has 2 chosen answers; --dmpo_variant dmpo takes one"),
        ({"chosen": [" A", " B"]}, ["--stages", "dmpo,sft"], "has 2 chosen answers; --dmpo_variant dmpo takes one"),
        ({}, ["--dpo_beta", "0"], "--dpo_beta is 0; expected more than 0"),
        ({}, ["--dpo_beta", "nan"], "--dpo_beta is nan"),
        ({}, ["--ftx", "-1"], "--ftx is -1"),
        ({}, ["--ref_log_probs", "kept.safetensors"], "is read with --precompute_ref_log_probs true"),
        ({}, ["--init_adapter", "anywhere", "--use_peft", "false"], "leave one of them out"),
    ],
)
def test_mistakes_are_found_before_the_first_stage(folder, tmp_path, rows, more, said):
    row = {"prompt": "a", "chosen": " N", "rejected": [" E"]} | rows
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert said in refused(options(folder, tmp_path / "out", "--preferences", tmp_path / "rows.json", *more))
    assert not (tmp_path / "out").exists()


def test_several_positives_have_one_prompt(folder, tmp_path):
    """mult refuses rows that ask about two items each, when the run is built."""
    ask = "Seen: Gold. Which comes first: {} or {}?"
    rows = [
        {"instruction": ask.format(*pair), "input": "", "output": [f"North , {bad}", f"{bad} , North"]}
        for bad, pair in (("Echo", ("North", "Echo")), ("Night", ("Night", "North")))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argv = options(folder, tmp_path / "out", "--preferences", tmp_path / "rows.json", "--dmpo_variant", "mult")
    assert "has a prompt per pair; --dmpo_variant mult" in refused(argv)
    assert not (tmp_path / "out").exists()


def test_the_log_tells_rewards_from_likelihoods(folder, tmp_path):
    """reward_accuracy is against the reference, pair_accuracy of two answers; a report says where the figures are."""
    file = folder / "movies.json"
    argv = ["--eval_preferences", file, "--eval_strategy", "steps", "--eval_steps", 1, "--logging_steps", 1]
    train.main(options(folder, tmp_path / "out", *argv, "--max_steps", 1, "--warmup_steps", 0))
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert logged[0]["reward_accuracy"] == 0  # the model is its own reference before the first step
    assert "eval_reward_accuracy" in logged[1]
    results = json.loads((tmp_path / "out" / "preference_results.json").read_text())
    assert logged[1]["eval_pair_accuracy"] == results["movies"]["tuned"]["pair_accuracy"]
    with pytest.raises(AlroFastError, match=r"its figures are in preference_results\.json"):
        write_report(tmp_path / "out")


def test_several_positives_of_lists_are_no_pairs(folder):
    """The answer form alone decides, before any list is read: a second stage is refused before the first begins."""
    argv = ["--model_name_or_path", folder / "base", "--data_dir", folder / "nowhere", "--stages", "dmpo", "--use_cpu"]
    argv += ["true", "--preference_answer", "pairs", "--dmpo_variant", "mult", "--output_dir", folder / "lists"]
    assert "--preference_answer pairs has a prompt per pair" in refused(argv)
    assert "nowhere is not a prepared data folder" in refused([*argv, "--dmpo_variant", "sdpo"])
