"""Templates and the ratings of the data: which template suits, and which is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from prompt_cases import make_list, tokenizer_of
from tiny import byte_tokenizer

from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder, load_template, ready_templates
from alro_fast.prompts.recranker import RecRankerPrompts
from alro_fast.prompts.recranker.prompts import Ask
from alro_fast.prompts.recranker.task_template import load_task_template
from alro_fast.prompts.scale import default_template, fitted_template

HALVES = [rating / 2 for rating in range(1, 11)]


@pytest.mark.parametrize(
    ("manifest", "ranking", "tasks"),
    [
        ({"dataset": "ml-1m", "rating_values": [1.0, 5.0]}, "movies", "movies"),
        ({"dataset": "demo"}, "demo", "movies"),
        ({"dataset": "amazon-2023"}, "products", "products"),
        ({"dataset": "book-crossing"}, "books", "books"),
        ({"dataset": "csv", "rating_values": {"min": 1.0, "max": 90.0}}, "items", "items"),
        ({"dataset": "csv", "rating_values": [1.0]}, "clicks", "items"),
        ({"dataset": "amazon-2023", "rating_values": [1.0]}, "clicks", "items"),
        ({}, "items", "items"),
    ],
)
def test_the_default_follows_the_data_set(manifest, ranking, tasks):
    assert default_template(manifest, PromptBuilder) == ranking
    assert default_template(manifest, RecRankerPrompts) == tasks


@pytest.mark.parametrize(
    ("ratings", "scale", "grades", "asked"),
    [
        ([1, 2, 3, 4, 5], (1, 5), {"1": 1, "2": 2, "3": 3, "4": 4, "5": 5}, "from 1 for a rating of 1 up to 5 for a"),
        (HALVES, (0.5, 5), dict(zip("0123456789", HALVES)), "from 0 for a rating of 0.5 up to 9 for a rating of 5."),
        ([1, 10], (1, 10), {"0": 1, "1": 10}, "from 0 for a rating of 1 up to 1 for a rating of 10."),
        (
            [0, 50, *range(90, 101)],
            (0, 100),
            {"0": 0, "1": 100},
            "from 0 for a rating of 0 up to 1 for a rating of 100",
        ),
        ([3], (0, 3), {"0": 0, "3": 3}, "from 0 for a rating of 0 up to 3 for a rating of 3."),
    ],
)
def test_the_template_of_anything_takes_its_scale_from_the_data(tmp_path, ratings, scale, grades, asked):
    template = load_template("items", ratings)
    assert template.scale == scale
    assert template.grades == grades
    assert asked in template["ratings.question"]
    assert f"from {scale[0]:g} (worst) to {scale[1]:g} (best)" in template["introduction"]
    tokenizer = tokenizer_of("qwen")
    PromptBuilder(tokenizer, template).save(tmp_path)  # as filled in, so that it is read again without the data
    assert PromptBuilder.load(tmp_path, tokenizer).template.texts == template.texts
    tasks = load_task_template("items", ratings)
    quarter = (scale[1] - scale[0]) / 4
    assert (tasks.scale, tasks.like, tasks.dislike) == (scale, scale[1] - quarter, scale[0] + quarter)


@pytest.mark.parametrize(
    ("name", "shown", "graded", "by_grades", "said"),
    [
        ("movies", [1, 10], [1, 10], False, "has ratings from 1 to 10, outside the scale 0.5 to 5 of prompt template "
         "'movies'; --template books or items fits"),
        ("books", [0.5, 5], [4], False, "outside the scale 1 to 10 of prompt template 'books'; --template items or "),
        ("music", [1, 5], [1, 2.5], True, "candidates rated 2.5, which is none of the grades 1, 2, 3, 4, 5 of prompt "
         "template 'music'; --template items or movies fits"),
        ("movies", [1, 5], [0, 1, 5], True, "candidates rated 0, which is none of the grades 0.5, 1, 1.5"),
        ("items", [1, 30], range(1, 31), True, "rated 2, which is none of the grades 1, 30 of prompt template 'items'; "
         "write a template with these ratings, of ten values at most"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_hold_the_ratings_is_refused_with_those_that_do(name, shown, graded, by_grades, said):
    with pytest.raises(AlroFastError) as caught:
        fitted_template(PromptBuilder, name, shown, list(graded), by_grades=by_grades, origin="lists")
    assert said in str(caught.value)
    assert str(caught.value).startswith("lists has ")


def test_a_template_that_names_no_scale_or_holds_the_ratings_is_taken():
    for name, shown, graded, by_grades in (
        ("movies", HALVES, HALVES, True),
        ("movies", [], [0.0, 100.0], False),  # what is not shown and not answered
        ("clicks", [0.0, 100.0], [], False),
        ("demo", [1.0, 5.0], [1.0, 2.0], True),
        ("clicks", [1.0], [0.0, 1.0], True),
    ):
        found = fitted_template(PromptBuilder, name, shown, graded, by_grades=by_grades, origin="lists")
        assert found.name == name
    assert fitted_template(RecRankerPrompts, "items", [1, 7], [1], by_grades=True, origin="lists").scale == (1, 7)


def test_rounding_leaves_no_scale():
    rounded = [1.000001, 3.000001, 5.000001]
    one = replace(make_list(3, 2), history_ratings=(1.000001, 5.000001))
    for prompts in (PromptBuilder, RecRankerPrompts):
        template = fitted_template(prompts, "items", rounded, rounded, by_grades=True, origin="lists")
        assert template.scale == (1, 5)
        prompts(byte_tokenizer(), template)
    PromptBuilder(byte_tokenizer(), fitted_template(
        PromptBuilder, "items", rounded, rounded, by_grades=True, origin="lists"
    )).ranking(one)  # fmt: skip
    for off in (0.9998, 5.0002):
        with pytest.raises(AlroFastError, match=f"{off:g}.* outside the scale 1 to 5"):
            fitted_template(PromptBuilder, "music", [3.0, off], [], by_grades=False, origin="lists")
        with pytest.raises(AlroFastError, match=f"has a rating of {off:g}"):
            PromptBuilder(byte_tokenizer(), "music").ranking(replace(one, history_ratings=(3.0, off)))


def test_prompts_refuse_a_history_that_their_words_leave_no_room_for():
    """Where the data are not known beforehand: in lists of other data, and in JSON."""
    tokenizer = byte_tokenizer()
    one = replace(make_list(3, 2), history_ratings=(4.0, 10.0))
    said = "list 'list-7': its history has a rating of 10, and prompt template 'movies' speaks of ratings from 0.5 to 5"
    with pytest.raises(AlroFastError, match=said):
        PromptBuilder(tokenizer, "movies").ranking(one)
    with pytest.raises(AlroFastError, match=said):
        RecRankerPrompts(tokenizer, "movies").encode([Ask(one, [0])])
    PromptBuilder(tokenizer, "books").ranking(one)
    for rating in (1e308, -5.0):
        with pytest.raises(AlroFastError, match="prompt template 'demo' speaks of ratings from 1 to 5"):
            PromptBuilder(tokenizer, "demo").ranking(replace(one, history_ratings=(4.0, rating)))


def test_clicks_show_no_rating():
    one = replace(make_list(3, 2), history_ratings=(1.0, 1.0), ratings=(0.0, 1.0, 0.0))
    builder = PromptBuilder(byte_tokenizer(), "clicks")
    lines = builder.text(one)[0].splitlines()
    assert [line.partition(" | ")[0] for line in lines[2:4]] == [f"- {item.title}" for item in one.history]
    assert not any("1 star" in line or line.endswith("1") for line in lines)
    assert builder.rate(one).grade_values == [0.0, 1.0]


def test_a_scale_that_is_none(tmp_path):
    text = load_template("movies").source
    for scale in ("5", "[1]", "[5, 1]", '["1", 5]', "[1, .inf]", "[true, 5]"):
        (tmp_path / "own.yaml").write_text(text.replace("scale: [0.5, 5]", f"scale: {scale}"))
        with pytest.raises(AlroFastError, match=r"own.yaml: scale is .*; expected the lowest and the highest rating"):
            load_template(tmp_path / "own.yaml")
    assert {"items", "clicks"} <= set(ready_templates())
    json.dumps(load_template("items").grades)
