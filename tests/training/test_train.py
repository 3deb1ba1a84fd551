"""The train command end to end on a tiny random base: its files, resumption, and its one-line errors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from places import ROOT
from safetensors.torch import load_file
from tiny import catalogue, random_lists, refused, save_base

from alro_fast import cli, train
from alro_fast.data.lists import open_prepared, write_prepared
from alro_fast.data.records import Signal
from alro_fast.errors import AlroFastError
from alro_fast.modeling import attention
from alro_fast.prompts.template import TEMPLATES
from alro_fast.ranking import reading
from alro_fast.ranking.ranker import Ranker
from alro_fast.training import run, trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, prepared lists, and one finished run over them."""
    folder = tmp_path_factory.mktemp("train")
    save_base(folder / "base")
    lists = random_lists(24, range(3, 6), seed=3, history=3, items=40)
    splits = {"train": lists[:12], "valid": lists[12:16], "test": lists[16:]}
    write_prepared(folder / "data", catalogue(40), splits, {"dataset": "made", "tie_rule": "none needed"})
    train.main(options(folder, "run"))
    return folder


def options(folder, output, *more):
    words = {
        "--model_name_or_path": folder / "base", "--data_dir": folder / "data", "--output_dir": folder / output,
        "--tokens_per_batch": 1200, "--num_train_epochs": 3, "--learning_rate": 0.01, "--lora_r": 4, "--save_steps": 4,
        "--eval_strategy": "epoch", "--use_cpu": True, "--disable_tqdm": True, "--logging_steps": 1,
    }  # fmt: skip
    if {"--max_steps", "--stage_epochs"} & set(map(str, more)):
        del words["--num_train_epochs"]
    if "--use_peft" in more:  # false, wherever it is given here
        del words["--lora_r"]
    return [str(word) for pair in words.items() for word in pair] + [str(word) for word in more]


def with_signals(one):
    past, new = (tuple(2.5 + item.index % 3 for item in items) for items in (one.history, one.candidates))
    return replace(one, hints=new, signals=(Signal("average", past, new),))


@pytest.mark.parametrize("more", [("--objective", "alro"), ("--objective", "sft", "--answer", "ratings")])
def test_the_plan_says_which_signals_are_shown_and_they_reach_the_model(folder, capsys, more):
    train.main(options(folder, "dry", "--dry_run", "true", *more))
    assert "signals" not in capsys.readouterr().out
    data = open_prepared(folder / "data")
    splits = {split: [with_signals(one) for one in data.lists(split)] for split in ("train", "valid", "test")}
    write_prepared(folder / "signals", data.items, splits, {"dataset": "made", "tie_rule": "none needed"})
    more = ("--data_dir", folder / "signals", *more)
    train.main(options(folder, "dry", "--dry_run", "true", *more))
    assert "signals    average beside history; average, hint beside candidates\n" in capsys.readouterr().out
    if "alro" in more:
        plain = folder / "plain.yaml"  # as the demo's, whose scale these ratings do not fit
        plain.write_text((TEMPLATES / "demo.yaml").read_text().replace("scale: [1, 5]", "scale: [0.5, 5]"))
        train.main(options(folder, "dry", "--dry_run", "true", *more, "--template", str(plain)))
        assert "none shown: the lists carry average, hint, the template has no place" in capsys.readouterr().out
        train.main(
            options(folder, "dmpo", "--dry_run", "true", *more[:2], "--objective", "dmpo", "--num_negatives", "2")
        )
        assert "signals    average beside history\n" in capsys.readouterr().out
    train.main(options(folder, "signalled", "--overwrite_output_dir", "true", "--max_steps", "2", *more))
    ranker = Ranker.load(folder / "signalled")
    one = splits["test"][0]
    other = replace(one, hints=one.hints[::-1])
    assert not np.array_equal(ranker.scores([one])[0], ranker.scores([other])[0])


@pytest.mark.parametrize("objective", ["alro", "sft"])
def test_lists_without_a_rating_are_left_out_of_grades(folder, capsys, objective):
    """Those of a first stage whose target was missed: nothing to grade, and still ranked in the closing table."""
    data = open_prepared(folder / "data")
    splits = {split: list(data.lists(split)) for split in ("train", "valid", "test")}
    for lists in splits.values():
        lists[1] = replace(lists[1], ratings=(math.nan,) * len(lists[1].ratings))
    write_prepared(folder / "some-unrated", data.items, splits, {"dataset": "made", "tie_rule": "none needed"})
    more = ("--data_dir", folder / "some-unrated", "--answer", "ratings", "--objective", objective, "--max_steps", "3")
    train.main(options(folder, "grades", "--overwrite_output_dir", "true", *more))
    assert json.loads((folder / "grades" / "results.json").read_text())["about"]["lists"] == len(splits["test"])
    unrated = [replace(one, ratings=(math.nan,) * len(one.ratings)) for one in splits["train"]]
    write_prepared(folder / "unrated", data.items, splits | {"train": unrated}, {"dataset": "made"})
    words = options(folder, "none", "--data_dir", folder / "unrated", "--answer", "ratings", "--objective", objective)
    assert "holds no training list with a rated candidate to grade" in refused(words)


