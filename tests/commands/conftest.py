"""Run folders of every kind; models are loaded once for all rows, and what they were asked to load is recorded."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest
from tiny import byte_tokenizer, catalogue, make_run, random_lists, tiny_llama

from alro_fast.data.lists import TARGET_SCHEMA, write_prepared
from alro_fast.evaluation import preferences, rankings
from alro_fast.modeling import loading
from alro_fast.prompts.recranker import RecRankerPrompts
from alro_fast.ranking.fusion import FILE
from alro_fast.ranking.generation import Generated
from alro_fast.ranking.ranker import Ranker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that answer in every form, lists, preferences: what `rank` and `evaluate` are pointed at."""
    folder = tmp_path_factory.mktemp("options")
    make_run(folder)
    tokenizer = byte_tokenizer()
    for name, options in (
        ("ratings", "answer: ratings"),
        ("tasks", "objective: recranker"),
        ("titles", "objective: dmpo\npreference_answer: titles\nnum_negatives: 2"),
    ):
        shutil.copytree(folder / "run", folder / name)
        (folder / name / "config.yaml").write_text(options)
    RecRankerPrompts(tokenizer, "movies").save(folder / "tasks")
    shutil.copytree(folder / "run", folder / "whole", ignore=shutil.ignore_patterns("adapter*"))
    tiny_llama(len(tokenizer), seed=7).save_pretrained(folder / "whole")
    titles = ("Casino", "Clueless", "Babe", "Alien", "Brazil")
    documents = [
        {"history": [{"title": past, "rating": 4.5}], "candidates": [{"title": title} for title in titles]}
        for past in ("Heat", "Ran", "Fargo")
    ]
    (folder / "lists.json").write_text(json.dumps(documents))
    lists = random_lists(9, 5, seed=3, history=3, items=60)
    (folder / "run" / FILE).write_text(json.dumps({"weights": {"model": -1.0}, "lists": 3, "pairs": 9}))
    write_prepared(folder / "data", catalogue(60), {"train": lists[:3], "valid": lists[3:6], "test": lists[6:]})
    write_prepared(folder / "more", catalogue(60), {"test": lists[:4]})
    targets = {"split": ["test"] * 2, "user_id": ["u0", "u1"], "item": [0, 1], "place": [1, 2]}
    hinted = pl.DataFrame(targets, schema=TARGET_SCHEMA)
    write_prepared(folder / "hinted", catalogue(60), {"test": lists[:2]}, {}, hinted)
    for name, good in (("movies", "North"), ("games", "Glass")):
        rows = [{"prompt": f"User {u}:", "chosen": f" {good} {u}", "rejected": [f" Echo {u}"]} for u in range(4)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def models():
    """Folder -> what was loaded from it, for the whole module."""
    return {}


@pytest.fixture
def loads(monkeypatch, models):
    """What the command asked to load; every model is loaded once, whatever is asked."""
    asked = []
    really = {"ranker": Ranker.load, "model": loading.load_for_inference}

    def load(kind, adapter, **options):
        before = asked.copy()
        if (kind, adapter) not in models:
            models[kind, adapter] = really[kind](adapter, device="cpu")
        asked[:] = [*before, (kind, adapter, options)]  # and not what loading a ranker loads
        return models[kind, adapter]

    monkeypatch.setattr(Ranker, "load", lambda adapter, **options: load("ranker", adapter, **options))
    monkeypatch.setattr(loading, "load_for_inference", lambda adapter, **options: load("model", adapter, **options))

    def generate(ranker, lists, **options):
        asked.append(("generate", ranker.answer, options))
        return Generated([list(range(len(one.candidates))) for one in lists], [True] * len(lists), [""] * len(lists))

    score = preferences.score_preferences
    scoring = lambda *words, **more: asked.append(("tokens", words[3], more)) or score(*words, **more)  # noqa: E731
    monkeypatch.setattr(preferences, "score_preferences", scoring)
    monkeypatch.setattr(rankings, "generate_tasks", generate)
    monkeypatch.setattr(rankings, "generate_and_parse", generate)
    monkeypatch.setattr(rankings, "report_line", lambda *_: "")
    return asked
