"""`report A B`: two measurements of the same lists, paired list by list."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import random_lists

from alro_fast import report
from alro_fast.errors import AlroFastError
from alro_fast.evaluation import metrics
from alro_fast.evaluation.report.compare import compare
from alro_fast.evaluation.targets import evaluate_rankers, save_measurement
from alro_fast.ranking.orders import make_ranking


def measure(folder, lists, noise, gain="exp2"):
    """A run's files: scores are the ratings, less exact with more noise."""
    draw = np.random.default_rng(1)
    shown = np.arange(len(lists[0].candidates))[None]
    rows = [np.array([one.ratings]) + draw.normal(0, noise, (1, shown.size)) for one in lists]
    rankings = {"tuned": [make_ranking(one, shown, row, "mean") for one, row in zip(lists, rows)]}
    folder.mkdir(parents=True)
    scores = {"tuned": [ranking.scores for ranking in rankings["tuned"]]}
    results = evaluate_rankers(lists, scores, targets=False, bootstrap=50, gain=gain)
    save_measurement(folder, results, lists, rankings, targets=False)
    (folder / "config.yaml").write_text(f"learning_rate: {noise}\nseed: 1\noutput_dir: {folder}\nfuse: false\n")
    return results


@pytest.fixture
def lists():
    made = random_lists(50, 6, seed=2)
    return [replace(one, user_id=f"u{n % 20}") for n, one in enumerate(made)]


def test_differences_are_those_of_the_two_measurements(tmp_path, lists, capsys):
    first, second = measure(tmp_path / "a", lists, 3.0), measure(tmp_path / "b", lists, 0.5)
    report.main([str(tmp_path / "a"), str(tmp_path / "b")])
    said = capsys.readouterr().out
    one, two = (each.per_list["tuned"]["ndcg@3"] for each in (first, second))
    expected = metrics.compare(two, one, first.users)
    (row,) = [line.split() for line in said.splitlines() if line.startswith("NDCG@3 ")]
    assert row[1:4] == [f"{one.mean():.4f}", f"{two.mean():.4f}", f"{expected.difference:+.4f}"]
    assert "NDCG@3, paired over users: B is above A (p < .05)" in said
    folder = tmp_path / "b" / "comparison"
    with (folder / "tables" / "differences.csv").open() as file:
        (found,) = [line for line in csv.DictReader(file) if line["metric"] == "ndcg@3"]
    assert [float(found[name]) for name in ("difference", "low", "high", "p_value")] == pytest.approx(list(expected))
    with (folder / "tables" / "lists.csv").open() as file:
        each = list(csv.reader(file))[1:]
    assert [float(line[3]) for line in each] == two.tolist()
    page = (folder / "report.html").read_text()
    assert "<th>learning_rate</th><td>3.0</td><td>0.5</td>" in page
    for other in ("seed", "output_dir", "fuse"):
        assert f"<th>{other}</th>" not in page
    assert "Most gained by" in page
    assert 4 <= page.count("<article>") <= 8
    assert "<tr><th>HR@5</th>" in page
    assert "HR@10" not in page  # of six candidates


def test_a_run_against_itself_is_not_told_apart(tmp_path, lists, capsys):
    measure(tmp_path / "a", lists, 1.0)
    measure(tmp_path / "b", lists, 1.0)
    report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output_dir", str(tmp_path / "c")])
    assert "B is not told apart from A" in capsys.readouterr().out
    assert "chance alone could explain" in (tmp_path / "c" / "report.html").read_text()


def test_lists_of_one_alone_are_counted_and_left_out(tmp_path, lists):
    measure(tmp_path / "a", lists, 2.0)
    measure(tmp_path / "b", lists[:30], 1.0)
    made = compare(tmp_path / "a", tmp_path / "b")
    assert made.measured.lists == 30
    report.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "Lists that only one has: 20 and 0." in (tmp_path / "b" / "comparison" / "report.html").read_text()


def test_what_cannot_be_compared_is_said(tmp_path, lists):
    measure(tmp_path / "a", lists, 2.0)
    with pytest.raises(AlroFastError, match="twice the same folder"):
        compare(tmp_path / "a", tmp_path / "a")
    others = [replace(one, list_id=f"other {n}") for n, one in enumerate(lists)]
    measure(tmp_path / "others", others, 2.0)
    with pytest.raises(AlroFastError, match="share no list; evaluate both on the same lists and split"):
        compare(tmp_path / "a", tmp_path / "others")
    changed = [replace(lists[0], ratings=(1.0, 2.0, 3.0, 4.0, 5.0, 1.5)), *lists[1:]]
    measure(tmp_path / "changed", changed, 2.0)
    with pytest.raises(AlroFastError, match=f"list {lists[0].list_id} has other candidates or ratings"):
        compare(tmp_path / "a", tmp_path / "changed")
    measure(tmp_path / "linear", lists, 2.0, gain="linear")
    with pytest.raises(AlroFastError, match="were not measured alike"):
        compare(tmp_path / "a", tmp_path / "linear")
    (tmp_path / "linear" / "predictions.jsonl").unlink()
    with pytest.raises(AlroFastError, match=r"linear holds no predictions\.jsonl"):
        compare(tmp_path / "a", tmp_path / "linear")
    with pytest.raises(AlroFastError, match="--run is of one folder"):
        report.main([str(tmp_path / "a"), str(tmp_path / "changed"), "--run", str(tmp_path / "a")])
    with pytest.raises(AlroFastError, match="--output_dir is of two folders"):
        report.main([str(tmp_path / "a"), "--output_dir", str(tmp_path)])
    with pytest.raises(AlroFastError, match="is a file; expected a folder"):
        report.main([str(tmp_path / "a"), str(tmp_path / "a" / "results.json")])


def test_files_that_lack_a_field_are_said_to_be_damaged(tmp_path, lists):
    measure(tmp_path / "a", lists, 2.0)
    measure(tmp_path / "b", lists, 1.0)
    path = tmp_path / "b" / "predictions.jsonl"
    path.write_text(path.read_text().split("\n")[0].replace('"rankings"', '"orders"') + "\n")
    with pytest.raises(AlroFastError, match=r"predictions\.jsonl is damaged"):
        compare(tmp_path / "a", tmp_path / "b")
    path.write_text(json.dumps([1]) + "\n")
    with pytest.raises(AlroFastError, match=r"predictions\.jsonl is damaged"):
        compare(tmp_path / "a", tmp_path / "b")
