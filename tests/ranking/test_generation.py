"""The baseline that writes text: its answers equal greedy decoding, and parsing says what is wrong with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, random_lists, tiny_llama

from alro_fast.prompts import PromptBuilder
from alro_fast.ranking.decoding import ordinary_attention
from alro_fast.ranking.generation import Generated, generate_and_parse, parse
from alro_fast.ranking.ranker import Ranker


@pytest.mark.parametrize(
    ("text", "order", "valid"),
    [
        (" B A C", [1, 0, 2], True),
        ("B, A > C.", [1, 0, 2], True),
        ("B A", [1, 0, 2], False),
        ("B B A C", [1, 0, 2], False),
        ("B A C D", [1, 0, 2], False),
        ("the best is C", [2, 0, 1], False),
        ("Apples", [0, 1, 2], False),
        ("", [0, 1, 2], False),
    ],
)
def test_parse(text, order, valid):
    assert parse(text, [" A", " B", " C"]) == (order, valid)


def test_longer_names_first():
    assert parse("<item_12> <item_1>", ["<item_1>", "<item_12>"]) == ([1, 0], True)


def test_generated_text_is_the_models_greedy_answer():
    tokenizer = byte_tokenizer()
    model = tiny_llama(len(tokenizer))
    prompts = PromptBuilder(tokenizer, "movies")
    lists = random_lists(5, range(1, 6))
    made = generate_and_parse(Ranker(model, tokenizer, prompts), lists, batch_size=2)
    for entry, text, order, scores in zip(lists, made.texts, made.orders, made.scores, strict=True):
        prompt = prompts.ranking(entry)
        ids = list(prompt.prompt_ids)
        with torch.no_grad(), ordinary_attention(model.get_decoder()):
            for _ in range(len(prompt.answer_ids)):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == prompt.answer_ids[-1]:
                    break
        written = tokenizer.decode(ids[len(prompt.prompt_ids) :], skip_special_tokens=True)
        assert text.startswith(written)
        assert sorted(order) == list(range(len(entry.candidates)))
        assert np.argsort(-scores).tolist() == order
    assert 0 <= made.invalid_rate <= 1
    assert math.isnan(Generated([], [], []).invalid_rate)
