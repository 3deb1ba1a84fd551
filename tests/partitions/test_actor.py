"""The ranker as a function of batches, without Ray: its answers are those of `rank`, line by line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import make_run, random_lists

from alro_fast import rank
from alro_fast.errors import AlroFastError
from alro_fast.ranking.actor import RankLines
from alro_fast.ranking.documents import document_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(make_run(tmp_path_factory.mktemp("actor")))


@pytest.fixture(scope="module")
def lines():
    return [json.dumps(document_of(entry)) for entry in random_lists(9, 5, seed=2, history=3, items=40)]


def test_answers_are_those_of_rank(run, lines, tmp_path, capsys):
    (tmp_path / "lists.jsonl").write_text("\n".join(lines))
    words = ["--adapter", run, "--shuffles", "2", "--top_k", "3", "--token_budget", "0", "--device", "cpu"]
    rank.main([*words, str(tmp_path / "lists.jsonl")])
    expected = capsys.readouterr().out.splitlines()
    actor = RankLines(run, top_k=3, options={"shuffles": 2}, load={"token_budget": 0, "device": "cpu"})
    found = [actor({"text": np.array(lines[at : at + 4], dtype=object)})["text"].tolist() for at in (0, 4, 8)]
    assert [line for batch in found for line in batch] == expected


def test_a_list_without_a_name_is_ranked_alike_in_any_batch(run, lines):
    nameless = [{key: value for key, value in json.loads(line).items() if key != "list_id"} for line in lines]
    texts = [json.dumps(document) for document in nameless]
    actor = RankLines(run, options={"shuffles": 3}, load={"token_budget": 0})
    together = actor({"text": texts})["text"].tolist()
    alone = [actor({"text": [text]})["text"][0] for text in reversed(texts)]
    assert together == alone[::-1]


def test_a_bad_line_stops_or_is_answered_with_its_error(run, lines):
    bad = ["{", '{"list_id": "b", "candidates": []}', '{"list_id": ["x"], "candidates": [{"title": "A"}]}']
    with pytest.raises(AlroFastError, match=r"list 2 \(list_id 'b'\): no candidates"):
        RankLines(run)({"text": [lines[0], bad[1]]})
    found = [json.loads(line) for line in RankLines(run, on_error="skip")({"text": [*bad, lines[0]]})["text"]]
    assert [one["list_id"] for one in found[:3]] == [None, "b", None]
    assert ["is not JSON" in found[0]["error"], "no candidates" in found[1]["error"]] == [True, True]
    assert len(found[3]["ranking"]) == 5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"on_error": "pass"}, "on_error 'pass': expected one of stop, skip"),
        ({"top_k": 0}, "--top_k is at least 1"),
        ({"options": {"method": "nonsense"}}, "nonsense"),
        ({"options": {"shuffles": 0}}, "shuffles"),
    ],
)
def test_what_it_cannot_be_asked_with_is_refused_at_once(run, how, message):
    with pytest.raises(AlroFastError, match=message):
        RankLines(run, **how)
