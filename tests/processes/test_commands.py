"""Commands launched as several processes: the files of one, half the work each, one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shared_work
import torch
from places import ROOT
from safetensors.torch import load_file
from tiny import catalogue, make_run, random_lists

from alro_fast.data.lists import write_prepared

SPEED = re.compile("second|runtime|flos|utilisation|epoch|ratio$|share$")
NOT_ALIKE = {"lists_per_second", "peak_memory_gib", "processes"}  # in two evaluations, of however many processes


def launched(count: int, *words, environment=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *words]
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        | (environment or {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with an adapter, lists, and preferences."""
    folder = tmp_path_factory.mktemp("several")
    make_run(folder)
    splits = {"train": random_lists(8, 6, seed=4), "test": random_lists(150, range(4, 9), seed=3)}
    write_prepared(folder / "lists", catalogue(300), splits, {"tie_rule": "seeded hash"})
    rows = [{"prompt": f"{n}:", "chosen": f" N{n}", "rejected": [f" E{n % 9}", f" G{n}" * 9]} for n in range(40)]
    (folder / "movies.json").write_text(json.dumps(rows))
    return folder


def commands(folder: Path, out: Path) -> list[tuple[str, list[str]]]:
    model = ["--adapter", folder / "run", "--device", "cpu"]
    few = ["--token_budget", 1000]
    lists = ["evaluate", *model, "--lists", folder / "lists", "--bootstrap", 50]
    of = {
        "first": [*lists, *few, "--shuffles", 2],
        "greedy": [*lists, *few, "--method", "greedy", "--limit", 60, "--generate"],
        "preferences": ["evaluate", *model, "--preferences", folder / "movies.json", "--token_budget", 200],
    }
    found = [[*words, "--output_dir", out / name] for name, words in of.items()]
    found.append(["rank", *model, "--lists", folder / "lists", "--limit", 128])
    return [(words[0], [str(word) for word in words[1:]]) for words in found]


def test_two_processes_write_what_one_writes_with_half_the_work_each(folder, tmp_path, capsys):
    alone = shared_work.work(commands(folder, tmp_path / "one"))
    said = capsys.readouterr().out
    (tmp_path / "commands.json").write_text(json.dumps(commands(folder, tmp_path / "two")))
    done = launched(2, shared_work.__file__, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [json.loads((tmp_path / f"work-{rank}.json").read_text()) for rank in (0, 1)]
    for (rows, _), *each in zip(alone, *both, strict=True):
        assert sum(one for one, _ in each) == rows  # nothing is computed twice
        assert all(abs(one - rows / 2) <= 0.1 * rows / 2 for one, _ in each), (rows, each)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 10
    for path in files:
        one, two = ((tmp_path / each / path).read_bytes() for each in ("one", "two"))
        if path.name == "results.json":
            one, two = (lasting(json.loads(text)) for text in (one, two))
        assert one == two or path.name == "report.html" or "tables" in path.parts, path
    rankings = [line for line in said.splitlines() if line.startswith("{")]
    assert len(rankings) == 128
    assert [line for line in done.stdout.splitlines() if line.startswith("{")] == rankings


def lasting(value):
    """What does not depend on the clock."""
    if isinstance(value, dict):
        return {key: lasting(each) for key, each in value.items() if key not in NOT_ALIKE}
    return value


def runs(folder: Path, out: Path, accumulation: int) -> list[tuple[str, list[str]]]:
    words = {
        "--model_name_or_path": folder / "base", "--data_dir": folder / "few", "--tokens_per_batch": 1200,
        "--gradient_accumulation_steps": accumulation, "--max_steps": 3, "--lora_r": 4, "--use_cpu": True,
        "--disable_tqdm": True, "--logging_steps": 1, "--save_strategy": "steps", "--save_steps": 1,
        "--save_total_limit": 3,
    }  # fmt: skip
    same = [word for pair in words.items() for word in pair]
    of = {
        "alro": ["--objective", "alro", "--baselines", "none", "--eval_strategy", "steps", "--eval_steps", 1],
        "references": ["--objective", "dmpo", "--precompute_ref_log_probs", True],
        "hardest": ["--objective", "dmpo", "--negatives", "hardest"],
    }
    return [("train", [str(word) for word in [*same, *more, "--output_dir", out / name]]) for name, more in of.items()]


def test_three_processes_train_on_a_split_of_one_list_as_one_does(folder, tmp_path, capsys):
    lists = random_lists(12, range(3, 6), seed=3, history=3, items=40)
    write_prepared(
        folder / "few",
        catalogue(40),
        {"train": lists[:10], "valid": lists[10:11], "test": lists[11:]},
        {"dataset": "made"},
    )
    shared_work.work(runs(folder, tmp_path / "one", 3))
    capsys.readouterr()
    (tmp_path / "commands.json").write_text(json.dumps(runs(folder, tmp_path / "three", 1)))
    done = launched(3, shared_work.__file__, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("objective  ") == 3  # each run's plan once
    assert done.stdout.count("everything is in") == 3
    for name in ("alro", "references", "hardest"):
        one, three = (logged(tmp_path / each / name) for each in ("one", "three"))
        assert len(one) == len(three) >= 4
        for line, other in zip(one, three):
            assert {key: line[key] for key in other} == pytest.approx(other, rel=1e-4, abs=1e-5), name
    one, three = (load_file(tmp_path / each / "references" / "reference.safetensors") for each in ("one", "three"))
    assert torch.equal(one["log_probs"], three["log_probs"])
    mined = "hardest/checkpoint-1/mined_negatives.json"  # by the weights as they begin
    assert (tmp_path / "one" / mined).read_bytes() == (tmp_path / "three" / mined).read_bytes()
    one, three = (json.loads((tmp_path / each / "alro" / "predictions.jsonl").read_text()) for each in ("one", "three"))
    assert one["rankings"]["untuned"] == three["rankings"]["untuned"]


def logged(run: Path) -> list[dict[str, float]]:
    """The log but for its speeds, and for the norms and shares that differ with the batches of a last, shared round."""
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in line.items() if not SPEED.search(key)} for line in lines]


def test_a_mistake_in_one_process_is_one_line_and_ends_all(tmp_path):
    done = launched(2, Path(__file__).with_name("one_fails.py"))
    assert done.returncode == 1, done.stderr  # torchrun's own
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: there is no room in process 1"]
    assert "(exitcode: 2) local_rank: 0" in done.stderr  # the first process was told, and said it
    assert done.stdout.splitlines()[-3:] == [
        "all know: job 3 is bad",
        "all know: process 1: ZeroDivisionError: division by zero",
        "all know, before they begin: job 3 is bad",
    ]
