"""The report: its numbers, what it escapes, and how a real browser takes it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny import random_lists

from alro_fast import report
from alro_fast.errors import AlroFastError
from alro_fast.evaluation.plots import Plots, loss_plot, mean_by_position, ndcg_plot, order_taus, validation_plot
from alro_fast.evaluation.report import placed_rankers, report_line, write_report
from alro_fast.evaluation.results import evaluate_lists, write_predictions
from alro_fast.evaluation.targets import evaluate_rankers, save_measurement
from alro_fast.ranking.orders import make_ranking, presentations

EVIL = '<script src="http://evil.example/x.js">alert(1)</script> & "q" <img src=http://evil.example/y.png>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's files, from made scores: the untuned model clings to places, the tuned one knows the ratings better."""
    folder = tmp_path_factory.mktemp("report") / "run <1>"
    folder.mkdir()
    lists = random_lists(60, 8, seed=1)
    items = [item._replace(title=f"{EVIL}\u2028\x85") for item in lists[0].candidates]
    lists = [
        replace(entry, list_id=f"{entry.list_id} <b>", candidates=(*items[:3], *entry.candidates[3:]))
        for entry in lists
    ]
    generator, rankings = np.random.default_rng(0), {"untuned": [], "tuned": []}
    for entry in lists:
        shown = presentations(entry, 3, seed=0)
        places = np.argsort(shown, axis=1)
        rankings["untuned"].append(make_ranking(entry, shown, -places.astype(float), "mean"))
        rows = np.array(entry.ratings) + generator.normal(0, 0.5, (3, 8))
        rankings["tuned"].append(make_ranking(entry, shown, rows, "mean"))
    scores = {name: [ranking.scores for ranking in each] for name, each in rankings.items()}
    results = evaluate_lists(lists, scores | {"random": [np.zeros(8)] * 60, "popularity": [np.arange(8)] * 60})
    replace(
        results, seconds={"tuned": 2.0}, sensitivity={"untuned": 0.01, "tuned": 0.7}, about={"peak_memory_gib": 1.25}
    ).save(folder)
    write_predictions(folder / "predictions.jsonl", lists, rankings)
    history = [
        {"step": s, "loss": 2 / s, "sft": 1 / s, "lists_per_second": 30.0, "sharing_ratio": 1.8} for s in range(1, 9)
    ]
    history += [{"step": step, "eval_ndcg@3": 0.1 * step, "eval_ndcg@10": 0.8} for step in (4, 8)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "config.yaml").write_text("learning_rate: 0.0002\ntemplate: '<i>mine</i>'\n")
    write_report(folder)
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes, and whether tags close in order."""

    void = ("meta", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_every_section_and_closes_every_tag(folder):
    text = (folder / "report.html").read_text()
    tags = Tags(text)
    assert not tags.open
    for heading in (
        "Ranking quality", "Is the difference real?", "Does the place on the page matter?", "Training",
        "Speed and memory", "Twenty lists", "How it was measured", "Options of the run",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text, heading
    assert sum(tag == "article" for tag, _ in tags.seen) == 20
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "loss.png", "ndcg.png", "order.png", "position.png", "validation.png",
    ]  # fmt: skip
    assert sum(tag == "img" for tag, _ in tags.seen) == 5
    results = json.loads((folder / "results.json").read_text())
    assert f"{results['tuned']['ndcg@3']:.4f}" in text
    assert "30.0 lists/s" in text
    assert "1.25 GiB" in text
    assert "better</b>" in text
    assert "mean Kendall tau 0.700" in text
    assert f"no model, popularity, has NDCG@3 {results['popularity']['ndcg@3']:.4f}" in text


def test_nothing_comes_from_outside_and_nothing_runs(folder):
    text = (folder / "report.html").read_text()
    for tag, attributes in Tags(text).seen:
        assert tag != "script"
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "&lt;script src=" in text
    assert "<title>Ranking report: run &lt;1&gt;</title>" in text
    assert "&lt;i&gt;mine" in text


def test_position_curve_and_order_taus():
    shown = [[0, 1, 2], [2, 1, 0]]  # always 3, 2, 1 from the top of the page, whatever is there
    presented = [{"shown": order, "scores": [3.0 - order.index(i) for i in range(3)]} for order in shown]
    document = {
        "candidates": [{}] * 3,
        "rankings": {"tuned": {"order": [0, 1, 2], "scores": [2.0, 2.0, 2.0], "presentations": presented}},
    }
    means, errors = mean_by_position([document, document], "tuned")
    assert means.tolist() == [1.0, 0.0, -1.0]
    assert errors.tolist() == [0.0, 0.0, 0.0]
    assert order_taus([document], "tuned").tolist() == [-1.0]
    single = {"candidates": [{}] * 2, "rankings": {"tuned": {"order": [1, 0], "scores": [1.0, 3.0]}}}
    assert mean_by_position([single], "tuned")[0].tolist() == [-1.0, 1.0]
    assert not len(order_taus([single], "tuned"))
    assert not len(mean_by_position([single], "untuned")[0])


def lists_with_targets(count: int) -> list:
    """Ten candidates a list, the target rated; every fourth list was missed."""
    return [
        replace(one, ratings=tuple(4.5 if i == n % 10 and n % 4 else math.nan for i in range(10)))
        for n, one in enumerate(random_lists(count, 10, items=400))
    ]


def test_a_report_of_a_first_stages_lists(tmp_path):
    """Lists with their target as examples, unread answers, what the hybrid's places mean, one validation in words."""
    lists, draw = lists_with_targets(12), np.random.default_rng(0)
    shown = np.arange(10)[None]
    rankings = {
        name: [make_ranking(one, shown, draw.normal(size=(1, 10)), "mean") for one in lists]
        for name in ("untuned", "pointwise", "listwise", "tuned")
    }
    scores = {name: [one.scores for one in each] for name, each in rankings.items()}
    results = replace(
        evaluate_rankers(lists, scores, targets=True, bootstrap=20), about={"generate_invalid_rate": 0.125}
    )
    hybrid = results.noting(rankings="method hybrid (code constants, pairing matching), seed 0")
    save_measurement(tmp_path, hybrid, lists, rankings, targets=True)
    state = {"log_history": [{"step": 7, "eval_ndcg@3": 0.4321, "eval_loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    text = write_report(tmp_path).read_text()
    assert text.count("<article>") == 9
    first = results.per_list["tuned"]["ndcg@3"][1]
    assert "<h3>List l1</h3><div class=sides><div><h4>untuned <small>NDCG@3" in text
    assert f"<h4>tuned <small>NDCG@3 {first:.3f}" in text
    assert "tuned, generate: of 12.5% of the lists an answer could not be read in full" in text
    assert "measured once, after step 7: NDCG@3 0.4321." in text
    assert "they count the place in the list as given by definition" in text
    assert "1 where it repeats that order: untuned " in text
    assert "<h2>For whom is it good?</h2>" in text
    assert "items in the history shown</th><th>lists</th><th>users</th><th>tuned</th><th>untuned</th>" in text
    for other in ("retriever", "untuned"):
        assert f"<th>tuned - {other}</th>" in text
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["ndcg.png", "position.png"]
    figure = results.noting(rankings="method hybrid (figure constants, pairing matching), seed 0")
    assert placed_rankers(hybrid.to_json())[0] == ("listwise",)
    assert placed_rankers(figure.to_json()) == placed_rankers({"about": {}}) == (("untuned", "tuned"), "")
    for constants, shown in (
        ("order=1", ("listwise",)),
        ("win=1", ("untuned", "tuned")),
        ("paper", ("untuned", "tuned")),
    ):
        own = results.noting(rankings=f"method hybrid ({constants} constants, pairing matching), seed 0")
        assert placed_rankers(own.to_json())[0] == shown


def test_marks_of_a_cutoff_stay_together_and_steps_are_whole():
    measured = {"ndcg@1": 0.5, "ndcg@1_interval": [0.4, 0.6], "ndcg@3": 0.5, "ndcg@3_interval": [0.4, 0.6]}
    axes = Figure().add_subplot()
    ndcg_plot(axes, {f"r{n}": measured for n in range(12)} | {"about": {}})
    places = np.array([line.lines[0].get_xdata() for line in axes.containers])
    assert places.shape == (12, 2)
    assert np.abs(places - [0, 1]).max() < 0.4
    axes = Figure().add_subplot()
    assert loss_plot(axes, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert all(tick == round(tick) for tick in axes.get_xticks())
    assert not validation_plot(Figure().add_subplot(), [{"step": 8, "eval_ndcg@3": 0.5}])


def test_a_folder_with_results_alone(tmp_path, capsys):
    lists = random_lists(3, 4)
    results = evaluate_lists(lists, {"tuned": [np.arange(4)] * 3}, bootstrap=0)
    results.save(tmp_path)
    report.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    Tags(text)
    assert "<h2>Training</h2>" not in text
    assert "Twenty lists" not in text
    nothing = evaluate_lists([replace(lists[0], ratings=(1.0,) * 4)], {"tuned": [np.arange(4)]})
    nothing.save(tmp_path)
    write_report(tmp_path)  # no list to rank: a page without numbers, not an error


def test_what_cannot_be_reported_is_said(tmp_path, monkeypatch):
    with pytest.raises(AlroFastError, match=r"holds no results\.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(AlroFastError, match=r"results\.json is damaged"):
        write_report(tmp_path)
    evaluate_lists(random_lists(2, 4), {"tuned": [np.arange(4)] * 2}, bootstrap=0).save(tmp_path)
    (tmp_path / "predictions.jsonl").write_text("nonsense\n")
    with pytest.raises(AlroFastError, match=r"predictions\.jsonl is damaged"):
        write_report(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AlroFastError, match="plots need matplotlib"):
        Plots(tmp_path)


def test_a_report_that_fails_is_one_line(tmp_path):
    assert report_line(tmp_path) == f"no report.html: {tmp_path} holds no results.json of alro_fast; run " + (
        "alro_fast.evaluate or alro_fast.train"
    )
    evaluate_lists(random_lists(2, 4), {"tuned": [np.arange(4)] * 2}, bootstrap=0).save(tmp_path)
    assert report_line(tmp_path) == f"report: {tmp_path / 'report.html'}"
    (tmp_path / "trainer_state.json").write_text('{"log_history": 3}')
    line = report_line(tmp_path)
    assert line.startswith("no report.html: ")
    assert "\n" not in line


def console(page) -> list[str]:
    """Console messages of headless Chromium on a page; a request that is refused is one of them."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1280,3000"]
    screenshot = f"--screenshot={page.parent / 'page.png'}"
    command = [browser, *options, screenshot, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return re.findall(r".*CONSOLE.*", done.stderr)


def test_a_browser_shows_it_without_complaint(folder, tmp_path):
    page = tmp_path / "report.html"
    text = (folder / "report.html").read_text()
    page.write_text(text)
    assert console(page) == []
    assert (tmp_path / "page.png").stat().st_size > 50_000
    page.write_text(text.replace("</body>", "<img src='http://evil.example/x.png'></body>"))
    assert "evil.example" in console(page)[0]  # this check can fail
