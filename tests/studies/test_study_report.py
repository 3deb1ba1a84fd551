"""The page of a study: its rows, its plot, and what is refused."""

from __future__ import annotations

import json

import pytest

from alro_fast import report
from alro_fast.errors import AlroFastError
from alro_fast.studies.report import is_study, write_study_report

ROW = {"variant": "plain", "mean": 0.5, "seed_sd": None, "by_seed": {"0": 0.5}}
BESIDE = {
    "variant": "<b>full</b>", "mean": 0.6, "seed_sd": None, "by_seed": {"0": 0.6}, "difference": 0.1, "low": 0.05,
    "high": 0.15, "p_value": 0.0004, "difference_seed_sd": None, "difference_by_seed": {"0": 0.1}, "pairs": 1200,
    "users": 600,
}  # fmt: skip
STUDY = {
    "name": "s", "base": {"config": "demo"}, "variants": {"plain": {}, "<b>full</b>": {"alpha": 1}}, "seeds": [0],
    "metric": "ndcg@3", "ranker": "tuned", "baseline": "plain",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    told = {"study": STUDY, "untuned": {"ndcg@3": 0.4}, "measures": {"ndcg@3": [ROW, BESIDE]}}
    (tmp_path / "table.json").write_text(json.dumps(told))
    return tmp_path


def test_the_page_has_every_row_and_nothing_runs_in_it(folder, capsys):
    run = folder / "runs" / "full v" / "seed-0"
    (run / "evaluation").mkdir(parents=True)
    for place in (run, run / "evaluation"):
        (place / "report.html").touch()
    report.main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "<td>+0.1000</td><td>0.0500 to 0.1500</td><td>&lt; .001</td>\n<td>1 of 1</td>" in text
    assert "Paired over 1,200 differences; 600 users" in text
    assert "Untuned: 0.4000." in text
    assert "&lt;b&gt;full" in text
    assert "<b>full" not in text
    assert text.count("<s style=") == 1  # a circle for the one seed
    assert text.count("<a href=") == 1
    assert '<a href="runs/full%20v/seed-0/report.html">full v/seed-0</a>' in text


def test_what_is_no_study_or_a_damaged_one_is_said(folder, tmp_path_factory):
    (folder / "config.yaml").touch()
    with pytest.raises(AlroFastError, match="--run is no option of a study"):
        report.main([str(folder), "--run", str(folder)])
    (folder / "table.json").write_text("{}")
    with pytest.raises(AlroFastError, match=r"table.json is damaged"):
        write_study_report(folder)
    for wrong in ("a row", [ROW, "a row"], [ROW, {**BESIDE, "p_value": "small"}], [{"variant": "plain"}], 3):
        told = {"study": STUDY, "untuned": {}, "measures": {"ndcg@3": wrong}}
        (folder / "table.json").write_text(json.dumps(told))
        with pytest.raises(AlroFastError, match=r"table.json is damaged"):
            write_study_report(folder)
    with pytest.raises(AlroFastError, match=r"table.json is a file; expected a folder with results.json"):
        report.main([str(folder / "table.json")])
    assert not is_study(tmp_path_factory.mktemp("other"))
