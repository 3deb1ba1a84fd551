"""Study files: what they may say, and what is found wrong before anything runs."""

from __future__ import annotations

import json
import re

import pytest
from places import ROOT
from tiny import catalogue, random_lists

from alro_fast.data.lists import write_prepared
from alro_fast.errors import AlroFastError
from alro_fast.studies.plan import KEYS, READY, as_told, parse_seeds, plan, read_study, study_names
from alro_fast.study import main

TWO = {"name": "two", "base": {"config": "demo"}, "variants": {"sft": {"alpha": 0, "beta": 0}, "both": None}}


def planned(tmp_path, changes=None, seeds=None, **keys):
    return plan({**TWO, **keys}, changes=changes, seeds=seeds, output_dir=tmp_path / "study")


def refused(tmp_path, **keys) -> str:
    with pytest.raises(AlroFastError) as caught:
        planned(tmp_path, **keys)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    return str(caught.value)


def test_every_variant_runs_with_every_seed(tmp_path):
    study = planned(tmp_path, seeds=[3, 1])
    assert [(run.variant, run.seed) for run in study.runs] == [("sft", 3), ("both", 3), ("sft", 1), ("both", 1)]
    first = study.runs[0]
    assert first.folder == first.measured == tmp_path / "study" / "runs" / "sft" / "seed-3"
    told = first.stages[first.measured]
    assert (told["alpha"], told["beta"], told["seed"], told["learning_rate"]) == (0.0, 0.0, 3, 3e-3)
    assert study.runs[1].stages[study.runs[1].measured]["alpha"] == 1.0
    assert (study.baseline, study.metric, study.ranker) == ("sft", "ndcg@3", "tuned")
    assert "output_dir" not in told


def test_a_grid_is_the_product_of_its_values(tmp_path):
    study = planned(tmp_path, variants={}, grid={"alpha": [0.1, 1], "score": ["logprob", "logit"]})
    assert study.variants == {
        "alpha=0.1, score=logprob": {"alpha": 0.1, "score": "logprob"},
        "alpha=0.1, score=logit": {"alpha": 0.1, "score": "logit"},
        "alpha=1, score=logprob": {"alpha": 1, "score": "logprob"},
        "alpha=1, score=logit": {"alpha": 1, "score": "logit"},
    }
    assert len({run.folder for run in study.runs}) == 4


def test_the_command_line_changes_the_base_and_gives_what_is_needed(tmp_path):
    study = planned(tmp_path, changes={"learning_rate": 1e-4})
    assert study.runs[0].stages[study.runs[0].measured]["learning_rate"] == 1e-4
    needy = {"needs": {"width": "a rank"}, "variants": {"one": {"lora_r": "{width}"}, "two": {}}}
    study = planned(tmp_path, changes={"width": 8}, **needy)
    assert study.runs[0].stages[study.runs[0].measured]["lora_r"] == 8
    assert study.runs[1].stages[study.runs[1].measured]["lora_r"] == 16
    assert refused(tmp_path, **needy) == "study two needs a rank; give --set width=..."


def test_stages_are_planned_in_their_folders(tmp_path, preferences):
    study = planned(
        tmp_path,
        base={"preferences": str(preferences), "eval_preferences": [str(preferences)], "use_cpu": True},
        variants={"staged": {"stages": "sft,dmpo"}, "dmpo": {"objective": "dmpo"}},
    )
    staged, single = study.runs
    assert [folder.name for folder in staged.stages] == ["1-sft", "2-dmpo"]
    assert staged.measured == staged.folder / "2-dmpo"
    assert next(iter(staged.stages.values()))["objective"] == "sft_chosen"
    assert single.measured == single.folder
    assert (study.metric, study.ranks_lists) == ("pair_accuracy", False)


