"""Signals as tokens: which bin a value falls in, what is unknown, and that saved settings write the same prompts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import byte_tokenizer, random_lists

from alro_fast.data.records import Signal
from alro_fast.errors import AlroFastError
from alro_fast.prompts import SignalPrompts, SignalVocabulary, add_signal_tokens


def lists_with(count, size=5, seed=0):
    """Random lists with two signals; a fifth of the averages are unknown."""
    generator = np.random.default_rng(seed)
    lists = random_lists(count, size, seed=seed)
    made = []
    for one in lists:
        average = np.where(generator.random(size) < 0.2, np.nan, generator.normal(3.5, 0.5, size))
        hints = tuple(generator.normal(3.5, 0.7, size).tolist())
        made.append(replace(one, hints=hints, signals=(Signal("average", (), tuple(average.tolist())),)))
    return made


@pytest.fixture(scope="module")
def made():
    lists = lists_with(120)
    vocabulary = SignalVocabulary.of(lists, bins=8)
    tokenizer = byte_tokenizer()
    scales = add_signal_tokens(tokenizer, vocabulary)
    return lists, vocabulary, tokenizer, scales


def words(prompts, ids):
    return prompts.tokenizer.convert_ids_to_tokens(ids)


def test_a_prompt_reads_as_it_is_described(made):
    lists, vocabulary, tokenizer, _ = made
    prompts = SignalPrompts(tokenizer, vocabulary)
    one = replace(
        lists[0],
        history_ratings=(4.0, math.nan, 0.5, 2.26, 5.0),
        ratings=(4.5, math.nan, 1.0, 2.0, 3.0),
        hints=(3.0, 4.0, 3.0, 5.0, 3.0),
        signals=(Signal("average", (), (2.0, math.nan, 4.0, 3.0, 3.0)),),
    )
    found = prompts.rates([one], [[4, 3, 2, 1, 0]])[0]
    assert words(prompts, found.prompt_ids) == [
        "<user>", "<rated_4>", "<rated_?>", "<rated_0.5>", "<rated_2.5>", "<rated_5>"
    ]  # fmt: skip
    bins = {
        name: dict(zip(one.signal(name).candidates, np.searchsorted(edges, one.signal(name).candidates)))
        for name, edges in zip(vocabulary.names, vocabulary.edges)
    }
    gaps = dict(zip(vocabulary.names, vocabulary.edges[2:]))
    assert words(prompts, found.branches[0].question_ids) == [
        f"<average_{bins['average'][2.0]}>", f"<hint_{bins['hint'][3.0]}>",
        f"<average_gap_{np.searchsorted(gaps['average'], 2.0 - 3.0)}>",
        f"<hint_gap_{np.searchsorted(gaps['hint'], 3.0 - 3.6)}>", "<rate>",
    ]  # fmt: skip
    unknown = words(prompts, found.branches[1].question_ids)
    assert (unknown[0], unknown[2]) == ("<average_?>", "<average_gap_?>")
    assert [words(prompts, branch.answer_ids) for branch in found.branches[:3]] == [["<grade_4.5>"], [], ["<grade_1>"]]
    assert found.ranks == [1, 5, 4, 3, 2]
    assert words(prompts, found.grade_ids) == [f"<grade_{grade:g}>" for grade in vocabulary.grades]
    assert found == prompts.rate(one)  # in whatever order


def test_bins_hold_equally_many_values_and_no_value_is_outside(made):
    lists, vocabulary, tokenizer, scales = made
    prompts = SignalPrompts(tokenizer, vocabulary)
    ids = np.concatenate([prompts.candidate_ids(one) for one in lists])
    for column, scale in zip(ids.T, scales, strict=True):
        counts = [int((column == token).sum()) for token in scale]
        unknown = tokenizer.convert_ids_to_tokens(scale[0]).rpartition("_")[0] + "_?>"
        assert len(scale) == 8
        assert max(counts) - min(counts) <= 2, counts
        assert sum(counts) == (column != tokenizer.convert_tokens_to_ids(unknown)).sum()
    far = replace(lists[0], hints=(-99.0, 99.0, 3.0, 3.0, 3.0), signals=())
    found = prompts.candidate_ids(far)
    assert (found[0, 1], found[1, 1]) == (scales[1][0], scales[1][-1])
    assert set(tokenizer.convert_ids_to_tokens(found[:, 0].tolist())) == {"<average_?>"}


def test_saved_settings_write_the_same_prompts(made, tmp_path):
    lists, vocabulary, tokenizer, _ = made
    prompts = SignalPrompts(tokenizer, vocabulary, max_length=9)
    prompts.save(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = SignalPrompts.load(tmp_path, type(tokenizer).from_pretrained(tmp_path))
    assert loaded.vocabulary == vocabulary
    assert loaded.rates(lists) == prompts.rates(lists)
    assert all(found.dropped_history == 3 and len(found.prompt_ids) == 3 for found in loaded.rates(lists))
    with pytest.raises(AlroFastError, match="--max_length 6 leaves no room for 4 signal tokens"):
        SignalPrompts(tokenizer, vocabulary, max_length=6).rate(lists[0])
    other = byte_tokenizer()
    add_signal_tokens(other, SignalVocabulary.of(lists, bins=9))
    with pytest.raises(AlroFastError, match="is not the one"):
        SignalPrompts.load(tmp_path, other)
    record = json.loads((tmp_path / "signal_tokens.json").read_text())
    (tmp_path / "signal_tokens.json").write_text(json.dumps(record | {"edges": None}))
    with pytest.raises(AlroFastError, match=r"signal_tokens\.json is damaged"):
        SignalPrompts.load(tmp_path, tokenizer)
    (tmp_path / "signal_tokens.json").unlink()
    with pytest.raises(AlroFastError, match=r"holds no prompt settings: signal_tokens\.json cannot be read"):
        SignalPrompts.load(tmp_path, tokenizer)


def test_what_cannot_be_named_is_said(made):
    lists, vocabulary, _, _ = made
    with pytest.raises(AlroFastError, match="the lists carry none; prepare them with --signals average,count,hint"):
        SignalVocabulary.of(random_lists(3, 4))
    many = [replace(one, ratings=tuple(number + i / 9 for i in range(5))) for number, one in enumerate(lists)]
    with pytest.raises(AlroFastError, match="different ratings"):
        SignalVocabulary.of(many)
    with pytest.raises(AlroFastError, match="has no token <user>; call add_signal_tokens"):
        SignalPrompts(byte_tokenizer(), vocabulary)


def test_a_signal_of_few_values_has_fewer_bins():
    lists = [replace(one, signals=(), hints=(1.0, 2.0, 1.0, 2.0, 2.0)) for one in lists_with(30)]
    vocabulary = SignalVocabulary.of(lists)
    assert len(vocabulary.scales[0]) <= 3
    tokenizer = byte_tokenizer()
    add_signal_tokens(tokenizer, vocabulary)
    prompts = SignalPrompts(tokenizer, vocabulary)
    one, two = prompts.candidate_ids(lists[0])[:2, 0]
    assert one != two
