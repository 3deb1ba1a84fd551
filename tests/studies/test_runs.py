"""Runs of a study: begun, left alone, gone on with, failed and interrupted, by processes that only pretend to train;
and a tiny study whose runs really do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from places import ROOT
from tiny import catalogue, random_lists, save_base

from alro_fast import study as command
from alro_fast.data.lists import write_prepared
from alro_fast.errors import AlroFastError
from alro_fast.studies import runs
from alro_fast.studies.plan import plan
from alro_fast.studies.progress import Progress

PRETEND = """
import json, pathlib, sys, time
words = sys.argv[1:]
command, folder = words[0], pathlib.Path(words[words.index("--output_dir") + 1])
given = dict(zip(words[1::2], words[2::2]))
print("begun", command, flush=True)
time.sleep(float(given.get("--max_grad_norm", 0)))
if given.get("--alpha") == "13.0":
    print("a line", "error: no luck", "", sep="\\n")
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
with (folder / "words.txt").open("a") as file:
    file.write(" ".join(words) + "\\n")
if given.get("--alpha") != "14.0":
    (folder / "results.json").write_text("{}")
"""


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(runs, "_module", lambda name: [sys.executable, "-c", PRETEND, name])


def planned(folder, *, variants=None, seeds=(0, 1), **keys):
    variants = variants or {"one": {"alpha": 0.1}, "two": {"alpha": 0.2}}
    return plan({"name": "s", "base": {"config": "demo"}, "variants": variants, **keys}, seeds=seeds, output_dir=folder)


def executed(study, processes=1):
    """The runs that failed, and what was told of each."""
    told = []

    def done(run, seconds, complaint):
        told.append((run.title, complaint))
        return complaint

    failed = runs.execute(study, processes, done)
    return [run.title for run in failed], told


def words_of(study):
    return {run.title: (run.folder / "words.txt").read_text().splitlines() for run in study.runs}


@pytest.mark.parametrize("processes", [1, 3])
def test_a_finished_run_is_not_run_again(tmp_path, pretend, processes):
    study = planned(tmp_path / "s")
    runs.check_folder(study)
    failed, told = executed(study, processes)
    assert not failed
    assert sorted(told) == sorted((run.title, None) for run in study.runs)
    once = words_of(study)
    assert all(len(lines) == 1 and "--overwrite_output_dir true" in lines[0] for lines in once.values())
    assert "--alpha 0.2" in once["two, seed 1"][0]
    assert "--seed 1" in once["two, seed 1"][0]
    assert executed(study, processes) == ([], [])
    assert words_of(study) == once

    (study.runs[2].folder / "results.json").unlink()
    (study.runs[2].folder / "checkpoint-3").mkdir()
    assert executed(study) == ([], [("one, seed 1", None)])
    assert words_of(study)["one, seed 1"][1].endswith("--resume_from_checkpoint auto")


def test_an_evaluation_follows_each_run_and_only_it_is_made_where_it_lacks(tmp_path, pretend):
    study = planned(tmp_path / "s", seeds=[0])
    executed(study)
    study = planned(tmp_path / "s", evaluate={"shuffles": 2, "limit": 5}, seeds=[0])
    assert executed(study) == ([], [("one, seed 0", None), ("two, seed 0", None)])
    run = study.runs[0]
    assert len((run.folder / "words.txt").read_text().splitlines()) == 1
    words = (run.folder.parent / "seed-0-shuffles-2-limit-5" / "words.txt").read_text().split()
    assert words[:5] == ["evaluate", "--adapter", str(run.folder), "--lists", str(run.folder / "data")]
    assert words[-4:] == ["--shuffles", "2", "--limit", "5"]
    assert runs.commands_of(study, run) == []


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, pretend):
    study = planned(tmp_path / "s", variants={"bad": {"alpha": 13.0}, "empty": {"alpha": 14.0}, "good": {}}, seeds=[0])
    failed, told = executed(study)
    assert failed == ["bad, seed 0", "empty, seed 0"]
    assert told[0] == ("bad, seed 0", "error: no luck")
    assert told[1] == ("empty, seed 0", "it left no results.json: there is nothing to test on")
    assert told[2] == ("good, seed 0", None)
    assert "begun train" in study.runs[0].log.read_text()


def test_a_run_whose_figures_cannot_be_read_fails_alone(tmp_path, pretend, capsys):
    study = planned(tmp_path / "s", variants={"one": {}, "two": {}}, seeds=[0])  # what they pretend is no measurement
    failed = runs.execute(study, 1, Progress(study, 2, 1))
    assert [run.title for run in failed] == ["one, seed 0", "two, seed 0"]
    printed = capsys.readouterr().out
    assert "[2/2] two, seed 0: failed: " in printed
    assert "results.json is damaged; remove the run's folder" in printed


def test_interrupted_processes_end_and_the_rest_is_left_to_go_on_with(tmp_path, pretend):
    study = planned(tmp_path / "s", variants={"slow": {"max_grad_norm": 60}, "quick": {}}, seeds=[0])
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    main = threading.main_thread().ident
    threading.Thread(target=lambda: (_wait(study.runs[0].log), signal.pthread_kill(main, signal.SIGINT))).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            executed(study, processes=2)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert time.monotonic() - begun < 40
    assert not runs.finished(study, study.runs[0])
    assert runs.commands_of(study, study.runs[0])


def _wait(log):
    while not (log.is_file() and "begun" in log.read_text()):
        time.sleep(0.02)


def test_a_folder_with_other_options_or_other_things_is_refused(tmp_path, pretend):
    study = planned(tmp_path / "s")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "letter.txt").touch()
    with pytest.raises(AlroFastError, match="holds something else than a study"):
        runs.check_folder(study)
    (tmp_path / "s" / runs.PLAN).touch()
    runs.check_folder(study)
    first = study.runs[0]
    first.folder.mkdir(parents=True)
    recorded = {"alro_fast_version": "0.1", "learned_answers": "ranking", "output_dir": "elsewhere"}
    recorded |= first.stages[first.folder]
    (first.folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    runs.check_folder(study)
    (first.folder / "config.yaml").write_text(yaml.safe_dump(recorded | {"alpha": 0.3}))
    with pytest.raises(AlroFastError, match=r"was run with alpha 0.3, and is now to be run with 0.1: remove"):
        runs.check_folder(study)


def test_a_study_that_really_trains(tmp_path, capsys):
    """Two variants x two seeds, from a file to its tables; then the same again, and one run of it anew."""
    save_base(tmp_path / "base")
    lists = random_lists(20, range(3, 6), seed=3, history=3, items=40)
    splits = {"train": lists[:8], "valid": lists[8:10], "test": lists[10:]}
    write_prepared(tmp_path / "data", catalogue(40), splits, {"dataset": "made", "tie_rule": "none needed"})
    base = {
        "model_name_or_path": "{place}/base", "data_dir": "{place}/data", "max_steps": 2, "use_cpu": True, "lora_r": 4,
        "save_strategy": "no", "learning_rate": 0.01,
    }  # fmt: skip
    document = {
        "needs": {"place": "a folder with base and data"}, "base": base, "seeds": [0, 1],
        "variants": {"sft": {"objective": "sft"}, "alro": {"alpha": 1}},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    argv = [str(tmp_path / "tiny.yaml"), "--set", f"place={tmp_path}", "--output_dir", str(tmp_path / "out")]

    command.main([*argv, "--dry_run"])
    assert "tiny: 2 variants x 2 seeds" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

    command.main([*argv, "--processes", "2"])
    printed = capsys.readouterr().out
    assert "[4/4]" in printed
    told = json.loads((tmp_path / "out" / "table.json").read_text())
    sft, alro = told["measures"]["ndcg@3"]
    reported = [
        json.loads((tmp_path / "out" / "runs" / "alro" / f"seed-{seed}" / "results.json").read_text())["tuned"][
            "ndcg@3"
        ]
        for seed in (0, 1)
    ]
    assert alro["by_seed"] == {"0": pytest.approx(reported[0]), "1": pytest.approx(reported[1])}
    assert alro["difference"] == pytest.approx(alro["mean"] - sft["mean"])
    assert alro["users"] <= 10 < alro["pairs"] <= 20
    table = (tmp_path / "out" / "table.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<td>{alro['difference']:+.4f}</td>" in page
    assert "<dt>alro</dt><dd>alpha 1</dd>" in page
    links = re.findall(r'<a href="([^"]+)">', page)
    assert len(links) == 4
    assert all((tmp_path / "out" / link).is_file() for link in links)

    results = tmp_path / "out" / "runs" / "sft" / "seed-0" / "results.json"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/*/results.json")}
    results.unlink()
    command.main(argv)
    printed = capsys.readouterr().out
    assert "3 of 4 runs are finished" in printed
    assert "[1/1] sft, seed 0" in printed
    again = {path: path.stat().st_mtime_ns for path in stamps}
    assert {path for path in stamps if stamps[path] != again[path]} == {results}
    assert (tmp_path / "out" / "table.md").read_text() == table

    with pytest.raises(AlroFastError, match=r"was run with learning_rate 0.01, and is now to be run with 0.02"):
        command.main([*argv, "--set", "learning_rate=0.02"])


def test_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "alro_fast.study", "alro-parts", "--set", "alhpa=1"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: variant sft: unknown option '--alhpa' (did you mean alpha?); python -m alro_fast.train --help lists "
        "the options\n"
    )
    for words, told in (
        (["alro-parts", "--set", "alpha"], "expected option=value"),
        (["alro-parts", "--processes", "0"], "--processes is at least 1"),
    ):
        with pytest.raises(AlroFastError, match=told):
            command.main(words)