def test_the_run_leaves_everything_it_promises(folder):
    run = folder / "run"
    left = {path.name for path in run.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "identifiers.json",
        "prompt_template.yaml", "data_manifest.json", "config.yaml", "trainer_state.json", "results.json",
        "predictions.jsonl", "run.trec", "qrels.trec",
    } <= left  # fmt: skip
    assert any(name.startswith("checkpoint-") for name in left)
    results = json.loads((run / "results.json").read_text())
    assert {"random", "popularity", "mean_rating", "untuned", "tuned"} <= results.keys()
    assert results["untuned"]["ndcg@3"] != results["tuned"]["ndcg@3"]
    assert yaml.safe_load((run / "config.yaml").read_text())["lora_r"] == 4
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert "ndcg@3" in " ".join(key for entry in history for key in entry)
    card = (run / "README.md").read_text()
    assert str(ROOT) not in card.split("base_model")[0]


def test_the_adapter_is_plain_peft_and_changes_the_scores(folder):
    ranker = Ranker.load(folder / "run", device="cpu")
    assert isinstance(ranker.model, PeftModel)
    lists = random_lists(5, 4, seed=8)
    tuned = ranker.scores(lists)
    with ranker.untuned():
        untuned = ranker.scores(lists)
    assert max(np.abs(a - b).max() for a, b in zip(tuned, untuned)) > 1e-2
    again = Ranker.load(folder / "run", device="cpu").scores(lists)
    np.testing.assert_allclose(np.concatenate(again), np.concatenate(tuned), atol=1e-6, rtol=0)


def test_predictions_are_those_of_the_reloaded_adapter(folder):
    """What the run wrote equals what the saved adapter says, to 1e-6."""
    from alro_fast.data.lists import open_prepared

    lists = open_prepared(folder / "data").lists("test")
    scores = Ranker.load(folder / "run", device="cpu").scores([lists[i] for i in range(len(lists))])
    written = [json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text().splitlines()]
    for row, line in zip(scores, written, strict=True):
        np.testing.assert_allclose(line["rankings"]["tuned"]["scores"], row, atol=1e-6, rtol=0)


