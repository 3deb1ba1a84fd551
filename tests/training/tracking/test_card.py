"""The model card of a run's folder, read as the hub's library reads it, and what is pushed."""

from __future__ import annotations

import json
import types

import pytest
from huggingface_hub import ModelCard
from test_trackers import folder as lists_and_base
from test_trackers import trained
from tiny import refused

from alro_fast.errors import AlroFastError
from alro_fast.training.tracking import card, hub

folder = lists_and_base  # the fixture


def test_a_card_holds_base_data_results_command_and_versions(folder):
    output, results = trained(folder, "none")
    read = ModelCard.load(output / "README.md")
    assert read.data.library_name == "peft"
    assert "ranking" in read.data.tags
    assert read.data.base_model is None  # a folder, which the hub does not know
    measured = {one.metric_type: one.metric_value for one in read.data.eval_results}
    assert measured["ndcg@3"] == pytest.approx(results["tuned"]["ndcg@3"], abs=1e-4)
    assert {one.dataset_name for one in read.data.eval_results} == {"made"}
    for said in (
        f"base model: {folder / 'base'}", "data: made; its licence is not recorded", "| **tuned** |",
        "--config FOLDER/config.yaml", "torch 2.",
    ):  # fmt: skip
        assert said in read.text
    checkpoint = next(output.glob("checkpoint-*"))
    assert ModelCard.load(checkpoint / "README.md").data.eval_results is None  # nothing is measured yet


def test_names_of_the_hub_licences_and_preferences():
    assert card._on_the_hub("Qwen/Qwen3-0.6B")
    assert not any(map(card._on_the_hub, ("demo", "scratch", "/models/x", "./models/x")))
    licence = {"name": "MovieLens", "url": "https://example.org", "terms": "for research"}
    assert card._licence(licence) == "licence: MovieLens (https://example.org): for research"
    document = {"eval": {"tuned": {"pair_accuracy": 0.75, "user_auc": float("nan"), "interval": [0, 1], "records": 9}}}
    rows = card._by_data(document, "x")
    assert rows == {"eval": {"tuned": {"pair_accuracy": 0.75}}}
    assert card._table(rows["eval"]).splitlines()[-1] == "| **tuned** | 0.7500 |"


def test_lists_of_others_are_not_pushed_along(tmp_path):
    words = ["--push_to_hub", "true", "--dataset", "ml-100k", "--raw_dir", tmp_path, "--model_name_or_path", "demo"]
    said = refused([*words, "--output_dir", tmp_path / "run"])
    assert said.startswith("--push_to_hub true would push the lists of ml-100k")
    assert not (tmp_path / "run").exists()


def test_results_follow_the_weights_and_nothing_else_does(tmp_path, monkeypatch):
    args = types.SimpleNamespace(hub_token=None, hub_revision=None)
    trainer, sent = types.SimpleNamespace(hub_model_id="me/ranker", args=args), {}
    monkeypatch.setattr(hub, "upload_folder", lambda **given: sent.update(given))
    hub.push_results(trainer, tmp_path)
    assert sent["repo_id"] == "me/ranker"
    assert set(sent["allow_patterns"]) == {"README.md", "results.json", "preference_results.json"}

    def fails(**_):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "upload_folder", fails)
    with pytest.raises(AlroFastError, match=r"the weights are pushed, and the results are not \(no network\)"):
        hub.push_results(trainer, tmp_path)


def test_the_trainer_writes_no_card_of_its_own(folder):
    from alro_fast.training.trainer import RankerTrainer

    output, _ = trained(folder, "none", "--overwrite_output_dir", "true")
    before = (output / "README.md").read_text()
    RankerTrainer.create_model_card(types.SimpleNamespace(args=types.SimpleNamespace(output_dir=output)), "x", tags=[])
    assert (output / "README.md").read_text() == before
    assert json.loads((output / "results.json").read_text())
