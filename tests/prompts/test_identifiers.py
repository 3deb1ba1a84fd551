"""Identifiers and grades are single tokens that the tokenizer tells apart, or a clear error."""

from __future__ import annotations

import dataclasses

import pytest
from prompt_cases import (
    CORPUS,
    LETTERS,
    WRAP,
    builder_of,
    make_item,
    make_list,
    new_tokenizer,
    tokenizer_backend,
    tokenizer_of,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder, add_item_tokens
from alro_fast.prompts.template import TEMPLATES, parse_template


def test_as_many_letters_as_the_tokenizer_tells_apart():
    assert builder_of("qwen").max_candidates == 52
    lower = new_tokenizer("gpt2")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert PromptBuilder(lower, "movies").max_candidates == 26
    with pytest.raises(AlroFastError, match=r"list 'list-7' has 27 candidates.*'TokenizersBackend'.*26"):
        PromptBuilder(lower, "movies").ranking(make_list(27))
    vocabulary = {word: i for word, i in tokenizer_backend("words").get_vocab().items() if word != "Q"}
    short = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    short.pre_tokenizer = pre_tokenizers.Whitespace()
    builder = PromptBuilder(PreTrainedTokenizerFast(tokenizer_object=short, **WRAP["words"]), "movies")
    assert builder.labels == list("ABCDEFGHIJKLMNOP")


def test_a_tokenizer_that_splits_letters_off_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "A": 2}, unk_token="<unk>"))
    with pytest.raises(AlroFastError, match="single-token letters"):
        PromptBuilder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **WRAP["words"]), "movies")


def test_letters_that_merge_with_each_other_are_not_used():
    vocabulary = ["<unk>", "</s>", *dict.fromkeys("".join(CORPUS) + LETTERS), "D B"]
    pieces = [(piece, 0.0 if len(piece) > 1 else -1.0) for piece in vocabulary]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0)), **WRAP["unigram"])
    assert "D B" in tokenizer.tokenize("C D B E")
    assert PromptBuilder(tokenizer, "movies").labels == ["A", "B", "C"]


def test_item_tokens_must_be_there_for_every_item():
    with pytest.raises(AlroFastError, match=r"0 item tokens.*add_item_tokens"):
        PromptBuilder(tokenizer_of("qwen"), "movies", identifiers="items")
    tokenizer = new_tokenizer("qwen", 10)
    with pytest.raises(AlroFastError, match=r"10 item tokens.*11"):
        PromptBuilder(tokenizer, "movies", identifiers="items", items=[make_item(i) for i in range(11)])
    builder = PromptBuilder(tokenizer, "movies", identifiers="items", items=[make_item(i) for i in range(10)])
    with pytest.raises(AlroFastError, match=r"list 'list-7': item 'id040' has index 40"):
        builder.ranking(make_list())
    with pytest.raises(AlroFastError, match="one item twice"):
        builder.ranking(dataclasses.replace(make_list(2, 0), candidates=(make_item(1), make_item(1))))
    assert add_item_tokens(tokenizer, 12) == 2


def test_unknown_identifiers_are_refused():
    with pytest.raises(AlroFastError, match="identifiers 'numbers': expected letters or items"):
        PromptBuilder(tokenizer_of("qwen"), "movies", identifiers="numbers")


def test_grades_must_be_single_tokens_and_cover_the_ratings():
    source = (TEMPLATES / "movies.yaml").read_text().replace('"9": 5', '"917": 5')
    template = parse_template(source, name="ten", origin="ten.yaml")
    builder = PromptBuilder(tokenizer_of("gpt2"), template)
    builder.ranking(make_list())
    with pytest.raises(AlroFastError, match=r"single tokens for 9 of the grades.*ratings\.grades"):
        builder.rate(make_list())
    with pytest.raises(
        AlroFastError, match=r"list 'list-7' has a candidate rated 3\.3, which is none of the grades 0\.5"
    ):
        builder_of("gpt2").rate(make_list(2, 0, (3.3, 1.0)))


@pytest.mark.parametrize(
    "change",
    [
        {"ratings": (1.0,)},
        {"candidates": (), "ratings": ()},
        {"history_ratings": (1.0,)},
    ],
)
def test_lists_whose_parts_do_not_fit_are_refused(change):
    with pytest.raises(AlroFastError, match="list 'list-7' has"):
        builder_of("qwen").ranking(dataclasses.replace(make_list(), **change))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 0, 1, 2, 3], [1, 2, 3, 4, 5]])
def test_an_order_must_be_a_permutation(order):
    with pytest.raises(AlroFastError, match="no permutation of its 5 candidates"):
        builder_of("qwen").ranking(make_list(), order)
