"""Metrics of lists with one target each, against numbers by hand and scikit-learn."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import ndcg_score
from tiny import catalogue, random_lists

from alro_fast.data.lists import TARGET_SCHEMA, open_prepared, write_prepared
from alro_fast.evaluation.baselines import first_stage_scores
from alro_fast.evaluation.report import write_report
from alro_fast.evaluation.results import Results
from alro_fast.evaluation.targets import as_grades, evaluate_rankers, evaluate_targets, has_targets, save_measurement
from alro_fast.ranking.orders import make_ranking

NAN = math.nan


def lists_with_targets(places: list[int | None], size: int = 10) -> list:
    """A list per entry, its target at that place (0-based) of the stored order; None: not among the candidates."""
    made = random_lists(len(places), size, items=400)
    return [
        replace(one, ratings=tuple(4.5 if i == place else NAN for i in range(size)))
        for one, place in zip(made, places, strict=True)
    ]


def test_the_released_protocol_by_hand():
    """Places 1, 3, 4 and 10 of the retriever's order, and two users whose target was missed."""
    lists = lists_with_targets([0, 2, 3, 9, None, None])
    found = evaluate_targets(lists, first_stage_scores(lists))
    assert found.ceiling == pytest.approx(4 / 6)
    assert found.mean("retriever", "hr@3") == pytest.approx(2 / 6)
    assert found.mean("retriever", "hr@5") == pytest.approx(3 / 6)
    assert found.mean("retriever", "hr@10") == pytest.approx(4 / 6)
    assert found.mean("retriever", "ndcg@3") == pytest.approx((1 + 1 / np.log2(4)) / 6)
    assert found.mean("retriever", "ndcg@5") == pytest.approx((1 + 1 / np.log2(4) + 1 / np.log2(5)) / 6)
    assert found.mean("retriever", "mrr") == pytest.approx((1 + 1 / 3 + 1 / 4 + 1 / 10) / 6)
    for metric in found.per_list["retriever"]:
        assert found.mean("retriever", metric) == pytest.approx(found.within("retriever", metric) * found.ceiling)


def test_random_is_exact_and_ndcg_agrees_with_scikit_learn():
    lists = lists_with_targets([0, 5, 9, None])
    draw = np.random.default_rng(0).normal(size=(4, 10))
    found = evaluate_targets(lists, {"random": np.zeros((4, 10)), "drawn": draw})
    assert found.within("random", "hr@3") == pytest.approx(0.3)
    assert found.within("random", "hr@5") == pytest.approx(0.5)
    relevant = np.array([one.ratings for one in as_grades(lists)])
    for k in (3, 5):
        expected = np.array([ndcg_score(relevant[l : l + 1], draw[l : l + 1], k=k) for l in range(3)])
        np.testing.assert_allclose(found.per_list["drawn"][f"ndcg@{k}"], [*expected, 0.0], atol=1e-12)


def test_the_table_and_the_file_say_who_was_counted(tmp_path):
    lists = lists_with_targets([0, 2, None, None])
    lists = [replace(one, hints=tuple(map(float, range(9, -1, -1)))) for one in lists]
    found = evaluate_rankers(
        lists, {"tuned": [-np.arange(10.0)] * 4, "untuned": np.zeros((4, 10))}, targets=True, bootstrap=50
    )
    text = found.table()
    assert "test: 4 users, of whom 2 have their target among the candidates" in text
    for row in ("retriever", "hints", "untuned", "tuned", "ceiling"):
        assert f"\n{row}" in text
    shown = {line[:15].strip(): line.split() for line in text.splitlines()}
    assert shown["retriever"][-2:] == ["+0.0000", "1.000"]
    assert shown["untuned"][-2] == f"{found.compare('tuned', 'untuned', 'ndcg@5').difference:+.4f}"
    assert "NDCG@5, tuned - row, paired over users: tuned is not told apart from" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    document = json.loads(found.save(tmp_path).read_text())
    assert document["about"]["ceiling"] == 0.5
    assert document["about"]["lists_with_their_target"] == 2
    assert document["retriever"] == document["hints"]
    assert document["tuned"]["hr@3"] == 0.5
    assert document["tuned"]["within_hr@3"] == 1.0


