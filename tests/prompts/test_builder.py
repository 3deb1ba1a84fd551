"""Slots, labels and twins of built prompts, what is dropped when they are too long, many at once, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_cases import (
    END,
    KINDS,
    LETTERS,
    LLAMA3,
    NAN,
    builder_of,
    common_prefix,
    make_item,
    make_list,
    new_tokenizer,
    tokenizer_of,
)
from tokenizers import normalizers
from transformers import AutoTokenizer

from alro_fast.data.records import Item, RankingList, target_ranks
from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder, item_token
from alro_fast.prompts.template import TEMPLATES

# --- slots, twins, labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identifiers", ["letters", "items"])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_name_the_candidates_in_target_order(kind, identifiers):
    builder, one, order = builder_of(kind, identifiers), make_list(9, 5), [4, 7, 0, 8, 2, 1, 6, 3, 5]
    built = builder.ranking(one, order)
    tokenizer = tokenizer_of(kind, 64 if identifiers == "items" else 0)
    names = [token.strip("Ġ▁") for token in tokenizer.convert_ids_to_tokens(built.candidate_ids)]
    expected = [item_token(i) if identifiers == "items" else LETTERS[order.index(i)] for i in range(9)]
    assert names == expected
    assert built.ranks == target_ranks(one.ratings, [item.item_id for item in one.candidates])
    assert [built.answer_ids[built.slot_offsets[rank - 1]] for rank in built.ranks] == built.candidate_ids
    assert built.slot_offsets[0] == 0, "the last prompt row predicts the first identifier"
    assert built.answer_ids[-1] == tokenizer.convert_tokens_to_ids(END.get(kind, "</s>"))
    assert len(built.answer_ids) == built.slot_offsets[-1] + 2


def test_slots_are_apart_where_the_separator_is_a_token_of_its_own():
    built = builder_of("characters").ranking(make_list(4))
    assert built.slot_offsets == [0, 2, 4, 6]


def test_a_twin_has_the_same_target_items_and_shares_history():
    builder, one = builder_of("qwen"), make_list(8, 10)
    order = [7, 6, 5, 4, 3, 2, 1, 0]
    first, twin = builder.ranking(one), builder.ranking(one, order)
    assert first.ranks == twin.ranks
    for prompt in (first, twin):
        items = {id: i for i, id in enumerate(prompt.candidate_ids)}
        slots = [items[prompt.answer_ids[offset]] for offset in prompt.slot_offsets]
        assert slots == sorted(range(8), key=lambda i: first.ranks[i])
    assert first.candidate_ids == twin.candidate_ids[::-1]
    assert len(first.prompt_ids) == len(twin.prompt_ids)
    shared = common_prefix(first.prompt_ids, twin.prompt_ids)
    decoded = tokenizer_of("qwen").decode(first.prompt_ids[:shared])
    assert decoded.rstrip().endswith("in no particular order:\n A. Movie")


ratings_of_five = st.lists(st.one_of(st.just(NAN), st.integers(1, 10).map(lambda r: r / 2)), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(ratings_of_five, ratings_of_five, st.permutations(range(5)), st.sampled_from(["letters", "items"]))
def test_no_prompt_depends_on_a_candidates_rating(ratings, others, order, identifiers):
    builder = builder_of("qwen", identifiers)
    one, other = (make_list(5, 3, tuple(labels)) for labels in (ratings, others))
    assert builder.ranking(one, order).prompt_ids == builder.ranking(other, order).prompt_ids
    assert builder.ranking(one, order).candidate_ids == builder.ranking(other, order).candidate_ids
    rated, differently = builder.rate(one, order), builder.rate(other, order)
    assert rated.prompt_ids == differently.prompt_ids
    assert [b.question_ids for b in rated.branches] == [b.question_ids for b in differently.branches]


@settings(max_examples=40, deadline=None)
@given(ratings_of_five, st.permutations(range(5)))
def test_the_history_dropped_does_not_depend_on_a_candidates_rating_or_place(ratings, order):
    builder = builder_of("qwen", max_length=320)
    plain, other = make_list(5, 30), make_list(5, 30, tuple(ratings))
    assert builder.ranking(plain).dropped_history == builder.ranking(other, order).dropped_history > 0
    assert builder.rate(plain).dropped_history == builder.rate(other, order).dropped_history


def test_unrated_candidates_come_last_and_have_no_grade():
    one = make_list(4, 2, (NAN, 2.0, NAN, 5.0))
    builder = builder_of("qwen")
    assert builder.ranking(one).ranks == [3, 2, 4, 1]
    assert [len(branch.answer_ids) for branch in builder.rate(one).branches] == [0, 1, 0, 1]
    assert all(branch.question_ids for branch in builder.rate(one).branches)


def test_prompts_are_built_where_no_rating_is_known():
    rated, bare = make_list(), dataclasses.replace(make_list(), ratings=(NAN,) * 5)
    builder = builder_of("llama3")
    assert builder.ranking(bare).prompt_ids == builder.ranking(rated).prompt_ids
    assert builder.ranking(bare).ranks == [1, 2, 3, 4, 5]


def test_history_lines_show_ratings_and_leave_out_what_is_missing():
    past = (make_item(1, "Seen"), make_item(2, "Unrated", ""), make_item(3, "", ""), Item(4, "\n", "\u200b", ""))
    one = RankingList("a", "u", past, (4.5, NAN, 2.0, 1.0), (make_item(9),), (1.0,))
    lines = builder_of("gpt2").text(one)[0].split("\n")
    assert lines[2:6] == ["- Seen | Comedy|Drama | 4.5 stars", "- Unrated", "- id003 | 2 stars", "- untitled | 1 stars"]


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identifiers", ["letters", "items"])
@pytest.mark.parametrize("form", ["ranking", "rate"])
def test_too_long_a_history_drops_its_oldest_items_only(form, identifiers):
    one = make_list(6, 12)

    tokenizer = tokenizer_of("qwen", 64 if identifiers == "items" else 0)
    builder = PromptBuilder(tokenizer, "movies", identifiers=identifiers)

    def longest(built):
        if form == "ranking":
            return len(built.prompt_ids) + len(built.answer_ids)
        return len(built.prompt_ids) + max(len(b.question_ids) + len(b.answer_ids) for b in built.branches)

    def build(limit):
        builder.max_length = limit
        return getattr(builder, form)

    full = build(None)(one)
    shortened = [
        build(None)(dataclasses.replace(one, history=one.history[k:], history_ratings=one.history_ratings[k:]))
        for k in range(13)
    ]
    assert build(longest(full))(one) == full
    assert full.dropped_history == 0
    for k in range(1, 13):
        built = build(longest(shortened[k]))(one)
        assert built.dropped_history == k
        assert dataclasses.replace(built, dropped_history=0) == shortened[k]
        assert build(longest(shortened[k - 1]) - 1)(one) == built, "no item is dropped that fits"
    with pytest.raises(AlroFastError, match=r"list 'list-7'.*max_length"):
        build(longest(shortened[12]) - 1)(one)


# --- many at once, saved, loaded -------------------------------------------------------------------------------------


def test_many_at_once_equal_one_by_one(monkeypatch):
    lists = [
        dataclasses.replace(
            make_list(3 + i % 5, i % 7), candidates=tuple(make_item(i // 2 + j) for j in range(3 + i % 5))
        )
        for i in range(40)
    ]
    orders = [None if i % 2 else list(range(2 + i % 5, -1, -1)) for i in range(40)]
    expected = [builder_of("qwen").ranking(one, order) for one, order in zip(lists, orders)]
    rated = [builder_of("qwen").rate(one, order) for one, order in zip(lists, orders)]
    builder = PromptBuilder(tokenizer_of("qwen"), "movies")
    monkeypatch.setattr("alro_fast.prompts.builder.CHUNK", 7)
    monkeypatch.setattr("alro_fast.prompts.encoding.CACHED_PIECES", 9)
    assert builder.rankings(lists, orders) == expected
    assert builder.rates(lists, orders) == rated
    assert builder.rankings([]) == []
    with pytest.raises(AlroFastError, match="orders: 1 given for 40 lists"):
        builder.rankings(lists, [None])


@pytest.mark.parametrize("identifiers", ["letters", "items"])
def test_saved_and_loaded_with_the_saved_tokenizer(tmp_path, identifiers):
    tokenizer = tokenizer_of("llama3", 64 if identifiers == "items" else 0)
    builder = PromptBuilder(tokenizer, "movies", identifiers=identifiers, max_length=300)
    builder.save(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = PromptBuilder.load(tmp_path, AutoTokenizer.from_pretrained(tmp_path))
    assert (loaded.identifiers, loaded.max_length) == (identifiers, 300)
    for one in (make_list(), make_list(10, 24)):
        assert loaded.ranking(one) == builder.ranking(one)
        assert loaded.rate(one) == builder.rate(one)
    assert (tmp_path / "prompt_template.yaml").read_text() == (TEMPLATES / "movies.yaml").read_text()
    record = json.loads((tmp_path / "identifiers.json").read_text())
    assert record["labels"][:2] == (["A", "B"] if identifiers == "letters" else ["<item_0>", "<item_1>"])
    assert record["token_ids"][0] == builder.ranking(make_list()).candidate_ids[0]
    first = (tmp_path / "identifiers.json").read_bytes()
    builder.save(tmp_path)
    assert (tmp_path / "identifiers.json").read_bytes() == first


def test_loading_refuses_another_tokenizer_and_damaged_files(tmp_path):
    with pytest.raises(AlroFastError, match=r"holds no prompt settings: prompt_template\.yaml"):
        PromptBuilder.load(tmp_path, tokenizer_of("qwen"))
    builder_of("qwen").save(tmp_path)
    others = [tokenizer_of("llama3"), new_tokenizer("qwen", 3), new_tokenizer("qwen", chat_template=LLAMA3)]
    lower = new_tokenizer("qwen")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    for tokenizer in (*others, lower):
        with pytest.raises(AlroFastError, match="is not the one"):
            PromptBuilder.load(tmp_path, tokenizer)
    template = tmp_path / "prompt_template.yaml"
    template.write_text(template.read_text().replace('"9": 5}', '"9": 5.5}'))
    with pytest.raises(AlroFastError, match=r"does not fit prompt_template\.yaml"):
        PromptBuilder.load(tmp_path, tokenizer_of("qwen"))
    for text in ("{}", "[1]", "{", "[" * 100_000, '{"labels": 1, "labels": 2}'):
        (tmp_path / "identifiers.json").write_text(text)
        with pytest.raises(AlroFastError, match=r"identifiers\.json is damaged: "):
            PromptBuilder.load(tmp_path, tokenizer_of("qwen"))


DATED = (  # as Llama 3 has it, and as templates that take no date for an argument
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '?' %}{% endif %}"
    "{{ bos_token }}Today Date: {{ day }}\n"
) + LLAMA3.removeprefix("{{ bos_token }}")


def test_prompts_of_a_template_that_writes_the_date_are_the_same_on_every_day(tmp_path):
    tokenizer = new_tokenizer("llama3", chat_template=DATED)
    builder = PromptBuilder(tokenizer, "movies")
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(builder.ranking(make_list()).prompt_ids)
    builder.save(tmp_path)
    recorded = json.loads((tmp_path / "identifiers.json").read_text())
    assert "26 Jul 2024" in recorded["turns"]["before"]
    assert PromptBuilder.load(tmp_path, tokenizer).ranking(make_list()) == builder.ranking(make_list())
    recorded["turns"]["before"] = recorded["turns"]["before"].replace("26 Jul 2024", "27 Jul 2024")
    (tmp_path / "identifiers.json").write_text(json.dumps(recorded))
    with pytest.raises(AlroFastError, match="does not fit"):
        PromptBuilder.load(tmp_path, tokenizer)
    del recorded["turns"]  # of version 0.1.0
    (tmp_path / "identifiers.json").write_text(json.dumps(recorded))
    assert PromptBuilder.load(tmp_path, tokenizer).ranking(make_list()) == builder.ranking(make_list())


def test_a_builder_travels_to_worker_processes():
    copy = pickle.loads(pickle.dumps(builder_of("qwen")))
    assert copy.ranking(make_list()) == builder_of("qwen").ranking(make_list())