def test_a_killed_run_resumes_as_if_nothing_had_happened(folder):
    """SIGKILL after the first checkpoint, then --resume_from_checkpoint: the same adapter and losses, bit for bit."""
    code = "import sys, time; from alro_fast import train; from alro_fast.training import trainer\n" + (
        "step = trainer.RankerTrainer.training_step\n"
        "def slow(self, *given):\n"
        "    time.sleep(0.5 if self.state.global_step >= 5 else 0)\n"
        "    return step(self, *given)\n"
        "trainer.RankerTrainer.training_step = slow\n"
        "train.main(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options(folder, "killed")],
        cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    waited = time.monotonic()
    while not (folder / "killed" / "checkpoint-4" / "trainer_state.json").is_file():
        assert process.poll() is None
        assert time.monotonic() - waited < 240
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed" / "results.json").exists()
    unfinished = folder / "killed" / "checkpoint-8"  # as a kill within its saving would leave it
    shutil.copytree(folder / "killed" / "checkpoint-4", unfinished)
    (unfinished / "trainer_state.json").unlink()
    (unfinished / "optimizer.pt").write_bytes(b"PK")
    train.main(options(folder, "killed", "--resume_from_checkpoint", "true"))
    one, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("run", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    histories = [
        json.loads((folder / name / "trainer_state.json").read_text())["log_history"] for name in ("run", "killed")
    ]
    parts = ("loss", "sft", "soft_lambda", "permutation", "grad_norm", "learning_rate")
    losses = [[[entry[part] for part in parts] for entry in each if "loss" in entry] for each in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 5


def test_a_checkpoint_of_another_configuration_is_refused(folder):
    message = refused(options(folder, "run", "--resume_from_checkpoint", "true", "--alpha", "0.9"))
    assert "was trained with alpha=0.5, this run has alpha=0.9" in message.replace(
        "this run has 0.9", "this run has alpha=0.9"
    )


def test_folders_that_hold_something_are_left_alone(folder):
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.txt").write_text("years of work")
    assert "holds something else than a run of alro_fast" in refused(
        options(folder, "precious", "--overwrite_output_dir", "true")
    )
    assert (folder / "precious" / "thesis.txt").is_file()
    before = sorted(folder.joinpath("run").rglob("*"))
    assert "holds an earlier run" in refused(options(folder, "run"))
    assert sorted(folder.joinpath("run").rglob("*")) == before


@pytest.mark.parametrize(("words", "ranked"), [([], 1200), (["--eval_tokens_per_batch", "700"], 700)])
def test_every_forward_keeps_to_its_tokens(folder, tmp_path, monkeypatch, words, ranked):
    """Training, validation, and the rankings of validation and of the closing table: each within what was given."""
    sizes = {True: [], False: []}
    forward = attention.answer_hidden_states

    def measured(model, packed, *rest, **more):
        sizes[torch.is_grad_enabled()].append(packed.unique_tokens)
        return forward(model, packed, *rest, **more)

    for module in (trainer, reading):
        monkeypatch.setattr(module, "answer_hidden_states", measured)
    train.main(options(folder, tmp_path / "run", "--max_steps", 2, "--save_strategy", "no", *words))
    assert ranked / 2 < max(sizes[False]) <= ranked
    assert max(sizes[True]) <= 1200


def test_dry_run_prints_the_plan_and_writes_nothing(folder, capsys):
    train.main(options(folder, "dry", "--dry_run", "true"))
    plan = capsys.readouterr().out
    for word in ("12 train", "distinct", "shared", "in 3 epochs", "GiB"):
        assert word in plan
    assert "by --max_steps" not in plan
    train.main(options(folder, "dry", "--dry_run", "true", "--max_steps", "2"))
    plan = capsys.readouterr().out
    assert "2 by --max_steps" in plan
    assert "epochs" not in plan
    assert not (folder / "dry").exists()


def test_replacing_a_run_waits_until_everything_is_checked(folder):
    """A mistake loses nothing; a file of somebody else's is never removed; a sound run replaces the old one."""
    shutil.copytree(folder / "run", folder / "old")
    before = {path: path.stat().st_size for path in (folder / "old").rglob("*")}
    replace = ["--overwrite_output_dir", "true", "--max_steps", "2"]
    refused(options(folder, "old", *replace, "--objective", "listnet"))
    refused(options(folder, "old", *replace, "--template", "novels"))
    assert {path: path.stat().st_size for path in (folder / "old").rglob("*")} == before
    (folder / "old" / "notes.txt").write_text("mine")
    assert "holds notes.txt" in refused(options(folder, "old", *replace))
    (folder / "old" / "notes.txt").unlink()
    train.main(options(folder, "old", *replace))
    assert json.loads((folder / "old" / "trainer_state.json").read_text())["global_step"] == 2
    assert not (folder / "old" / "checkpoint-16").exists()


def test_a_checkpoint_of_other_lists_is_refused(folder):
    write_prepared(folder / "others", catalogue(40), {"train": random_lists(9, 4, seed=5, history=3, items=40)})
    more = ["--resume_from_checkpoint", "true", "--data_dir", str(folder / "others")]
    assert "was trained on other lists" in refused(options(folder, "run", *more))


def test_an_output_folder_below_a_file_is_refused(folder):
    place = folder / "base" / "config.json" / "run"
    assert f"output folder {place} cannot be written" in refused(options(folder, place))


def test_no_output_folder_means_the_next_free_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = options(folder, "unused", "--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no")
    at = words.index("--output_dir")
    del words[at : at + 2]
    for name in ("run", "run-2"):
        train.main(words)
        assert (folder / "out" / name / "results.json").is_file()


def test_unrated_candidates_have_no_grade_to_learn(folder):
    """The ratings form over lists with unrated candidates in any place."""
    lists = [
        dataclasses.replace(each, ratings=(math.nan, *each.ratings[1:-1], math.nan))
        for each in random_lists(6, 5, seed=9, history=3, items=40)
    ]
    write_prepared(folder / "unrated", catalogue(40), {"train": lists, "test": lists[:2]})
    more = ["--answer", "ratings", "--max_steps", "2", "--data_dir", str(folder / "unrated"), "--eval_strategy", "no"]
    train.main(options(folder, "graded", *more))
    assert (folder / "graded" / "results.json").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objective", "listnet"], "--objective 'listnet' is unknown; expected one of"),
        (["--learning_rat", "3"], "unknown option '--learning_rat' (did you mean learning_rate?)"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--data_dir", "nowhere"], "nowhere is not a prepared data folder"),
        (["--config", "DATA"], "is not a configuration"),
        (["--template", "novels"], "novels"),
        (["--identifiers", "items"], "--use_peft false"),
        (["--lora_target_modules", "lm_head"], "lm_head"),
        (["--lora_target_modules", "nothing_like_it"], "nothing_like_it"),
        (["--model_name_or_path", "/nonexistent/model"], "--model_name_or_path /nonexistent/model"),
        (["--tokens_per_batch", "50"], "more than --tokens_per_batch 50"),
        (["--resume_from_checkpoint", "true"], "no whole checkpoint in"),
        (["--answer", "essay"], "invalid choice: 'essay'"),
        (["--dataset", "csv", "--data_dir", "NONE"], "prepare it first with: python -m alro_fast.prepare"),
        (["--dataset", "ml-100k", "--raw_dir", "/nowhere", "--data_dir", "NONE"], "--raw_dir /nowhere is not a folder"),
        (["--stages", "sft,alro", "--stage_learning_rates", "0.01,nan"], "--learning_rate is nan"),
        (["--stages", "sft,alro", "--template", "novels"], "novels"),
        (["--sigma", "0"], "--sigma is 0; expected more than 0"),
        (["--permutations", "-1"], "--permutations is -1"),
        (["--max_train_lists", "0"], "--max_train_lists is 0; expected at least 1"),
        (["--num_train_epochs", "-1"], "--num_train_epochs is -1"),
        (["--eval_tokens_per_batch", "50"], "more than --eval_tokens_per_batch 50"),
        (["--raw_dir", "."], "--raw_dir is read when lists are prepared"),
        (["--answer", "ratings", "--score", "prob"], "--score is read with --answer ranking"),
    ],
)
def test_mistakes_get_one_line_before_any_work(folder, more, said):
    more = [str(folder / "data" / "items.parquet") if word == "DATA" else word for word in more]
    words = options(folder, "new/mistake", *more)
    if more[-1] == "NONE":
        at = words.index("--data_dir")
        words = words[:at] + words[at + 2 : -2]
    assert said in refused(words)
    assert not (folder / "new").exists()


def test_a_mistake_leaves_folders_that_were_there(folder):
    (folder / "mine").mkdir()
    refused(options(folder, "mine/run", "--template", "novels"))
    assert not list((folder / "mine").iterdir())
    (folder / "mine" / "run").mkdir()
    refused(options(folder, "mine/run", "--template", "novels"))
    assert (folder / "mine" / "run").is_dir()


def test_the_command_prints_one_line_and_exits_2(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["alro-fast", "train", "--config", "nope"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_full_fine_tuning_with_item_tokens_from_scratch(folder):
    """No base, no adapter: a random model whose identifiers are item tokens; every weight trained and saved."""
    argv = [
        "--model_name_or_path", "scratch", "--use_peft", "false", "--identifiers", "items", "--scratch_hidden_size", 32,
        "--scratch_layers", 1, "--scratch_vocab_size", 300, "--max_steps", 3,
    ]  # fmt: skip
    train.main(options(folder, "scratch", *argv))
    assert (folder / "scratch" / "model.safetensors").is_file()
    ranker = Ranker.load(folder / "scratch", device="cpu")
    lists = random_lists(3, 4, items=40)
    assert all(sorted(ranking.order) == [0, 1, 2, 3] for ranking in ranker.rank(lists))


def test_two_processes_take_the_step_that_one_takes_in_two_parts(folder):
    """torchrun with two processes (gloo) and one process that accumulates twice end with the same adapter."""
    once = [
        "--max_steps",
        1,
        "--tokens_per_batch",
        3600,
        "--optim",
        "sgd",
        "--warmup_steps",
        0,
        "--save_strategy",
        "no",
    ]
    once += ["--eval_strategy", "no", "--learning_rate", 0.5]
    train.main([*options(folder, "one", *once), "--gradient_accumulation_steps", "2"])
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "alro_fast.train",
    ]
    words = [*options(folder, "two", *once)]
    at = words.index("--use_cpu")
    del words[at : at + 2]  # where there is nothing else, it goes without saying
    done = subprocess.run(
        [*launch, *words], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


def test_checkpointing_and_half_precision_train(folder):
    more = ["--gradient_checkpointing", "true", "--bf16", "true", "--dtype", "bfloat16", "--max_steps", "3"]
    train.main(options(folder, "half", *more, "--report_to", "tensorboard", "--eval_strategy", "no"))
    state = json.loads((folder / "half" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert list((folder / "half" / "runs").rglob("events.*"))


def test_lists_of_one_rating_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    """Clicks: nothing to rank, until negatives are given a grade."""
    lists = [replace(one, ratings=(1.0,) * len(one.ratings)) for one in random_lists(6, 4, seed=3, history=2, items=30)]
    write_prepared(tmp_path / "clicks", catalogue(30), {"train": lists[:4], "valid": lists[4:5], "test": lists[5:]})
    monkeypatch.setattr(run, "load_base", lambda *_: pytest.fail("a model was loaded"))
    for objective in ("alro", "sft"):
        words = f"--data_dir {tmp_path / 'clicks'} --model_name_or_path demo --objective {objective}"
        with pytest.raises(AlroFastError, match=r"no training list has .* different ratings.*--ungraded as_zero"):
            train.main([*words.split(), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
