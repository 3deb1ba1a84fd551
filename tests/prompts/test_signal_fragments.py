"""Signals in prompts: where they stand, how short they are, and that unknown ones leave no trace."""

from __future__ import annotations

from prompt_cases import builder_of, make_list, tokenizer_of, with_signals

from alro_fast.prompts import PromptBuilder
from alro_fast.prompts.template import TEMPLATES, parse_template


def test_signals_stand_beside_their_items_and_unknown_ones_leave_no_trace():
    one = with_signals(make_list(5, 4))
    bare = builder_of("gpt2").text(make_list(5, 4))[0].split("\n")
    shown = builder_of("gpt2").text(one)[0].split("\n")
    order = [3, 0, 4, 2, 1]
    shuffled = builder_of("gpt2").text(one, order)[0].split("\n")
    first, start = bare.index("Rated movies:") + 1, bare.index("Candidate movies, in no particular order:") + 1
    past = [" | average 1.2 | 1+ ratings", " | average 1.9 | 5+ ratings", " | average 2.6 | 20+ ratings", ""]
    new = [" | average 0.8 | 1+ ratings | predicted 2.0", " | average 1.5 | 5+ ratings | predicted 2.7"]
    new += [" | average 2.2 | 20+ ratings | predicted 3.4", "", " | average 3.6 | 2000+ ratings | predicted 3.2"]
    for i, text in enumerate(past):
        line, stars = bare[first + i].rsplit(" | ", 1)
        assert shown[first + i] == f"{line}{text} | {stars}"
    for i, text in enumerate(new):
        assert shown[start + i] == bare[start + i] + text
        assert shuffled[start + order.index(i)].endswith(bare[start + i][4:] + text)
    assert [line for n, line in enumerate(shown) if not first <= n < start + 5 or n == start - 1] == [
        line for n, line in enumerate(bare) if not first <= n < start + 5 or n == start - 1
    ]
    assert builder_of("gpt2").signals == {"history": ("average", "count"), "candidates": ("average", "count", "hint")}


def test_compact_signals_are_short_and_templates_without_a_place_ignore_them():
    tokenizer = tokenizer_of("gpt2", 64)
    one = with_signals(make_list(3, 2))
    text = PromptBuilder(tokenizer, "compact", identifiers="items").text(one)[0]
    assert text.startswith(
        "History\n<item_40> a12 n1 0.5\n<item_41> a19 n3 1\nCandidates\n<item_0> a8 n1 p20\n<item_1> a15 n3 p27\n"
    )
    source = (TEMPLATES / "movies.yaml").read_text()
    for name in ("average", "count", "hint"):
        source = source.replace("{" + name + "}", "")
        source = "\n".join(line for line in source.split("\n") if not line.startswith(name))
    plain = PromptBuilder(tokenizer, parse_template(source, name="own", origin="own.yaml"))
    assert plain.signals == {"history": (), "candidates": ()}
    assert (
        plain.ranking(one)
        == plain.ranking(make_list(3, 2))
        == PromptBuilder(tokenizer, "movies").ranking(make_list(3, 2))
    )
