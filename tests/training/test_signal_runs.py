"""The recipe `movielens` end to end on a few hundred lists: what it learns, what it leaves, how it is ranked with."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from made_ratings import interactions, taste_rows
from tiny import refused

from alro_fast import evaluate, rank, train
from alro_fast.data.lists import open_prepared, write_prepared
from alro_fast.data.signals import SignalOptions, add_signals
from alro_fast.data.windows import ListOptions, build_lists
from alro_fast.errors import AlroFastError
from alro_fast.ranking.fusion import FUSED, Fusion
from alro_fast.ranking.ranker import Ranker

NAMES = ("average", "count", "hint", "near")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lists with signals, and a run of the recipe over them, with its scores fused."""
    folder = tmp_path_factory.mktemp("signals")
    data, options = interactions(taste_rows(users=60, items=120), 120), ListOptions(list_size=5, history_length=8)
    built = build_lists(data, options, notice=lambda what: None)
    lists = add_signals(built, data, SignalOptions(NAMES, 4), options)
    write_prepared(folder / "lists", built.items, lists, {"dataset": "made", "tie_rule": "none needed"})
    write_prepared(folder / "bare", built.items, built.lists, {"dataset": "made", "tie_rule": "none needed"})
    train.main(words(folder, "run", "--fuse", "true"))
    return folder


def words(folder, output, *more):
    given = ["--config", "movielens", "--data_dir", folder / "lists", "--output_dir", folder / output]
    small = ["--scratch_hidden_size", 32, "--tokens_per_batch", 1024, "--learning_rate", 4e-3, "--disable_tqdm", "true"]
    return [str(word) for word in (*given, *small, "--use_cpu", "true", *more)]


def test_it_learns_from_signals_and_leaves_a_row_per_ranker(folder):
    results = json.loads((folder / "run" / "results.json").read_text())
    rows = {"random", "popularity", "mean_rating", "shrunk_mean", "biased_mf", "hints", "lambdamart"}
    assert rows | {"untuned", "tuned", "fused", "about"} <= results.keys()
    assert results["tuned"]["ndcg@3"] > results["untuned"]["ndcg@3"] + 0.05
    assert results["tuned"]["ndcg@3"] > results["mean_rating"]["ndcg@3"]
    assert not (folder / "run" / "prompt_template.yaml").exists()


