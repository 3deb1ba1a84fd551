"""Reports of folders whose files somebody changed: the file and the field are named, and nothing is a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tiny import random_lists

from alro_fast.errors import AlroFastError
from alro_fast.evaluation.report import write_report
from alro_fast.evaluation.targets import evaluate_rankers, save_measurement
from alro_fast.ranking.orders import make_ranking, presentations

JUNK = (5, -1, 1e308, "abc", None, True, [], [1, 2], {}, {"a": 1}, "gone")


def fields(value, place=()):
    """The place of every value within a JSON value."""
    found = [place] if place else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [each for key, one in inner for each in fields(one, (*place, key))]


def spoilt(value, place, junk):
    """A copy with `junk` at a place, or nothing there."""
    value = copy.deepcopy(value)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if junk == "gone":
        del holder[place[-1]]
    else:
        holder[place[-1]] = junk
    return value


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small run's folder, and what its files hold."""
    folder = tmp_path_factory.mktemp("small")
    lists = [replace(one, history=one.history[: n % 3]) for n, one in enumerate(random_lists(6, 4, seed=1, history=3))]
    lists = [replace(one, history_ratings=one.history_ratings[: len(one.history)]) for one in lists]
    rankings = {}
    for name in ("untuned", "tuned"):
        rows = np.random.default_rng(len(name)).normal(size=(6, 2, 4))
        rankings[name] = [
            make_ranking(one, presentations(one, 2, seed=0), row, "mean") for one, row in zip(lists, rows)
        ]
    scores = {name: [one.scores for one in each] for name, each in rankings.items()}
    results = evaluate_rankers(lists, scores | {"popularity": [np.arange(4)] * 6}, targets=False, bootstrap=20)
    save_measurement(folder, replace(results, about={"peak_memory_gib": 1.0}), lists, rankings, targets=False)
    history = [{"step": n, "loss": 1 / n, "eval_ndcg@3": 0.5, "lists_per_second": 3.0} for n in (1, 2)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    write_report(folder)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    state = json.loads((folder / "trainer_state.json").read_text())
    return folder, {"results.json": json.loads((folder / "results.json").read_text()), "predictions.jsonl": lines,
                    "trainer_state.json": state}  # fmt: skip


@contextlib.contextmanager
def named(folder, name):
    """Errors within it are of that file."""
    try:
        yield
    except AlroFastError as error:
        told = str(error)
        if not told.startswith(f"{folder / name} is damaged: ") and "holds no results.json" not in told:
            pytest.fail(told)
        raise


def written(name, value) -> str:
    return "".join(json.dumps(line) + "\n" for line in value) if name.endswith("l") else json.dumps(value)


@pytest.mark.parametrize("name", ["results.json", "predictions.jsonl", "trainer_state.json"])
def test_a_file_with_anything_in_a_field_is_reported_or_said_to_be_damaged(files, name):
    folder, held = files
    made = fields(held[name])
    chosen = np.random.default_rng(0).permutation(len(made) * len(JUNK))[:25]
    refused = 0
    for number in chosen:
        place, junk = made[number // len(JUNK)], JUNK[number % len(JUNK)]
        (folder / name).write_text(written(name, spoilt(held[name], place, junk)))
        with contextlib.suppress(AlroFastError), named(folder, name):
            refused += 1
            write_report(folder)
            refused -= 1
    (folder / name).write_text(written(name, held[name]))
    assert refused > 8


@pytest.mark.parametrize(
    ("name", "place", "junk", "said"),
    [
        ("results.json", ("tuned", "ndcg@3"), "abc", "tuned.ndcg@3: expected a number or null, found 'abc'"),
        ("results.json", ("tuned",), 5, "tuned: expected an object, found 5"),
        ("results.json", ("untuned", "ndcg@3"), "gone", "untuned.ndcg@3 is missing; restore the file"),
        ("results.json", ("about", "comparisons", 0, "p_value"), None, r"about.comparisons[0].p_value: expected a num"),
        ("trainer_state.json", ("log_history",), [1, 2], "log_history[0]: expected an object, found 1"),
        ("trainer_state.json", ("log_history", 1, "loss"), "low", "log_history[1].loss: expected a number, found 'low"),
        ("predictions.jsonl", (2, "rankings", "tuned"), [99], "line 3.rankings.tuned: expected an object, found [99]"),
        ("predictions.jsonl", (0, "rankings", "tuned", "order", 0), 9, "line 1.rankings.tuned.order: expected the num"),
        ("predictions.jsonl", (0, "rankings", "tuned", "scores"), [1], "line 1.rankings.tuned.scores: expected 4 val"),
    ],
)
def test_the_damaged_field_is_named(files, name, place, junk, said):
    folder, held = files
    (folder / name).write_text(written(name, spoilt(held[name], place, junk)))
    with pytest.raises(AlroFastError, match=re.escape(f"{folder / name} is damaged: {said}")):
        write_report(folder)
    (folder / name).write_text(written(name, held[name]))


def test_predictions_without_a_line_are_damaged(files):
    folder, held = files
    (folder / "predictions.jsonl").write_text("")
    with pytest.raises(AlroFastError, match=r"predictions\.jsonl is damaged: it is empty"):
        write_report(folder)
    (folder / "predictions.jsonl").write_text(written("predictions.jsonl", held["predictions.jsonl"]))
