"""The ids of a prompt are those the tokenizer gives its whole text, chat templates and ends included."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from places import SHARED
from prompt_cases import (
    CORPUS,
    END,
    KINDS,
    LETTERS,
    WRAP,
    builder_of,
    make_list,
    new_tokenizer,
    sentencepiece_bpe,
    starts_with,
    tokenizer_of,
    with_signals,
)
from transformers import PreTrainedTokenizerFast

from alro_fast.data.records import Item, RankingList
from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder, item_token
from alro_fast.prompts.template import TEMPLATES, parse_template

# --- the ids are those of the text ----------------------------------------------------------------------------------


def encode(kind, identifiers, text):
    tokenizer = tokenizer_of(kind, 64 if identifiers == "items" else 0)
    return tokenizer(text, add_special_tokens=tokenizer.chat_template is None).input_ids


@pytest.mark.parametrize("template", ["books", "clicks", "items", "movies", "music", "products"])
@pytest.mark.parametrize("identifiers", ["letters", "items"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_tokenizers_ids_of_the_whole_text(kind, identifiers, template):
    builder = builder_of(kind, identifiers, template)
    lists = [(make_list(), None), (make_list(10, 20), range(9, -1, -1)), (make_list(1, 0), None)]
    for one, order in [*lists, (with_signals(make_list(6, 5)), [3, 1, 5, 0, 2, 4])]:
        one = replace(one, history_ratings=tuple(max(1.0, rating) for rating in one.history_ratings))
        prompt, answer = builder.text(one, order)
        built = builder.ranking(one, order)
        whole = encode(kind, identifiers, prompt + answer + END.get(kind, "</s>"))
        assert built.prompt_ids + built.answer_ids == whole
        # the boundary is the text's own, or lies before the space that the first identifier holds
        assert built.prompt_ids in (encode(kind, identifiers, prompt), encode(kind, identifiers, prompt[:-1]))


@pytest.mark.parametrize("identifiers", ["letters", "items"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"words"}))
def test_grade_questions_are_the_tokenizers_ids_of_the_whole_text(kind, identifiers):
    builder = builder_of(kind, identifiers)
    one, order = make_list(6, 3), [3, 1, 5, 0, 2, 4]
    built = builder.rate(one, order)
    question = builder.template["ranking.question"]
    page, after = builder.text(one, order)[0].split(question)
    after = after.replace("Ranking: ", "Grade of ")
    for i, branch in enumerate(built.branches):
        label = item_token(i) if identifiers == "items" else LETTERS[order.index(i)]
        grade = next(text for text, value in builder.template.grades.items() if value == one.ratings[i])
        text = page + builder.template["ratings.question"] + after + f"{label}: {grade}"
        assert built.prompt_ids + branch.question_ids + branch.answer_ids == encode(kind, identifiers, text)
        assert branch.answer_ids == [built.grade_ids[built.grade_values.index(one.ratings[i])]]


@pytest.mark.parametrize("kind", ["qwen", "llama3", "llama2"])
def test_real_titles_have_the_ids_of_the_whole_text(kind):
    path = SHARED / "ml-latest-small" / "movies.csv"
    if not path.is_file():
        pytest.skip(f"no MovieLens titles at {path}; set ALRO_FAST_SHARED_DATA")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    items = [Item(i, row["movieId"], row["title"], row["genres"]) for i, row in enumerate(rows)]
    lists = [
        RankingList(f"{i}", "", tuple(items[i : i + 20]), (3.5,) * 20, tuple(items[i + 20 : i + 30]), (4.0,) * 10)
        for i in range(0, len(items) - 30, 97)
    ]
    builder = builder_of(kind)
    texts = [prompt + answer + END.get(kind, "</s>") for prompt, answer in map(builder.text, lists)]
    for built, text in zip(builder.rankings(lists), texts):
        assert built.prompt_ids + built.answer_ids == encode(kind, "letters", text)


def test_identifiers_stay_one_token_where_the_tokenizer_merges_them_with_the_dot():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=starts_with(
            sentencepiece_bpe(["<unk>", "<s>", "</s>"], True, CORPUS + [f" {c}." for c in LETTERS] * 200), "<s>"
        ),
        **WRAP["llama2"],
    )
    assert "▁A." in tokenizer.tokenize("pick A. Then")
    built = PromptBuilder(tokenizer, "movies").ranking(make_list(5, 0))
    lines = tokenizer.decode(built.prompt_ids).split("\n")
    assert [line.strip()[:8] for line in lines if " | Comedy" in line] == [f"{c}. Movie" for c in "ABCDE"]
    assert all(built.prompt_ids.count(id) == 1 for id in built.candidate_ids)


# --- chat templates and ends -----------------------------------------------------------------------------------------


def test_a_system_text_is_a_turn_or_heads_the_users():
    source = (TEMPLATES / "movies.yaml").read_text().replace('system: ""', 'system: "Be terse."')
    template = parse_template(source, name="terse", origin="terse.yaml")
    starts = {
        "qwen": "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHere",
        "gemma": "<bos><start_of_turn>user\nBe terse.\nHere",
        "gpt2": "Be terse.\nHere",
    }
    for kind, start in starts.items():
        assert PromptBuilder(tokenizer_of(kind), template).text(make_list())[0].startswith(start)


def test_answers_follow_the_generation_prompt():
    ends = {
        "qwen": "only.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nRanking: ",
        "llama3": "only.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nRanking: ",
        "llama2-chat": "only. [/INST] Ranking: ",
        "gpt2": "only.\nRanking: ",
    }
    for kind, end in ends.items():
        assert builder_of(kind).text(make_list())[0].endswith(end)


def test_a_chat_template_that_hides_a_turn_is_refused():
    with pytest.raises(AlroFastError, match="does not show every turn"):
        PromptBuilder(new_tokenizer("qwen", chat_template="{{ 'hello' }}"), "movies")
    with pytest.raises(AlroFastError, match="cannot be rendered: no"):
        PromptBuilder(new_tokenizer("qwen", chat_template="{{ raise_exception('no') }}"), "movies")


def test_a_tokenizer_without_an_end_or_not_of_the_library_is_refused():
    with pytest.raises(AlroFastError, match="no end-of-text token"):
        PromptBuilder(new_tokenizer("words", eos_token=None), "movies")

    class Slow:
        name_or_path = "slow"

    with pytest.raises(AlroFastError, match="tokenizer 'slow' is a Slow"):
        PromptBuilder(Slow(), "movies")
