"""What a run says: a plan, one line of progress, a table; or lines of JSON. The same in every stage."""

from __future__ import annotations

import json
import math
import re

import pytest

from alro_fast import train
from alro_fast.training.console import counted, described, print_json, show_example

SMALL = "--max_train_lists 40 --max_test_lists 20 --max_eval_lists 10 --logging_steps 1 --report_to none"


def run(words, tmp_path, capfd):
    train.main([*f"{words} --output_dir {tmp_path / 'run'}".split()])
    return capfd.readouterr()


def test_machines_get_json_alone(tmp_path, capfd):
    said = run(f"{SMALL} --log_json true", tmp_path, capfd)
    events = [json.loads(line) for line in said.out.splitlines()]
    names = [event["event"] for event in events]
    assert names[0] == "plan"
    assert names[-2:] == ["results", "done"]
    steps = [event for event in events if event["event"] == "step"]
    planned = int(events[0]["steps"].split()[0])
    assert [event["step"] for event in steps] == list(range(1, planned + 1))
    assert all(math.isfinite(event["loss"]) for event in steps)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: events[-2][name] for name in results} == results
    assert events[-1]["output_dir"] == str(tmp_path / "run")
    assert "it/s" not in said.err


def test_every_stage_keeps_its_progress_line(tmp_path, capfd):
    words = f"--stages sft,alro --stage_epochs 1,1 {SMALL}"
    said = run(words, tmp_path, capfd)
    assert "{'" not in said.out  # the Trainer's own dictionaries
    bars = [line for line in said.err.replace("\r", "\n").splitlines() if "lists/s" in line and "it" in line]
    assert len({line.split("|")[-1].split()[0] for line in bars}) >= 2
    assert said.out.count("tuned is ") == 2
    assert said.out.count("next: python -m alro_fast.rank --adapter ") == 2
    for noise in ("is_gradient_checkpointing", "fused layers", "Loading weights"):
        assert noise not in said.err + said.out


def test_without_a_bar_every_log_is_a_line(tmp_path, capfd):
    said = run(f"{SMALL} --disable_tqdm true", tmp_path, capfd)
    lines = [line for line in said.out.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/")
    assert " loss " in lines[0]
    assert any("validation loss" in line and "ndcg@3" in line for line in lines)
    assert "it/s" not in said.err


def test_a_plan_and_a_table_fit_80_columns(tmp_path, capfd):
    said = run(SMALL, tmp_path, capfd).out
    table, after = said.split("\nreport: ")
    assert [line for line in table.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    assert "longest list" in table
    assert re.search(r"^steps +\d+ in 1 epoch, up to 4,096 tokens a batch, 1 batch a step$", table, flags=re.M)
    assert after.count("\n") == 3


@pytest.mark.parametrize(
    "number, said", [(1.0, "1 batch"), (1, "1 batch"), (2.5, "2.5 batches"), (12000, "12,000 batches")]
)
def test_things_are_counted(number, said):
    assert counted(number, "batch", "batches") == said


def test_numbers_that_json_does_not_have_are_null(capsys):
    print_json("step", {"loss": math.nan, "each": [math.inf, 1.5], "more": {"a": -math.inf}})
    assert json.loads(capsys.readouterr().out) == {
        "event": "step", "loss": None, "each": [None, 1.5], "more": {"a": None},
    }  # fmt: skip


@pytest.mark.parametrize("more", ["", "--objective dmpo", "--answer ratings"])
def test_a_dry_run_shows_a_prompt_with_its_answer(tmp_path, capfd, more):
    said = run(f"{SMALL} --dry_run true {more}", tmp_path, capfd).out
    shown, answer = said.split("the first prompt of the first training list:\n")[1].split("\nand its answer:\n")
    assert shown.startswith("History : \n ")
    assert "Candidates : \n" in shown
    assert answer.strip().endswith("</s>") or (more == "--answer ratings" and answer.strip() in "12345")
    said = run(f"{SMALL} --dry_run true --log_json true {more}", tmp_path, capfd).out
    example = [json.loads(line) for line in said.splitlines()][-1]
    assert (example["event"], example["answer"]) == ("example", answer.rstrip("\n"))
    assert not (tmp_path / "run").exists()


def test_what_is_no_print_is_escaped(capsys):
    show_example("a\x1b[2Jb\nc", "d\u202e", as_json=False)
    said = capsys.readouterr().out
    assert "a\\x1b[2Jb\nc" in said
    assert "d\\u202e" in said


@pytest.mark.parametrize("logs", [{"train_runtime": 1.0}, {"epoch": 1.0}])
def test_other_logs_are_not_shown(logs):
    assert described(logs) == ""
