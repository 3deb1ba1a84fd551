"""Searches: what a space may say, trials by processes that only pretend to train, gone on with; and what is left."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from alro_fast import study as command
from alro_fast.errors import AlroFastError
from alro_fast.studies import runs
from alro_fast.studies.plan import plan, read_study
from alro_fast.studies.search import Space, search, validated

PRETEND = """
import json, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output_dir") + 1])
given = dict(zip(words[1::2], words[2::2]))
folder.mkdir(parents=True, exist_ok=True)
with (folder / "words.txt").open("a") as file:
    file.write(" ".join(words) + "\\n")
alpha = float(given.get("--alpha", 0))
if (folder / "../../stop").exists():
    sys.exit(2)
log = [{"eval_ndcg@3": 9.0}, {"eval_ndcg@3": 1 - (alpha - 0.3) ** 2, "eval_ndcg@10": 5.0}, {"loss": 1.0}]
(folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
(folder / "results.json").write_text(json.dumps({"tuned": {"ndcg@3": 1e9 * alpha}}))  # of the test lists: not read
"""
SEARCH = {
    "base": {"config": "demo"},
    "search": {"options": {"alpha": {"low": 0.0, "high": 1.0}, "score": ["logprob", "logit"]}, "trials": 6, "seed": 1},
}


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(runs, "_module", lambda name: [sys.executable, "-c", PRETEND, name])


@pytest.fixture
def file(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SEARCH))
    return tmp_path / "s.yaml"


def searched(file, processes=1, **changes):
    document = read_study(str(file))
    document["search"] = document["search"] | changes
    given = {"changes": {}, "seeds": None, "output_dir": file.parent / "out"}
    return search(document, given, processes, dry_run=False)


def alphas(folder):
    """Of every trial's run, by its number: the words that it was given, time after time."""
    lines = {path.parts[-3]: path.read_text().splitlines() for path in folder.glob("runs/trial-*/seed-0/words.txt")}
    return {name: [line.split()[line.split().index("--alpha") + 1] for line in each] for name, each in lines.items()}


def test_the_best_on_validation_lists_is_left_and_a_finished_trial_is_not_run_again(file, pretend, capsys):
    left = searched(file)
    found = alphas(file.parent / "out")
    assert len(found) == 6
    assert all(len(each) == 1 for each in found.values())
    best = min(found, key=lambda name: abs(float(found[name][0]) - 0.3))  # the test's figures rise with alpha
    number = best.removeprefix("trial-")
    assert left["variants"].keys() == {"base", f"best-{number}"}
    assert left["variants"][f"best-{number}"]["alpha"] == pytest.approx(float(found[best][0]))
    assert left["baseline"] == "base"
    printed = capsys.readouterr().out
    assert f"best: trial {number}, ndcg@3 " in printed
    assert yaml.safe_load((file.parent / "out" / "best.yaml").read_text()) == left
    ready = plan(read_study(str(file.parent / "out" / "best.yaml")) | {"name": "again"}, output_dir=file.parent / "x")
    assert [run.variant for run in ready.runs] == ["base", f"best-{number}"]
    words = (file.parent / "out" / "runs" / best / "seed-0" / "words.txt").read_text()
    assert "--eval_strategy epoch --max_test_lists 1 --baselines none" in words

    assert searched(file) == left
    assert alphas(file.parent / "out") == found
    searched(file, trials=8, processes=2)
    more = alphas(file.parent / "out")
    assert len(more) == 8
    assert {name: more[name] for name in found} == found
    assert len({each[0] for each in more.values()}) == 8  # what is gone on with does not draw the same again


def test_a_search_broken_off_goes_on_with_the_trial_it_was_at(file, pretend, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alro_fast.studies.search.execute", broken)
        with pytest.raises(KeyboardInterrupt):
            searched(file)
    searched(file, trials=2)
    assert alphas(file.parent / "out").keys() == {"trial-0", "trial-1"}


def test_failed_trials_are_told_and_a_search_of_nothing_else_ends(file, pretend, capsys):
    (file.parent / "out" / "runs").mkdir(parents=True)
    (file.parent / "out" / runs.PLAN).touch()
    for number in range(3):
        (file.parent / "out" / "runs" / f"trial-{number}").mkdir()
        (file.parent / "out" / "runs" / "stop").touch()
    with pytest.raises(AlroFastError, match="every trial of the search failed"):
        searched(file, trials=3)
    assert "trial-2: failed: " in capsys.readouterr().out


def test_another_space_in_the_same_folder_is_refused(file, pretend):
    searched(file, trials=1)
    with pytest.raises(AlroFastError, match="holds a search with options"):
        searched(file, options={"alpha": [0.1, 0.2]})


def test_another_base_in_the_same_folder_is_refused(file, pretend):
    searched(file, trials=1)
    document, given = read_study(str(file)), {"seeds": None, "output_dir": file.parent / "out"}
    with pytest.raises(
        AlroFastError, match=r"holds a search with base {}, and now has {'weight_decay': 0.2}"
    ) as caught:
        search(document, given | {"changes": {"weight_decay": 0.2}}, 1, dry_run=False)
    assert "\n" not in str(caught.value)
    assert len(alphas(file.parent / "out")) == 1


@pytest.mark.parametrize("damage", [lambda text: "garbage\n", lambda text: text[:-9], lambda text: "{}\n" + text])
def test_a_damaged_journal_is_one_line(file, pretend, damage):
    searched(file, trials=1)
    journal = file.parent / "out" / "search.journal"
    journal.write_text(damage(journal.read_text()))
    with pytest.raises(AlroFastError, match=r"search.journal is damaged; restore it"):
        searched(file, trials=2)


def test_a_trial_whose_figure_cannot_be_read_is_a_failed_one(file, pretend, monkeypatch, capsys):
    cut = '"{" * ("trial-0" in str(folder)) + json.dumps({"log'
    broken = PRETEND.replace('json.dumps({"log', cut)
    assert broken != PRETEND
    monkeypatch.setattr(runs, "_module", lambda name: [sys.executable, "-c", broken, name])
    searched(file, trials=2)
    printed = capsys.readouterr().out
    assert "trial-0: failed: " in printed
    assert "trainer_state.json is damaged" in printed
    assert "best: trial 1" in printed


def test_a_run_without_validation_lists_is_named(tmp_path):
    run = plan({"name": "s", "base": {"config": "demo"}, "variants": {"one": {}}}, output_dir=tmp_path).runs[0]
    with pytest.raises(AlroFastError, match="one, seed 0 has not been measured on validation lists"):
        validated(run, "ndcg@3")
    run.folder.mkdir(parents=True)
    log = [{"eval_ndcg@3": 0.1}, {"eval_ndcg@3": 0.2}, {"loss": 3}]
    (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert validated(run, "ndcg@3") == 0.2  # as training ended


@pytest.mark.parametrize(
    "told, said",
    [
        ([], "expected options:, trials:"),
        ({"options": {"alpha": [1]}, "trial": 3}, "expected options:, trials:"),
        ({"options": {}, "trials": 3}, "search: needs options:"),
        ({"options": {"alpha": [1]}}, "search: trials: None; expected a whole number"),
        ({"options": {"alpha": [1]}, "trials": 1, "seed": -1}, "search: seed: -1"),
        ({"options": {"max_test_lists": [1, 2]}, "trials": 1}, "search: max_test_lists is 1 in every trial"),
        ({"options": {"alpha": [1, 1]}, "trials": 1}, "search: alpha: [1, 1]; expected a list of different choices"),
        ({"options": {"alpha": {"low": 1}}, "trials": 1}, "search: alpha: {'low': 1}; expected"),
        ({"options": {"alpha": {"low": 2, "high": 1}}, "trials": 1}, "search: alpha: "),
        ({"options": {"alpha": {"low": 0, "high": 1, "log": True}}, "trials": 1}, "search: alpha: "),
    ],
)
def test_a_space_that_says_nothing_is_one_line(told, said):
    with pytest.raises(AlroFastError) as caught:
        Space.of(told)
    assert said in str(caught.value)


def test_mistakes_are_found_before_the_first_trial(file, monkeypatch, capsys):
    command.main([str(file), "--output_dir", str(file.parent / "out"), "--dry_run"])
    assert "s: 6 trials x 1 seeds" in capsys.readouterr().out
    assert not (file.parent / "out").exists()
    for change, said in (
        ({"search": {"options": {"alhpa": [1, 2]}, "trials": 1}}, r"variant alhpa=1: unknown option '--alhpa'"),
        ({"search": {"options": {"score": ["logprob", "odd"]}, "trials": 1}}, r"variant score=odd: "),
        ({"variants": {"one": {}}}, r"search: stands in place of variants:"),
        ({"evaluate": {"shufles": 2}}, r"evaluate: unknown option 'shufles'"),
        ({"metric": "mrr"}, r"goes by ndcg@1, 3, 5 or 10 of `tuned` on the validation lists; given mrr"),
    ):
        (file.parent / "bad.yaml").write_text(yaml.safe_dump(SEARCH | change))
        with pytest.raises(AlroFastError, match=said):
            command.main([str(file.parent / "bad.yaml"), "--output_dir", str(file.parent / "out")])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(AlroFastError, match=r"pip install 'alro-fast\[study\]'"):
        command.main([str(file)])