@pytest.fixture
def preferences(tmp_path_factory):
    file = tmp_path_factory.mktemp("files") / "rows.json"
    file.write_text('[{"prompt": "Next:", "chosen": " North", "rejected": [" South", " West"]}]')
    return file


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"variants": {"typo": {"alhpa": 1}}}, "variant typo: unknown option '--alhpa' (did you mean alpha?)"),
        ({"variants": {"plain": {"objective": "sft", "alpha": 0}}}, "variant plain: --alpha has no meaning"),
        ({"variants": {"bad": {"alpha": "much"}}}, "variant bad: argument --alpha: invalid float value: 'much'"),
        ({"variants": {"gone": {"data_dir": "/nowhere"}}}, "variant gone: "),
        ({"variants": {"a b": {}, "a_b": {}}}, "variants a b and a_b would share a folder"),
        ({"variants": {"odd": [1]}}, "variants: odd: [1]; expected options"),
        ({"variants": {"mine": {"seed": 3}}}, "variant mine: seed is the study's own; give seeds:"),
        ({"base": {"output_dir": "x"}}, "base: output_dir is the study's own"),
        ({"grid": {"alpha": [1]}}, "a study has variants: (name -> options) or grid:"),
        ({"variants": {}, "grid": {"alpha": 1}}, "grid: alpha: 1; expected a list of values"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]; expected different whole numbers"),
        ({"seeds": []}, "seeds: []"),
        ({"baseline": "none"}, "baseline: 'none' is no variant; expected one of sft, both"),
        ({"metric": "ndcg@4"}, "metric: 'ndcg@4' is unknown"),
        ({"evaluate": {"shufles": 2}}, "evaluate: unknown option 'shufles'"),
        ({"evaluate": {"shuffles": 1}}, "evaluate: shuffles: 1; expected a whole number of at least 2"),
        ({"evaluate": {"limit": 5}}, "evaluate: needs shuffles:"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(tmp_path, keys, told):
    assert refused(tmp_path, **keys).startswith(told)


SAMPLED = ("importance,clustering,penalty", "clustering,penalty", "importance,penalty", "importance,clustering", "none")


@pytest.mark.parametrize("name", study_names())
def test_ready_studies_can_be_planned(tmp_path, preferences, capsys, name):
    """Every variant of each is read whole, given what it needs; and its file says how it is run."""
    document = read_study(name)
    for parts in ("", *SAMPLED):
        lists = {"train": random_lists(2, 4, items=40)}
        write_prepared(tmp_path / "lists" / parts, catalogue(40), lists, {"dataset": "made"})
    row = {"prompt": "Next:", "chosen": " North", "rejected": [f" West {number}" for number in range(5)]}
    for file in ("train", "other"):
        (tmp_path / f"{file}.json").write_text(json.dumps([row]))
    given = {"data_dir": tmp_path / "lists", "raw_dir": tmp_path, "eval": preferences, "lists": tmp_path / "lists"}
    given |= {file: tmp_path / f"{file}.json" for file in ("train", "other")}
    given |= {model: model for model in ("first", "second", "third")}
    study = plan(document, changes={key: str(given[key]) for key in document.get("needs", {})}, seeds=[0])
    assert len(study.variants) == len(study.runs) >= 3
    options = [tuple(run.stages[run.measured].items()) for run in study.runs]
    assert len(set(map(str, options))) == len(options)
    words = [word for key in document.get("needs", {}) for word in ("--set", f"{key}={given[key]}")]
    main([name, "--dry_run", "--seeds", "0", *words, "--output_dir", str(tmp_path / "out")])
    assert f"{name}: {len(study.variants)} variants x 1 seeds" in capsys.readouterr().out
    assert f"python -m alro_fast.study {name} " in (READY / f"{name}.yaml").read_text()


def test_lists_and_preferences_are_not_compared(tmp_path, preferences):
    files = {"config": None, "preferences": str(preferences), "eval_preferences": [str(preferences)]}
    with pytest.raises(AlroFastError, match="lists ranks lists, pairs is measured on preferences"):
        planned(tmp_path, base={}, variants={"lists": {"config": "demo"}, "pairs": files | {"objective": "dmpo"}})
    with pytest.raises(AlroFastError, match="evaluate: is for rankings"):
        planned(tmp_path, base=files, variants={"pairs": {"objective": "dmpo"}}, evaluate={"shuffles": 2})


def test_files_are_read_or_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("variants: {a: {}}\n")
    assert read_study(str(file)) == {"name": "mine", "variants": {"a": {}}}
    file.write_text("variant: {a: {}}\n")
    with pytest.raises(AlroFastError, match=r"unknown key 'variant' \(did you mean variants\?\)$"):
        read_study(str(file))
    file.write_text("- a\n")
    with pytest.raises(AlroFastError, match="is no study: expected YAML with the keys name, needs, base"):
        read_study(str(file))
    with pytest.raises(AlroFastError, match=r"no such file or study; ready studies: .*alro-parts"):
        read_study("nowhere")


def test_every_documented_key_can_be_written_in_a_file(tmp_path):
    """As YAML: a bare `on` would be read as True."""
    table = (ROOT / "docs" / "studies.md").read_text().split("## A file")[1].split("## A search")[0]
    keys = re.findall(r"^(\w+):", table, re.MULTILINE)
    keys += [key for line in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", line)]
    assert {"name", "base", "evaluate", "grid", "measured_on", "needs"} <= set(keys)
    assert set(keys) == set(KEYS) - {"search"}
    file = tmp_path / "mine.yaml"
    file.write_text("".join(f"{key}: 1\n" for key in keys))
    assert read_study(str(file)) == dict.fromkeys(keys, 1)
    file.write_text("on: games\n")
    with pytest.raises(
        AlroFastError, match=r"unknown key True, as YAML reads a bare `on` or `yes`; expected .*measured_on"
    ):
        read_study(str(file))


def test_what_no_run_will_write_is_refused_before_any(tmp_path, preferences):
    assert refused(tmp_path, ranker="fused").startswith("ranker: 'fused' is no row of variant sft; expected one of unt")
    assert "expected one of untuned, tuned" in refused(tmp_path, ranker="hints")
    assert refused(tmp_path, measured_on="games").startswith("measured_on: is for runs with eval_preferences")
    fused = {"variants": {"sft": {"fuse": True}}, "ranker": "fused"}
    assert planned(tmp_path, **fused).ranker == "fused"
    assert "without evaluate:" in refused(tmp_path, **fused, evaluate={"shuffles": 2})
    files = {"preferences": str(preferences), "eval_preferences": [str(preferences)]}
    dmpo = {"base": files, "variants": {"dmpo": {"objective": "dmpo"}}}
    assert planned(tmp_path, **dmpo, measured_on="rows", ranker="untuned").measured_on == "rows"
    with pytest.raises(
        AlroFastError, match=r"measured_on: 'nosuch' is none of the .* variant dmpo; expected one of rows$"
    ):
        planned(tmp_path, **dmpo, measured_on="nosuch")
    with pytest.raises(AlroFastError, match=r"variant dmpo has nothing to measure: give eval_preferences"):
        planned(tmp_path, **dmpo | {"base": {"preferences": str(preferences)}})
    with pytest.raises(AlroFastError, match=r"expected one of tuned, earlier stage$"):
        planned(tmp_path, base=files, variants={"two": {"stages": "sft,dmpo"}}, ranker="untuned")


def test_options_as_a_command_line_would_have_them():
    assert as_told({"alpha": 0.5, "beta": None}) == "--alpha 0.5 (without --beta)"


@pytest.mark.parametrize(
    "text, seeds", [("0-4", [0, 1, 2, 3, 4]), ("7", [7]), ("0,2,5", [0, 2, 5]), ("1-2,9", [1, 2, 9])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-2-3", "-1", "1-"])
def test_seeds_that_are_none(text):
    with pytest.raises(AlroFastError, match="expected numbers such as 0-4"):
        parse_seeds(text)