def test_the_report_names_the_ceiling_and_what_can_be_changed(tmp_path):
    lists = lists_with_targets([0, 2, None, None])
    rankings = {"tuned": [-np.arange(10.0)] * 4, "untuned": np.zeros((4, 10))}
    evaluate_rankers(lists, rankings, targets=True, bootstrap=50).save(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "2 hold their target, so that no ranker can exceed 0.5000" in page
    assert "Within the lists that hold their target" in page
    assert "retriever, the best without a model" in page


def test_lists_of_several_ratings_are_measured_as_before():
    lists = random_lists(5, 6)
    found = evaluate_rankers(lists, {"random": np.zeros((5, 6))}, targets=False, bootstrap=0)
    assert type(found) is Results
    assert "retriever" not in found.per_list


def test_the_prepared_data_say_what_is_measured_not_the_hits(tmp_path):
    """A first stage's held-out lists have targets though every one is missed; its training lists have none."""
    missed = [replace(one, list_id=f"m{n}") for n, one in enumerate(lists_with_targets([None, None]))]
    rows = {"split": ["test"] * 2, "user_id": ["u0", "u1"], "item": [0, 1], "place": [None, 80]}
    targets = pl.DataFrame(rows, schema=TARGET_SCHEMA)
    write_prepared(tmp_path / "first", catalogue(400), {"test": missed}, targets=targets)
    write_prepared(tmp_path / "rated", catalogue(400), {"test": lists_with_targets([3, 3])})
    first, rated = (open_prepared(tmp_path / name) for name in ("first", "rated"))
    assert [has_targets(first, split) for split in ("train", "valid", "test")] == [False, True, True]
    assert not has_targets(rated, "test")


def test_users_without_a_list_count_as_misses(tmp_path):
    """Three users have a target; one has seen all that can be retrieved: no list, and still one of the three."""
    held = [replace(one, user_id=f"u{n}", list_id=f"l{n}") for n, one in enumerate(lists_with_targets([0, None]))]
    rows = {"split": ["test"] * 3, "user_id": ["u0", "u1", "u2"], "item": [0, 1, 2], "place": [1, 80, None]}
    targets = pl.DataFrame(rows, schema=TARGET_SCHEMA)
    write_prepared(tmp_path / "first", catalogue(400), {"test": held}, targets=targets)
    prepared = open_prepared(tmp_path / "first")
    scores = {"tuned": [-np.arange(10.0)] * 2}
    found = evaluate_rankers(prepared.lists("test"), scores, targets=True, prepared=prepared)
    assert found.ceiling == found.mean("tuned", "hr@1") == found.mean("retriever", "mrr") == pytest.approx(1 / 3)
    assert found.within("tuned", "hr@1") == 1.0
    assert list(found.users) == ["u0", "u1", "u2"]
    assert "test: 3 users, of whom 1 have their target" in found.table()
    assert found.to_json()["about"]["lists"] == 3
    some = evaluate_rankers(
        [prepared.lists("test")[0]], {"tuned": scores["tuned"][:1]}, targets=True, prepared=prepared
    )
    assert some.ceiling == 1.0  # lists drawn from a split speak of their own users alone


def test_all_targets_missed_is_zero(tmp_path):
    lists = lists_with_targets([None] * 5)
    scores = {"tuned": np.random.default_rng(0).normal(size=(5, 10)), "untuned": np.zeros((5, 10))}
    found = evaluate_rankers(lists, scores, targets=True, bootstrap=20)
    assert found.ceiling == 0.0
    assert {found.mean(name, metric) for name in found.per_list for metric in found.per_list[name]} == {0.0}
    assert "of whom 0 have their target" in found.table()
    assert "nan" not in found.table()
    document = json.loads(found.save(tmp_path).read_text())
    assert document["tuned"]["within_hr@3"] is None
    assert document["about"]["ceiling"] == 0.0
    if find_spec("matplotlib"):
        assert "0 hold their target" in write_report(tmp_path).read_text()


def test_trec_files_of_target_lists_hold_the_hits_alone(tmp_path):
    """1 for the target, 0 for the rest, so that HR over the lists in the files is ours within them."""
    lists = lists_with_targets([2, None, 7, None])
    scores = np.random.default_rng(1).normal(size=(4, 10))
    rankings = {
        "tuned": [make_ranking(one, np.arange(10)[None], row[None], "mean") for one, row in zip(lists, scores)],
        "untuned": [make_ranking(one, np.arange(10)[None], np.zeros((1, 10)), "mean") for one in lists],
    }
    measured = evaluate_rankers(lists, {"tuned": scores}, targets=True, bootstrap=0)
    saved = save_measurement(tmp_path, measured, lists, rankings, targets=True)
    assert json.loads((tmp_path / "results.json").read_text())["about"]["conventions"] == saved.conventions
    rows = [line.split() for line in (tmp_path / "qrels.trec").read_text().splitlines()]
    held = {(query, item): int(grade) for query, _, item, grade in rows}
    target = {(lists[n].list_id, lists[n].candidates[at].item_id) for n, at in ((0, 2), (2, 7))}
    assert len(held) == 20
    assert {key for key, grade in held.items() if grade == 1} == target
    assert {grade for key, grade in held.items() if key not in target} == {0}
    run = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    hits = [rank for query, _, item, rank, _, _ in run if (query, item) in target]
    assert len(run) == 20
    assert np.mean([int(rank) <= 5 for rank in hits]) == saved.within("tuned", "hr@5")
