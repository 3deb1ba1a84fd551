"""The report: its numbers, what it escapes, and how a real browser takes it."""

from __future__ import annotations

import base64
import csv
import html
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
from tiny import random_lists

from alro_fast import report
from alro_fast.errors import AlroFastError
from alro_fast.evaluation.plots import sampling_plot
from alro_fast.evaluation.report import report_line, write_comparison, write_report
from alro_fast.evaluation.report.examples import examples
from alro_fast.evaluation.report.figures import Line, Span, lines, loss_chart, nice_step, order_chart, validation_chart
from alro_fast.evaluation.report.numbers import mean_by_position, order_taus, placed_rankers, varying
from alro_fast.evaluation.results import evaluate_lists, write_predictions
from alro_fast.evaluation.targets import evaluate_rankers, save_measurement
from alro_fast.ranking.orders import make_ranking, presentations

EVIL = '<script src="http://evil.example/x.js">alert(1)</script> & "q" <img src=http://evil.example/y.png>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's files, from made scores: the untuned model clings to places, the tuned one knows the ratings better."""
    folder = tmp_path_factory.mktemp("report") / "run <1>"
    folder.mkdir()
    lists = random_lists(60, 8, seed=1, history=12)
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
        "Speed and memory", "Lists", "How it was measured", "Options of the run",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text, heading
    assert sum(tag == "article" for tag, _ in tags.seen) == 20
    assert sum(tag == "figure" for tag, _ in tags.seen) == 4
    results = json.loads((folder / "results.json").read_text())
    assert f"{results['tuned']['ndcg@3']:.4f}" in text
    assert "30.0 lists/s" in text
    assert "1.25 GiB" in text
    assert "better</b>" in text
    assert "mean Kendall tau 0.700" in text
    assert f"<b>{results['popularity']['ndcg@3']:.4f}</b><span>popularity, the best without a model</span>" in text
    assert "<small>the last 10 of 12</small>" in text


def test_every_table_and_figure_is_a_file_too_and_travels_in_the_page(folder):
    results = json.loads((folder / "results.json").read_text())
    names = ["differences", "loss", "order", "position", "quality", "speed", "validation"]
    assert sorted(path.stem for path in (folder / "tables").iterdir()) == names  # without a folder: no segments
    with (folder / "tables" / "quality.csv").open() as file:
        quality = {row["ranker"]: row for row in csv.DictReader(file)}
    assert float(quality["tuned"]["ndcg@3"]) == results["tuned"]["ndcg@3"]
    assert float(quality["tuned"]["ndcg@3 low"]) == results["tuned"]["ndcg@3_interval"][0]
    assert float(quality["tuned"]["hr@10"]) == 1.0  # in the table of all, though not on the page
    text = (folder / "report.html").read_text()
    for name, code in re.findall(r'download="(\w+)\.csv" href="data:text/csv;base64,([^"]+)"', text):
        assert base64.b64decode(code).decode() == (folder / "tables" / f"{name}.csv").read_text()
        names.remove(name)
    assert not names
    (folder / "tables" / "old.csv").touch()
    write_report(folder)
    assert not (folder / "tables" / "old.csv").exists()


def test_what_cannot_vary_is_left_out():
    """HR@10 of ten candidates is 1 whatever their order, and a single segment is everything."""
    rankers = {"a": {"hr@1": 0.5, "hr@10": 1.0, "mrr": None}, "b": {"hr@1": 0.4, "hr@10": 1.0, "mrr": None}}
    assert varying(rankers | {"about": {}}, ["hr@1", "hr@10", "mrr"]) == (["hr@1", "mrr"], {"hr@10": 1.0})
    assert varying({"a": rankers["a"], "about": {}}, ["hr@10"]) == (["hr@10"], {})  # nothing to be told from


def test_lists_are_the_best_the_worst_and_others(folder):
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().split("\n") if line]
    found = examples(predictions, False, "ndcg@3")
    assert [len(each) for each in found.values()] == [4, 4, 12]
    values = [[{c.ranker: c.value for c in one.columns}["tuned"] for one in each] for each in found.values()]
    best, worst, drawn = values
    assert min(best) >= max(drawn) >= min(drawn) >= max(worst)
    assert len({one.list_id for each in found.values() for one in each}) == 20
    assert worst == sorted(worst)
    (one, *_) = found["Where it is best"]
    assert (len(one.history), one.history_length) == (10, 12)
    old = [{key: value for key, value in line.items() if "history" not in key} for line in predictions]
    assert examples(old, False, "ndcg@3")["Where it is best"][0].history == ()
    assert not examples([], False, "ndcg@3")


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
    first = results.per_list["tuned"]["ndcg@5"][1]
    assert "<h3>List l1</h3><div class=sides><div class=past><h4>history" in text
    assert f"<h4>tuned <small>NDCG@5 {first:.3f}" in text
    assert "tuned, generate: of 12.5% of the lists an answer could not be read in full" in text
    assert "measured once, after step 7: NDCG@3 0.4321." in text
    assert "they count the place in the list as given by definition" in text
    assert "1 where it repeats that order: untuned " in text
    assert "<h2>For whom is it good?</h2>" not in text  # all histories are of one length
    assert "HR@10" in text.split("Left out, since no order of these lists changes it: ")[1].split("</p>")[0]
    for other in ("retriever", "untuned"):
        assert f"<div>tuned - {other}</div>" in text
    assert "position.csv" in text
    assert "order.csv" not in text
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


def test_lines_are_drawn_where_their_numbers_say():
    chart = lines("c", "t", "x", "y", [Line("a", [1, 2, 3], [0.0, 1.0, 0.5]), Line("one point", [1], [1.0])])
    (mark,) = chart.marks
    x, y = zip(*(map(float, point.split(",")) for point in mark.points.split()))
    assert x == (0, 50, 100)
    assert y[0] > y[2] > y[1]  # SVG counts from the top
    assert (y[0] + y[1]) / 2 == pytest.approx(y[2], abs=0.02)
    assert [text for _, text in chart.x_ticks] == ["1", "2", "3"]  # steps are whole
    assert chart.table.rows == [("a", 1, 0.0), ("a", 2, 1.0), ("a", 3, 0.5)]
    assert loss_chart([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": math.nan}])
    assert validation_chart([{"step": 8, "eval_ndcg@3": 0.5}]) is None
    assert order_chart([]) is None


@pytest.mark.parametrize("least, step", [(0.3, 0.5), (0.097, 0.1), (1, 1), (11, 20), (6, 10), (0, 1), (math.nan, 1)])
def test_steps_are_round(least, step):
    assert nice_step(least) == pytest.approx(step)


def test_ticks_stay_within_the_ends():
    ticks = Span(-0.061, 0.113).ticks(6)
    assert ticks == pytest.approx([-0.05, 0, 0.05, 0.1])
    assert Span(2, 2).at(2) == "50"


def test_a_folder_with_results_alone(tmp_path, capsys):
    lists = random_lists(3, 4)
    results = evaluate_lists(lists, {"tuned": [np.arange(4)] * 3}, bootstrap=0)
    results.save(tmp_path)
    report.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    Tags(text)
    assert "<h2>Training</h2>" not in text
    assert "<article>" not in text
    nothing = evaluate_lists([replace(lists[0], ratings=(1.0,) * 4)], {"tuned": [np.arange(4)]})
    nothing.save(tmp_path)
    write_report(tmp_path)  # no list to rank: a page without numbers, not an error


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(AlroFastError, match=r"holds no results\.json"):
        write_report(tmp_path)
    for text in ("{", "[" * 100_000):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(AlroFastError, match=r"results\.json is damaged: it is n"):
            write_report(tmp_path)
    evaluate_lists(random_lists(2, 4), {"tuned": [np.arange(4)] * 2}, bootstrap=0).save(tmp_path)
    for text in ("nonsense\n", "[" * 100_000):
        (tmp_path / "predictions.jsonl").write_text(text)
        with pytest.raises(AlroFastError, match=r"predictions\.jsonl is damaged: line 1 is n"):
            write_report(tmp_path)
    (tmp_path / "predictions.jsonl").unlink()
    (tmp_path / "trainer_state.json").write_text("[" * 100_000)
    with pytest.raises(AlroFastError, match=r"trainer_state\.json is damaged: it is nested too deeply"):
        write_report(tmp_path)


def test_it_needs_no_matplotlib(folder, tmp_path, monkeypatch):
    """Of the default install; the one plot that does says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = (folder / "report.html").read_text()
    assert write_report(folder).read_text() == before
    with pytest.raises(AlroFastError, match=r"plots need matplotlib; install it with: pip install '\S+\[plots\]'"):
        sampling_plot(tmp_path / "sampling.png", None)


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


