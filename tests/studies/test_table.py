"""The table of a study: its figures against ones computed by hand, and what it refuses to read."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from alro_fast.errors import AlroFastError
from alro_fast.evaluation import metrics
from alro_fast.studies.figures import AGREEMENT, Figures, by_user, figures
from alro_fast.studies.plan import PlannedRun, Study
from alro_fast.studies.table import pairs, row, table, to_json, to_markdown, write


def of(values, catalogue="films"):
    """Figures of lists l0, l1, ... of users u0, u1, ..."""
    names = [f"l{i}" for i in range(len(values))]
    return Figures(dict(zip(names, values)), {name: f"u{name[1:]}" for name in names}, catalogue)


def test_means_differences_and_spreads_by_hand():
    base = {0: of([0.5, 0.6, 0.7]), 1: of([0.4, 0.4, 0.4])}
    mine = {0: of([0.6, 0.8, 0.7]), 1: of([0.4, 0.7, 0.4])}
    found = row("mine", mine, base, "base")
    assert found.by_seed == pytest.approx({0: 0.7, 1: 0.5})
    assert found.mean == pytest.approx(0.6)
    assert found.spread == pytest.approx(0.2 / math.sqrt(2))
    assert found.differences == pytest.approx({0: 0.1, 1: 0.1})
    assert found.difference.difference == pytest.approx(0.6 / 6)
    assert found.difference_spread == pytest.approx(0.0)
    assert (found.pairs, found.users) == (6, 3)
    # user sums .1, .5, 0: of the 8 sign patterns, those with |+-.1 +-.5 +-0| >= .6 are 4
    assert found.difference.p_value == 0.5


def test_a_user_of_one_catalogue_is_drawn_with_all_seeds_and_of_several_is_several_users():
    up, down = of([1.0, 0.0]), of([0.0, 0.0])
    shared = row("a", {0: up, 1: up, 2: up}, {0: down, 1: down, 2: down}, "b")
    assert (shared.pairs, shared.users) == (6, 2)
    apart = {seed: (up._replace(catalogue=str(seed)), down._replace(catalogue=str(seed))) for seed in range(3)}
    drawn = row("a", {s: one for s, (one, _) in apart.items()}, {s: two for s, (_, two) in apart.items()}, "b")
    assert (drawn.pairs, drawn.users) == (6, 6)
    assert drawn.difference.difference == shared.difference.difference == 0.5
    assert drawn.difference.high - drawn.difference.low < shared.difference.high - shared.difference.low
    expected = metrics.compare(np.array([1.0, 0.0] * 3), np.zeros(6))
    assert drawn.difference.p_value == expected.p_value


def test_only_seeds_of_both_are_compared():
    found = row("a", {0: of([0.5]), 1: of([0.9])}, {1: of([0.6]), 2: of([0.1])}, "b")
    assert found.mean == pytest.approx(0.7)
    assert found.differences == pytest.approx({1: 0.3})
    assert row("a", {0: of([0.5])}, {2: of([0.1])}, "b").difference is None
    assert row("b", {0: of([0.5])}, {0: of([0.5])}, "b").difference is None


def test_other_lists_are_paired_by_user():
    mine = Figures({"x": 0.2, "y": 0.4, "z": 0.9}, {"x": "ann", "y": "ann", "z": "bob"}, "films")
    base = Figures({"p": 0.1, "q": 0.5}, {"p": "ann", "q": "cid"}, "films")
    assert by_user(mine).values == pytest.approx({"ann": 0.3, "bob": 0.9})
    differences, users = pairs(mine, base)
    assert differences == pytest.approx([0.2])
    assert list(users) == ["films/ann"]


def study_of(folder, runs, **changes):
    keys = {
        "name": "made", "folder": folder, "variants": {"base": {}, "mine": {"alpha": 1}}, "base": {}, "seeds": (0,),
        "metric": "ndcg@3", "ranker": "tuned", "measured_on": None, "baseline": "base", "evaluate": {},
        "ranks_lists": True, "runs": tuple(runs),
    }  # fmt: skip
    return Study(**keys | changes)


def planned(folder, variant):
    place = folder / "runs" / variant / "seed-0"
    place.mkdir(parents=True)
    return PlannedRun(variant, 0, place, (), {place: {}})


def lay_rankings(folder, scores, reported, **more):
    """What a run on rankings leaves, of three lists with ratings 3, 2, 1 of which the last has but equal ones."""
    lines = []
    for at, each in enumerate(scores):
        ratings = [3.0, 2.0, 1.0] if at < 2 else [2.0, 2.0, 2.0]
        candidates = [{"id": f"i{i}", "title": f"T{i}", "rating": rating} for i, rating in enumerate(ratings)]
        rankings = {"tuned": {"order": [], "scores": each} | more}
        lines.append({"list_id": f"l{at}", "user_id": f"u{at}", "candidates": candidates, "rankings": rankings})
    folder.mkdir(exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps({"tuned": reported, "untuned": reported, "about": {}}))
    (folder / "data_manifest.json").write_text(json.dumps({"files": {"items.parquet": {"sha256": "abc"}}}))


def dcg(gains):
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))


def test_from_the_files_of_runs_to_the_tables(tmp_path):
    base, mine = planned(tmp_path, "base"), planned(tmp_path, "mine")
    best, turned = 1.0, dcg([1, 3, 7]) / dcg([7, 3, 1])  # gains 2^rating - 1
    lay_rankings(base.folder, [[1, 2, 3], [3, 2, 1], [1, 2, 3]], {"ndcg@3": (turned + best) / 2})
    lay_rankings(mine.folder, [[3, 2, 1], [3, 2, 1], [1, 2, 3]], {"ndcg@3": best})
    study = study_of(tmp_path, [base, mine])
    measured, unread = table(study)
    assert not unread
    assert list(measured) == ["ndcg@3"]
    first, second = measured["ndcg@3"]
    assert (first.variant, second.variant) == ("base", "mine")
    assert (first.mean, second.mean) == (pytest.approx((turned + 1) / 2), pytest.approx(1.0))
    assert second.difference.difference == pytest.approx((1 - turned) / 2)
    assert second.pairs == 2

    paths = write(study, measured)
    assert {path.name for path in paths} == {"table.md", "table.json", "table.csv", "differences.png"}
    assert all(path.stat().st_size for path in paths)
    told = json.loads((tmp_path / "table.json").read_text())
    assert told == to_json(study, measured)
    assert told["measures"]["ndcg@3"][1]["difference_by_seed"] == {"0": pytest.approx((1 - turned) / 2)}
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [one["variant"] for one in rows] == ["base", "mine"]
    assert float(rows[1]["difference"]) == pytest.approx((1 - turned) / 2)
    text = to_markdown(study, measured)
    assert f"| mine | 1 | 1.0000 |  | {(1 - turned) / 2:+.4f} |" in text
    assert "1 of 1" in text


def test_a_table_of_what_is_there_where_runs_failed(tmp_path):
    base, mine = planned(tmp_path, "base"), planned(tmp_path, "mine")
    lay_rankings(mine.folder, [[3, 2, 1], [3, 2, 1], [1, 2, 3]], {"ndcg@3": 1.0})
    measured, _ = table(study_of(tmp_path, [base, mine]))
    assert [one.variant for one in measured["ndcg@3"]] == ["mine"]
    assert write(study_of(tmp_path, [base, mine]), measured)


def test_agreement_is_the_mean_tau_of_all_pairs_of_presentations(tmp_path):
    run = planned(tmp_path, "base")
    lay_rankings(run.folder, [[3, 2, 1], [3, 2, 1], [1, 2, 3]], {"ndcg@3": 1.0})
    study = study_of(tmp_path, [run], evaluate={"shuffles": 3})
    presented = [{"shown": [], "scores": scores} for scores in ([3, 2, 1], [3, 2, 1], [2, 3, 1])]
    reported = {"order_kendall_tau": 5 / 9}
    lay_rankings(study.evaluation(run), [[3, 2, 1]] * 3, reported, presentations=presented)
    found = figures(study, run)[AGREEMENT]
    assert found.values == pytest.approx({"l0": (1 + 1 / 3 + 1 / 3) / 3, "l1": 5 / 9, "l2": 5 / 9})
    assert "Untuned: 0.5556." in to_markdown(study, table(study)[0])


@pytest.mark.parametrize(
    "metric, values",
    [
        ("pair_accuracy", {"0/0": 1.0, "0/1": 0.0, "1/0": 1.0, "1/1": 0.5}),
        ("user_auc", {"ann": 0.5, "bob": 0.75}),
        ("hit@1", {"0": 0.0, "1": 0.5}),
        ("valid", {"0": 1.0, "1": 1.0, "2": 0.0}),
    ],
)
def test_preference_figures_by_hand(tmp_path, metric, values):
    run = planned(tmp_path, "base")
    records = [("ann", [-1.0], [-2.0, -0.5]), ("bob", [-1.0], [-2.0, -1.0]), ("cid", [None], [-1.0])]
    lines = [
        {"data": "films", "record": at, "user_id": user, "paired": False,
         "rankings": {"tuned": {"chosen": chosen, "rejected": rejected}}}
        for at, (user, chosen, rejected) in enumerate(records)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "preference_predictions.jsonl").write_text(text)
    mean = float(np.mean(list(values.values())))
    (run.folder / "preference_results.json").write_text(json.dumps({"films": {"tuned": {metric: mean}}}))
    (run.folder / "data_manifest.json").write_text(json.dumps({"files": {"eval: films.json": "abc"}}))
    study = study_of(tmp_path, [run], ranks_lists=False, metric=metric)
    found = figures(study, run)[metric]
    assert found.values == pytest.approx(values)
    assert found.catalogue == "films"
    with pytest.raises(AlroFastError, match=r"measured_on: 'games' was not measured by .*: it has films"):
        figures(study_of(tmp_path, [run], ranks_lists=False, metric=metric, measured_on="games"), run)


def test_files_that_disagree_or_lack_what_is_asked_for(tmp_path):
    run = planned(tmp_path, "base")
    lay_rankings(run.folder, [[3, 2, 1], [3, 2, 1], [1, 2, 3]], {"ndcg@3": 0.9})
    with pytest.raises(AlroFastError, match=r"gives 1.000000 where results.json reports 0.900000"):
        figures(study_of(tmp_path, [run]), run)
    with pytest.raises(AlroFastError, match=r"ranker: 'hints' is none of .*: it has tuned"):
        figures(study_of(tmp_path, [run], ranker="hints"), run)
    (run.folder / "predictions.jsonl").unlink()
    with pytest.raises(AlroFastError, match="is gone; remove the run's folder"):
        figures(study_of(tmp_path, [run]), run)


@pytest.mark.parametrize("name", ["predictions.jsonl", "results.json", "data_manifest.json"])
@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: "[]\n", lambda text: "{}\n", lambda text: ""])
def test_a_damaged_file_of_one_run_is_named_and_the_others_are_compared(tmp_path, name, damage):
    base, mine = planned(tmp_path, "base"), planned(tmp_path, "mine")
    for run in (base, mine):
        lay_rankings(run.folder, [[3, 2, 1], [3, 2, 1], [1, 2, 3]], {"ndcg@3": 1.0})
    (base.folder / name).write_text(damage((base.folder / name).read_text()))
    study = study_of(tmp_path, [base, mine])
    measured, unread = table(study)
    assert [one.variant for one in measured["ndcg@3"]] == ["mine"]
    assert list(unread) == ["base, seed 0"]
    assert name in unread["base, seed 0"]
    assert unread["base, seed 0"].endswith("remove the run's folder, and it is run again")
    assert write(study, measured)
