"""Prompt templates: the ready ones, one's own, and the mistakes in them."""

from __future__ import annotations

import pytest
from prompt_cases import (
    make_list,
    tokenizer_of,
)

from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder, load_template, ready_templates
from alro_fast.prompts.template import TEMPLATES


def test_ready_templates_are_named_where_one_is_missing():
    assert set(ready_templates()) >= {"books", "movies", "music", "products"}
    with pytest.raises(
        AlroFastError, match=r"no prompt template 'films': expected one of .*movies, music, products, or"
    ):
        load_template("films")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ratings.csv", b"userId,movieId,rating\n1,2,3.5\n", "found a str.*data file"),
        ("rows.json", b'[{"prompt": "x", "chosen": "y"}]', "found a list.*data file"),
        ("row.json", b'{"prompt": "x", "chosen": "y"}', "unknown key 'chosen'"),
        ("table.parquet", b"PAR1\xff\xfe", "not UTF-8"),
        ("large.csv", b"1,2,3\n" * 20000, "larger than 65,536 bytes.*data file"),
        ("empty.yaml", b"", "found nothing"),
        ("broken.yaml", b"a: [1", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_template_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AlroFastError, match=message) as caught:
        PromptBuilder(tokenizer_of("qwen"), path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("introduction:", "intro:", "unknown key 'intro'"),
        ('history: "Rated movies:"\n', "", "the key 'history' is missing"),
        ("- {title}", "- {titel}", r"unknown placeholder \{titel\}"),
        ("- {title}", "- {title.__class__}", "unknown placeholder"),
        ("- {title}", "- {title!r}", "unknown placeholder"),
        ("- {title}", "- {title", "cannot be read.*brace"),
        ("- {title}", "-", r"must hold \{title\}"),
        ("{identifier}. {title}", "{identifier}. {title} {title}", "no placeholder twice"),
        ("{identifier}. {title}", "{title}, {identifier}", "must come before"),
        ("- {title}{category}{average}{count}{rating}", "- {rating}{title}", "must come after"),
        ("{title}{category}{average}{count}{rating}", "{average}{title}{rating}", "after the identifier, the title"),
        ('average: " | average {average}"\n', "", "but the template has no key average"),
        ('average_format: ".1f"', 'average_format: "wide"', "average_format is 'wide'; expected tenths, or a format"),
        ('count_format: "plus"', 'count_format: "g"', "count_format is 'g'; expected one of plus, step"),
        ('" | predicted {hint}"', '" | predicted"', "must hold {hint}"),
        ("Ranking: {identifiers}", "Ranking: {identifiers}.", "must end with"),
        ('" {identifier}. {title}{category}{average}{count}{hint}"', '" {identifier}. {title}\\n"', "single line"),
        ('history: "Rated movies:"', "history: 3", "history must be a text"),
        ('rating_format: "g"', 'rating_format: "d"', "no format of a number"),
        ('"9": 5}', '"9": 4.5}', "different numbers"),
        ('"9": 5}', '"9": .nan}', "different numbers"),
        ('"9": 5}', '"9": five}', "different numbers"),
    ],
)
def test_mistakes_in_a_template_are_named(tmp_path, old, new, message):
    source = (TEMPLATES / "movies.yaml").read_text()
    assert old in source
    (tmp_path / "mine.yaml").write_text(source.replace(old, new))
    with pytest.raises(AlroFastError, match=message) as caught:
        load_template(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(caught.value)


def test_a_bare_template_of_ones_own(tmp_path):
    """No texts around the lines: what a small model trained from scratch needs."""
    source = (TEMPLATES / "movies.yaml").read_text()
    for key in ("introduction", "history", "candidates", "  question"):
        source = "\n".join(f'{key}: ""' if line.startswith(key + ":") else line for line in source.split("\n"))
    source = source.replace('" | {rating} stars"', '" {rating}"').replace(
        '"Ranking: {identifiers}"', '"Ranking:{identifiers}"'
    )
    (tmp_path / "bare.yaml").write_text(source)
    tokenizer = tokenizer_of("words", 64)
    builder = PromptBuilder(tokenizer, tmp_path / "bare.yaml", identifiers="items")
    built = builder.ranking(make_list(3, 2, (1.0, 3.0, 2.0)))
    assert tokenizer.convert_ids_to_tokens(built.prompt_ids) == [
        "<item_40>", "0", ".", "5", "<item_41>", "1", "<item_0>", "<item_1>", "<item_2>", "<unk>", ":",
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(built.answer_ids) == ["<item_1>", "<item_2>", "<item_0>", "</s>"]