def test_the_saved_run_ranks_as_it_did(folder):
    loaded = Ranker.load(folder / "run", device="cpu")
    lists = open_prepared(folder / "lists").lists("test")
    told = [json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(told) == len(lists)
    for line, ranking in zip(told, loaded.rank(lists), strict=True):
        assert line["rankings"]["tuned"]["order"] == list(ranking.order)
        np.testing.assert_allclose(line["rankings"]["tuned"]["scores"], ranking.scores, atol=1e-5)
    evaluate.main(
        f"--adapter {folder / 'run'} --lists {folder / 'lists'} --output_dir {folder / 'measured'} --device cpu".split()
    )
    again = json.loads((folder / "measured" / "results.json").read_text())
    before = json.loads((folder / "run" / "results.json").read_text())
    assert again["tuned"]["ndcg@3"] == pytest.approx(before["tuned"]["ndcg@3"], abs=1e-9)


def document_of(one):
    return {
        "history": [{"title": i.title, "rating": r} for i, r in zip(one.history, one.history_ratings, strict=True)],
        "candidates": [
            {"id": item.item_id, "title": item.title}
            | {n: None if math.isnan(v := one.signal(n).candidates[at]) else v for n in NAMES}
            for at, item in enumerate(one.candidates)
        ],
    }


def test_fused_weights_follow_from_the_validation_lists_alone(folder):
    """Fitted again from them and the saved model: no training and no test list has any part in it."""
    valid = open_prepared(folder / "lists").lists("valid")
    again = Fusion.fit(valid, Ranker.load(folder / "run", device="cpu").scores(valid), FUSED)
    saved = Fusion.load(folder / "run")
    np.testing.assert_allclose(saved.weights, again.weights, atol=1e-4)
    assert saved.signals == FUSED
    results = json.loads((folder / "run" / "results.json").read_text())
    compared = {(one["first"], one["second"]) for one in results["about"]["comparisons"]}
    assert {("fused", "tuned"), ("fused", "hints"), ("fused", "lambdamart"), ("tuned", "hints")} <= compared
    assert results["about"]["conventions"]["fused"] == saved.described()


def test_fused_scores_are_the_same_in_training_evaluation_and_rank(folder, capsys):
    test = open_prepared(folder / "lists").lists("test")
    told = [json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text().splitlines()]
    evaluate.main(
        f"--adapter {folder / 'run'} --lists {folder / 'lists'} --output_dir {folder / 'fused'} --device cpu --fuse "
        "--baselines none --bootstrap 0".split()
    )
    measured = [json.loads(line) for line in (folder / "fused" / "predictions.jsonl").read_text().splitlines()]
    (folder / "lists.json").write_text(json.dumps([document_of(one) for one in test]))
    capsys.readouterr()
    rank.main(["--adapter", str(folder / "run"), "--device", "cpu", "--fuse", str(folder / "lists.json")])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == len(measured) == len(told) > 20
    for one, before, again, answer in zip(test, told, measured, printed, strict=True):
        scores = {entry["id"]: entry["score"] for entry in answer["ranking"]}
        np.testing.assert_allclose(
            before["rankings"]["fused"]["scores"], again["rankings"]["fused"]["scores"], atol=1e-4
        )
        np.testing.assert_allclose(
            [scores[item.item_id] for item in one.candidates], again["rankings"]["fused"]["scores"], atol=1e-4
        )
        assert [entry["score"] for entry in answer["ranking"]] == sorted(scores.values(), reverse=True)


def test_fusing_without_signals_or_weights_is_one_line(folder, tmp_path, capsys):
    run_, lists, bare = (str(folder / name) for name in ("run", "lists", "bare"))
    (tmp_path / "bare.json").write_text(json.dumps({"candidates": [{"title": "a", "hint": 3}, {"title": "b"}]}))
    letters = ["--data_dir", bare, "--fuse", "true", "--output_dir", str(folder / "none"), "--use_cpu", "true"]
    for main, argv, said in (
        (evaluate.main, ["--adapter", run_, "--lists", bare, "--fuse"], "has no hint and no average and no near"),
        (rank.main, ["--adapter", run_, "--fuse", str(tmp_path / "bare.json")], "list 1 has no average and no near"),
        (train.main, letters, "holds lists without hint, average or near"),
        (train.main, ["--data_dir", lists, "--objective", "dmpo", "--fuse", "true"], "--fuse has no meaning for"),
    ):
        with pytest.raises(AlroFastError) as caught:
            main(argv)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (folder / "none").exists()


def test_rank_reads_signals_from_json(folder, capsys):
    one = open_prepared(folder / "lists").lists("test")[0]
    (folder / "list.json").write_text(json.dumps(document_of(one)))
    rank.main(["--adapter", str(folder / "run"), "--device", "cpu", str(folder / "list.json")])
    printed = json.loads(capsys.readouterr().out)
    scores = Ranker.load(folder / "run", device="cpu").scores([one])[0]
    by_id = {entry["id"]: entry["score"] for entry in printed["ranking"]}
    np.testing.assert_allclose([by_id[item.item_id] for item in one.candidates], scores, atol=1e-5)
    blind = replace(one, hints=(), signals=())
    assert len(set(Ranker.load(folder / "run", device="cpu").scores([blind])[0].round(5))) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--answer", "ranking"], "--identifiers signals is for grades"),
        (["--use_peft", "true"], "--identifiers signals adds tokens, which an adapter cannot learn"),
        (["--template", "movies"], "--template is read on ranking lists in words"),
        (["--objective", "recranker"], "--objective recranker is to learn another answer"),
    ],
)
def test_what_does_not_go_together_is_one_line(folder, more, said):
    assert said in refused(words(folder, "mistake", *more))
    assert not (folder / "mistake").exists()


def test_lists_without_signals_are_refused(folder):
    argv = words(folder, "mistake")
    argv[argv.index(str(folder / "lists"))] = str(folder / "bare")
    assert "the lists carry none; prepare them with --signals" in refused(argv)
