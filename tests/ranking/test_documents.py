"""JSON lists: what is read of them, and one clear line for what cannot be ranked."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest

from alro_fast.errors import AlroFastError
from alro_fast.ranking.documents import parse_list
from alro_fast.ranking.streams import Complaints, read_lists

HEAT = {
    "history": [{"title": "Heat", "category": "Crime", "rating": 4.5}, {"title": "Ran", "rating": 3}],
    "candidates": [
        {"id": 7, "title": "Casino", "category": "Crime"},
        {"title": "Clueless"},
        {"id": "x", "title": "Babe"},
    ],
}


def test_hints_are_read_and_checked():
    hinted = json.loads(json.dumps(HEAT))
    hinted["candidates"][1]["hint"] = 2
    found = parse_list(hinted, 1)
    assert repr(found.hints) == "(nan, 2.0, nan)"
    assert parse_list(HEAT, 1).hints == ()
    hinted["candidates"][2]["hint"] = "good"
    with pytest.raises(
        AlroFastError, match=r"""list 1, candidate 3: expected a "hint" that is a number, found the text"""
    ):
        parse_list(hinted, 1)


def test_signals_are_read_for_history_and_candidates():
    known = json.loads(json.dumps(HEAT))
    known["candidates"][0] |= {"average": 3.5, "count": 20}
    known["candidates"][2]["average"] = 4
    known["history"][0]["count"] = 7
    found = parse_list(known, 1)
    past = (7.0, *[math.nan] * (len(found.history) - 1))
    assert repr(found.signal("average").candidates) == "(3.5, nan, 4.0)"
    assert found.signal("average").history == ()
    assert repr(found.signal("count").candidates) == "(20.0, nan, nan)"
    assert repr(found.signal("count").history) == repr(past)
    known["history"][0]["average"] = [4]
    with pytest.raises(
        AlroFastError, match=r"""list 1, history 1: expected a "average" that is a number, found an arr"""
    ):
        parse_list(known, 1)


MANY = [{"id": "a", "title": "One"}, {"title": "Two"}, {"id": "a", "title": "Three"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "standard input is empty"),
        ("not json", "standard input is not JSON"),
        ('{"candidates": [{"title": "A"}]}\n{"candidates":', "standard input, line 2 is not JSON"),
        ("[]", "empty array"),
        ("[3]", 'list 1: expected an object with "history" and "candidates", found a number'),
        ('{"history": []}', "list 1: no candidates"),
        ('{"candidates": []}', "list 1: no candidates"),
        ('{"candidates": "A"}', "list 1: the text 'A' as \"candidates\""),
        ('{"candidates": [{"title": "A"}], "history": {}}', 'list 1: an object as "history"'),
        ('{"candidates": ["A"]}', "list 1, candidate 1: expected an object"),
        ('{"list_id": 1, "candidates": []}', "list 1: no candidates"),
        ('{"list_id": 70, "candidates": []}', "list 1 (list_id 70): no candidates"),
        ('{"list_id": "u-\\ud800", "candidates": []}', "list 1 (list_id 'u-\\ud800'): '\\ud800' is half"),
        (
            '{"candidates": [{"title": " "}]}',
            'candidate 1: expected a "title" that is a non-empty text, found',
        ),
        ('{"candidates": [{"title": "A", "category": 3}]}', 'candidate 1: "category" is a number'),
        ('{"candidates": [{"title": "A", "id": true}]}', 'candidate 1: "id" is true or false'),
        ('{"candidates": [{"title": "A"}], "history": [{"title": "B"}]}', 'history 1: expected a "rating"'),
        (
            '{"candidates": [{"title": "A"}], "history": [{"title": "B", "rating": NaN}]}',
            'history 1: expected a "rating"',
        ),
        ('{"histroy": [], "candidates": [{"title": "A"}]}', "list 1: unknown key 'histroy'; did you mean 'history'?"),
        ('{"candidates": [{"title": "A", "Title": "B"}]}', "candidate 1: unknown key 'Title'; did you mean 'title'?"),
        ('{"candidates": [{"title": "A", "x": 1}]}', "candidate 1: unknown key 'x'; expected some of id, title,"),
        (
            '{"candidates": [{"title": "A"}], "history": [{"title": "B", "ratings": 3}]}',
            "history 1: unknown key 'ratings'; did you mean 'rating'?",
        ),
        ('{"candidates": [{"title": "A\\ud800"}]}', "list 1: '\\ud800' is half a character"),
        ('{"candidates": [{"title": "A", "id": "\\udc00"}]}', "list 1: '\\udc00' is half a character"),
        (
            '{"candidates": [{"title": "A", "hint": %s}]}' % ("9" * 400),
            'candidate 1: expected a "hint" that is a number',
        ),
        (
            '{"candidates": [{"title": "A"}], "history": [{"title": "B", "rating": %s}]}' % ("9" * 400),
            'history 1: expected a "rating" that is a number, found one of hundreds of digits',
        ),
        ('{"candidates": [{"title": "A", "rating": true}], "history": 0}', 'list 1: a number as "history"'),
        ('{"candidates": [{"title": "A", "hint": true}]}', "found true or false"),
        ('{"candidates": [{"title": "A", "hint": %s}]}' % ("9" * 5000), "holds a number of thousands of digits"),
        (
            '{"candidates": [{"title": "A"}]}\n{"candidates": %s}' % ("9" * 5000),
            "line 2 holds a number of thousands of digits",
        ),
        ("[" * 100_000, "standard input is nested too deeply"),
        (json.dumps({"candidates": MANY}), "list 1: candidates 1 and 3 have the same id 'a'"),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, text, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(AlroFastError) as raised:
        list(read_lists("-", Complaints("stop")))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