MEASURE = """
const inner = document.querySelector("iframe"), page = inner.contentDocument, view = inner.contentWindow;
const all = [...page.body.querySelectorAll("*")].filter(one => one.getClientRects().length && !one.closest("svg"));
const told = one => one.tagName + "." + one.className + " " + one.textContent.trim().slice(0, 30);
const right = one => one.getBoundingClientRect().right;
const within = [...page.querySelectorAll(".cards")].map(one => view.getComputedStyle(one).gridTemplateColumns);
document.title = JSON.stringify({
  wide: page.documentElement.scrollWidth,
  over: all.filter(one => !one.closest(".scroll table") && right(one) > inner.clientWidth + 1).map(told),
  smallest: Math.min(...all.filter(one => [...one.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
    .map(one => parseFloat(view.getComputedStyle(one).fontSize))),
  figures: [...page.querySelectorAll("figure .plot")].map(one => one.getBoundingClientRect().width),
  columns: within.length ? within[0].split(" ").length : 0,
});
"""


def chromium() -> list[str]:
    """The command of a headless Chromium, without a page; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no Chromium on this machine ({', '.join(names)})")
    return [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]


def laid_out(page: str, folder, width: int) -> dict:
    """How a page comes out at a width in pixels, in a frame of it, as windows cannot be narrower than 500.

    wide: pixels that it scrolls over; over: elements that reach beyond the right edge, but for those of tables that
    scroll; smallest: text, in pixels; figures: their widths; columns: of the cards.
    """
    (folder / "page.html").write_text(page)
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
    script = f"onload = () => {{ {MEASURE} }}"
    outer = folder / "frame.html"
    outer.write_text(f"<!doctype html><title></title><script>{script}</script><body style='margin:0'>{frame}")
    command = [*chromium(), "--allow-file-access-from-files", "--window-size=1400,1000", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, flags=re.S)[1]))


def console(page) -> list[str]:
    """Console messages of headless Chromium on a page; a request that is refused is one of them."""
    done = subprocess.run([*chromium(), "--screenshot=" + str(page.parent / "page.png"), "--window-size=1280,3000",
                           page.as_uri()], capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    return re.findall(r".*CONSOLE.*", done.stderr)


def test_a_browser_shows_it_without_complaint(folder, tmp_path):
    page = tmp_path / "report.html"
    text = (folder / "report.html").read_text()
    page.write_text(text)
    assert console(page) == []
    assert (tmp_path / "page.png").stat().st_size > 50_000
    page.write_text(text.replace("</body>", "<img src='http://evil.example/x.png'></body>"))
    assert "evil.example" in console(page)[0]  # this check can fail


@pytest.mark.parametrize("width", [1280, 400])
def test_it_can_be_read_at_the_width_of_a_desk_and_of_a_telephone(folder, tmp_path, width):
    """Nothing reaches over the edge but within what scrolls, no text shrinks, figures are as wide as the page."""
    found = laid_out((folder / "report.html").read_text(), tmp_path, width)
    assert found["wide"] <= width
    assert found["over"] == []
    assert found["smallest"] >= 12
    assert len(found["figures"]) == 4
    assert min(found["figures"]) > 0.6 * min(width, 1080)
    assert found["columns"] == (2 if width > 1000 else 1)
    broken = (folder / "report.html").read_text().replace("</body>", "<div style='width:1500px'>wide</div></body>")
    assert laid_out(broken, tmp_path, width)["over"]  # this check can fail


def test_two_runs_with_long_names_can_be_read_on_a_telephone(folder, tmp_path):
    other = tmp_path / ("a_run_with_a_long_name" * 3)
    shutil.copytree(folder, other)
    lines = (other / "predictions.jsonl").read_text().split("\n")
    (other / "predictions.jsonl").write_text("\n".join(lines[5:]))
    page, _ = write_comparison(folder, other)
    found = laid_out(page.read_text(), tmp_path, 400)
    assert found["over"] == []
    assert found["wide"] <= 400
