"""Rankings against plain forwards of the same model, one sequence at a time and without sharing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, random_lists, tiny_llama

from alro_fast.data.records import Item, RankingList
from alro_fast.errors import AlroFastError
from alro_fast.modeling.lm_head import Head
from alro_fast.prompts import PromptBuilder
from alro_fast.ranking import decoding, reading
from alro_fast.ranking import ranker as ranking
from alro_fast.ranking.decoding import decode, ordinary_attention, token_logits
from alro_fast.ranking.options import METHODS
from alro_fast.ranking.orders import MERGES, Ranking, kemeny_order, merge, presentations, slide
from alro_fast.ranking.ranker import Ranker, expected_slots

TOKENIZER = byte_tokenizer()
PROMPTS = PromptBuilder(TOKENIZER, "movies")
MODEL = tiny_llama(len(TOKENIZER))
RANKER = Ranker(MODEL, TOKENIZER, PROMPTS)


def plain_logits(ids, tokens, model=MODEL):
    """Next-token logits of `tokens` after `ids`: the model's own head, on ordinary attention, one sequence alone."""
    with torch.no_grad(), ordinary_attention(model.get_decoder()):
        return model(torch.tensor([ids])).logits[0, -1, tokens].double()


def slot_logprobs(prompt, order):
    """[m slots, m candidates]: log softmax over identifiers along the answer `order`."""
    rows, ids = [], list(prompt.prompt_ids)
    for chosen in order:
        rows.append(plain_logits(ids, prompt.candidate_ids).log_softmax(-1).numpy())
        ids = [*ids, prompt.candidate_ids[chosen]]  # the movies template has nothing between identifiers
    return np.stack(rows)


def greedy_order(prompt):
    order, ids = [], list(prompt.prompt_ids)
    for _ in prompt.candidate_ids:
        logits = plain_logits(ids, prompt.candidate_ids)
        logits[order] = -torch.inf
        order.append(int(logits.argmax()))
        ids.append(prompt.candidate_ids[order[-1]])
    return order


def order_logprob(prompt, order):
    """log P(order), identifiers drawn without replacement."""
    rows, total = slot_logprobs(prompt, order), 0.0
    for slot, chosen in enumerate(order):
        left = [i for i in range(len(order)) if i not in order[:slot]]
        total += rows[slot][chosen] - np.logaddexp.reduce(rows[slot][left])
    return total


def beams_of(method):
    """Few, where they are read."""
    return {"beams": 2} if method == "beam" else {}


def test_first_equals_plain_forwards():
    lists = random_lists(5, range(1, 9))
    for entry, found in zip(lists, RANKER.rank(lists), strict=True):
        prompt = PROMPTS.ranking(entry)
        expected = plain_logits(prompt.prompt_ids, prompt.candidate_ids).log_softmax(-1).numpy()
        np.testing.assert_allclose(found.scores, expected, atol=1e-5)
        assert found.order == tuple(np.argsort(-expected, kind="stable"))
        assert found.list_id == entry.list_id


def test_shuffles_average_the_presentations():
    entry = random_lists(1, 6)[0]
    found = RANKER.rank([entry], shuffles=4, seed=3)[0]
    shown = presentations(entry, 4, seed=3)
    assert shown[0].tolist() == list(range(6))
    assert all(sorted(order.tolist()) == list(range(6)) for order in shown)
    assert not np.array_equal(shown[1], shown[2])
    rows = []
    for order in shown:
        prompt = PROMPTS.ranking(entry, order.tolist())
        rows.append(plain_logits(prompt.prompt_ids, prompt.candidate_ids).log_softmax(-1).numpy())
    np.testing.assert_allclose(found.presentation_scores, rows, atol=1e-5)
    np.testing.assert_allclose(found.scores, np.mean(rows, axis=0), atol=1e-5)
    assert np.array_equal(presentations(entry, 2, seed=3), shown[:2])
    assert not np.array_equal(presentations(entry, 2, seed=4), shown[:2])
    other = presentations(replace(entry, list_id="another"), 4, seed=3)
    assert not np.array_equal(other[1:], shown[1:])


def test_greedy_and_expected_equal_plain_decoding():
    lists = random_lists(4, range(1, 7), seed=1)
    greedy = RANKER.rank(lists, method="greedy")
    expected = RANKER.rank(lists, method="expected")
    for entry, one, two in zip(lists, greedy, expected, strict=True):
        prompt = PROMPTS.ranking(entry)
        order = greedy_order(prompt)
        assert list(one.order) == order
        assert one.scores.tolist() == [-1.0 - order.index(i) for i in range(len(order))]
        np.testing.assert_allclose(two.scores, -expected_slots(slot_logprobs(prompt, order), 1.0), atol=1e-5)


def test_expected_slots_closed_form():
    perfect = np.full((3, 3), -50.0)
    perfect[[0, 1, 2], [2, 0, 1]] = 0.0  # candidate 2 at slot 1, 0 at 2, 1 at 3
    np.testing.assert_allclose(expected_slots(perfect, 1.0), [2, 3, 1], atol=1e-12)
    np.testing.assert_allclose(expected_slots(np.zeros((4, 4)), 7.0), [2.5] * 4)
    uneven = np.log([[0.8, 0.2], [0.4, 0.6]])
    np.testing.assert_allclose(expected_slots(uneven, 1.0), [4 / 3, 1.75])
    halves = np.log([[0.75, 0.25], [0.25, 0.75]])
    np.testing.assert_allclose(expected_slots(halves, 1.0), [1.25, 1.75])
    np.testing.assert_allclose(expected_slots(halves, 2.0), [1.1, 1.9])


@pytest.mark.parametrize("beams", [1, 3, 24])
def test_beam_equals_a_search_over_all_orders(beams):
    for entry in random_lists(1, 4, seed=2):
        prompt = PROMPTS.ranking(entry)
        found = RANKER.rank([entry], method="beam", beams=beams)[0]
        kept = [()]
        for _ in range(4):  # the same search with plain forwards; 24 beams keep every order
            longer = [(*part, i) for part in kept for i in range(4) if i not in part]
            kept = sorted(longer, key=lambda part: -partial_logprob(prompt, part))[:beams]
        assert found.order == kept[0]
        if beams == 24:
            best = max(itertools.permutations(range(4)), key=lambda order: order_logprob(prompt, order))
            assert found.order == best


def test_a_beam_that_overtakes_keeps_its_own_past():
    prompts = PROMPTS.rankings(random_lists(12, range(3, 8), seed=4))
    greedy, beam = (decode(MODEL, prompts, beams, 8192) for beams in (1, 6))
    assert sum(one.order.tolist() != two.order.tolist() for one, two in zip(greedy, beam, strict=True)) >= 3
    for prompt, answer in zip(prompts * 2, greedy + beam, strict=True):
        assert answer.logprob == pytest.approx(order_logprob(prompt, answer.order.tolist()), abs=1e-4)
        np.testing.assert_allclose(answer.slots, slot_logprobs(prompt, answer.order), atol=1e-4)
    assert all(two.logprob >= one.logprob - 1e-4 for one, two in zip(greedy, beam, strict=True))


CACHE: dict = {}


def partial_logprob(prompt, part):
    key = (tuple(prompt.prompt_ids), part)
    if key not in CACHE:
        rows, ids, total = [], list(prompt.prompt_ids), 0.0
        for slot, chosen in enumerate(part):
            logits = plain_logits(ids, prompt.candidate_ids)
            logits[list(part[:slot])] = -torch.inf
            total += float(logits.log_softmax(-1)[chosen])
            ids.append(prompt.candidate_ids[chosen])
            rows.append(logits)
        CACHE[key] = total
    return CACHE[key]


def test_grades_give_their_expectation():
    ranker = Ranker(MODEL, TOKENIZER, PROMPTS, answer="ratings")
    lists = random_lists(3, range(1, 6), seed=5)
    for entry, found in zip(lists, ranker.rank(lists, shuffles=2), strict=True):
        for shown, scores in zip(found.presented, found.presentation_scores, strict=True):
            prompt = PROMPTS.rate(replace(entry, ratings=(np.nan,) * len(entry.ratings)), shown.tolist())
            for branch, score in zip(prompt.branches, scores, strict=True):
                logits = plain_logits(prompt.prompt_ids + branch.question_ids, prompt.grade_ids)
                assert score == pytest.approx(float(logits.softmax(-1).numpy() @ prompt.grade_values), abs=1e-5)
        assert np.all((found.scores > 0.5) & (found.scores < 5.0))
    with pytest.raises(AlroFastError, match="answers with grades"):
        ranker.rank(lists, method="first")


def test_presentations_that_are_graded_share_their_candidates(monkeypatch):
    """Each further presentation costs its candidates and questions, not the history again."""
    ranker, entry = Ranker(MODEL, TOKENIZER, PROMPTS, answer="ratings"), random_lists(1, 6, seed=5)[0]
    rows, read = [], ranker.reader.read
    monkeypatch.setattr(ranker.reader, "read", lambda trees, tokens: rows.append(trees) or read(trees, tokens))
    ranker.rank([entry])
    ranker.rank([entry], shuffles=3)
    (alone,), (together,) = rows
    assert (alone.num_answer_rows, together.num_answer_rows) == (6, 18)
    page = len(PROMPTS.rate(entry).prompt_ids)
    history = int((alone.ids[0][:page] != together.ids[6][:page]).argmax())  # and what else comes before candidates
    assert together.num_tokens <= alone.num_tokens + 2 * (alone.num_tokens - history)
    assert together.num_tokens < 2 * alone.num_tokens


@pytest.mark.parametrize("method", METHODS)
def test_company_changes_nothing(method):
    lists = random_lists(12, range(1, 9), seed=6)
    options = {"method": method, "shuffles": 2, **beams_of(method)}
    together = RANKER.rank(lists, **options)
    small = Ranker(MODEL, TOKENIZER, PROMPTS, token_budget=1200)
    for other in (RANKER.rank(lists[::-1], **options)[::-1], small.rank(lists, **options)):
        for one, two in zip(together, other, strict=True):
            np.testing.assert_allclose(one.scores, two.scores, atol=2e-5)
            assert one.order == two.order
    alone = Ranker(MODEL, TOKENIZER, PROMPTS, token_budget=0)
    everyone = alone.rank(lists, **options)
    for one, two in zip(everyone, together, strict=True):
        np.testing.assert_allclose(one.scores, two.scores, atol=2e-5)
    for number in (3, 7):
        assert alone.rank([lists[number]], **options)[0].scores.tobytes() == everyone[number].scores.tobytes()


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(METHODS),
    st.sampled_from([1, 2]),
    st.sampled_from(MERGES),
)
def test_every_candidate_exactly_once(seed, method, shuffles, merged):
    generator = np.random.default_rng(seed)
    lists = []
    for number in range(3):
        m = int(generator.integers(1, 12))
        items = [Item(i, f"i{i}", ["Same", "Same", "A. B. C", "</s>", ""][i % 5]) for i in range(m)]
        lists.append(RankingList(f"{seed}-{number}", "u", (), (), tuple(items), (np.nan,) * m))
    for entry, found in zip(
        lists, RANKER.rank(lists, method=method, shuffles=shuffles, merge_by=merged, **beams_of(method)), strict=True
    ):
        m = len(entry.candidates)
        assert sorted(found.order) == list(range(m))
        assert found.presentation_scores.shape == (shuffles, m)
        assert np.all(np.diff(found.scores[list(found.order)]) <= 0)


@pytest.mark.parametrize("method", METHODS)
def test_more_candidates_than_identifiers(method):
    lists = [random_lists(1, size, seed=size, history=0)[0] for size in (PROMPTS.max_candidates + 1, 120, 3, 200)]
    if method != "first":
        lists = lists[:1]
    for entry, found in zip(lists, RANKER.rank(lists, method=method, **beams_of(method)), strict=True):
        assert sorted(found.order) == list(range(len(entry.candidates)))


def test_sliding_windows_bring_the_best_to_the_front():
    """With a perfect ranker of windows, one pass finds the best half window of any list."""
    lists = random_lists(6, range(11, 60), seed=8)
    worth = [np.random.default_rng(i).permutation(len(entry.candidates)) for i, entry in enumerate(lists)]
    known = {
        (entry.list_id, item.item_id): w for entry, ws in zip(lists, worth) for item, w in zip(entry.candidates, ws)
    }

    def rank(parts):
        rankings = []
        for part in parts:
            assert len(part.candidates) == len(part.ratings) <= 10
            scores = np.array([known[part.list_id, item.item_id] for item in part.candidates], dtype=float)
            order = tuple(np.argsort(-scores))
            rankings.append(Ranking(part.list_id, order, scores, np.arange(len(order))[None], scores[None]))
        return rankings

    for entry, worth_of, found in zip(lists, worth, slide(lists, 10, rank), strict=True):
        best = np.argsort(-worth_of)[:5]
        assert list(found.order[:5]) == best.tolist()
        assert sorted(found.order) == list(range(len(entry.candidates)))
        assert np.argsort(-found.scores).tolist() == list(found.order)


def test_ratings_of_candidates_cannot_matter():
    entry = random_lists(1, 6, seed=9)[0]
    turned = replace(entry, ratings=entry.ratings[::-1])
    for method in METHODS:
        one, two = RANKER.rank([entry, turned], method=method)
        assert one.scores.tobytes() == two.scores.tobytes() or np.allclose(one.scores, two.scores, atol=1e-5)


def test_rankings_come_as_they_are_ready(monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", 2)
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield replace(random_lists(1, 3)[0], list_id=f"l{number}")

    stream = RANKER.stream(endless())
    assert [next(stream).list_id for _ in range(3)] == ["l0", "l1", "l2"]
    assert len(taken) == 4
    assert torch.is_grad_enabled()


def test_the_adapter_can_be_switched_off():
    model = get_peft_model(
        tiny_llama(len(TOKENIZER)), LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4)
    )
    ranker, lists = Ranker(model, TOKENIZER, PROMPTS), random_lists(2, 5)
    model.train()
    for method in METHODS:
        tuned = ranker.scores(lists, method=method, **beams_of(method))
        with ranker.untuned():
            untuned = ranker.scores(lists, method=method, **beams_of(method))
        np.testing.assert_allclose(untuned, RANKER.scores(lists, method=method, **beams_of(method)), atol=1e-5)
        if method == "first":
            assert np.abs(np.subtract(tuned, untuned)).max() > 0.01
        np.testing.assert_array_equal(tuned, ranker.scores(lists, method=method, **beams_of(method)))
    assert model.training
    with pytest.raises(AlroFastError, match="no adapter"), RANKER.untuned():
        pass


def test_token_logits_are_float32_and_apply_the_head(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(shape).bfloat16() for shape in ((3, 8), (20, 8), (20,)))
    found = token_logits(hidden, Head(weight, bias, 5.0, 0.5), [[1, 2, 3], [4], [19, 0]])
    full = hidden.double() @ weight.double().T + bias.double()
    full = 5.0 * torch.tanh(0.5 * full / 5.0)
    assert [len(row) for row in found] == [3, 1, 2]
    np.testing.assert_allclose(np.concatenate(found), full[[0, 0, 0, 1, 2, 2], [1, 2, 3, 4, 19, 0]], rtol=1e-5)
    again = token_logits(hidden[1:2], Head(weight, bias, 5.0, 0.5), [[4]])
    assert again[0].tobytes() == found[1].tobytes()
    monkeypatch.setattr(decoding, "GATHERED", 30)
    pieces = token_logits(hidden, Head(weight, bias, 5.0, 0.5), [[1, 2, 3], [4], [19, 0]])
    assert np.concatenate(pieces).tobytes() == np.concatenate(found).tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "unknown method 'random'; expected one of first"),
        ({"shuffles": 0}, "shuffles is at least 1; given 0"),
        ({"method": "beam", "beams": 0}, "beams is at least 1; given 0"),
        ({"merge_by": "vote"}, "unknown merge 'vote'"),
        ({"seed": -1}, "seed is at least 0; given -1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(AlroFastError, match=message):
        RANKER.rank(random_lists(1, 3), **options)


def test_lists_are_checked():
    entry = random_lists(1, 3)[0]
    with pytest.raises(AlroFastError, match="list l0 has no candidates"):
        RANKER.rank([replace(entry, candidates=(), ratings=())])
    with pytest.raises(AlroFastError, match=r"names candidate 'm\d+' twice"):
        RANKER.rank([replace(entry, candidates=entry.candidates[:1] * 3)])
    assert RANKER.rank([]) == []
    assert RANKER.rank([replace(entry, history=(), history_ratings=())])[0].scores.shape == (3,)


def test_what_cannot_be_computed_is_said(monkeypatch):
    broken = tiny_llama(len(TOKENIZER))
    broken.lm_head.weight.data.fill_(torch.nan)
    for method in METHODS:
        with pytest.raises(AlroFastError, match="not finite"):
            Ranker(broken, TOKENIZER, PROMPTS).rank(random_lists(1, 3), method=method)
    short = Ranker(tiny_llama(len(TOKENIZER), max_position_embeddings=64), TOKENIZER, PROMPTS)
    for method in METHODS:
        with pytest.raises(AlroFastError, match=r"list l0.* tokens.* 64"):
            short.rank(random_lists(1, 3), method=method)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reading, "collate", full)
    with pytest.raises(AlroFastError, match="list l0: not enough memory"):
        RANKER.rank(random_lists(1, 3))


def disagreements(order, places):
    return sum(row[a] > row[b] for row in places for a, b in itertools.combinations(order, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_kemeny_is_the_least_disagreeing_order(m, rows, seed):
    places = np.stack([np.random.default_rng([seed, row]).permutation(m) for row in range(rows)])
    best = min(disagreements(order, places) for order in itertools.permutations(range(m)))
    assert disagreements(kemeny_order(places), places) == best


def test_merges():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.9], [0.0, 1.0, 0.5]])
    np.testing.assert_allclose(merge(scores, "mean"), [2.0, 4 / 3, 4.4 / 3])
    np.testing.assert_allclose(merge(scores, "borda"), [-2 / 3, -1.0, -4 / 3])
    assert merge(scores, "kemeny").tolist() == [0.0, -1.0, -2.0]
    places = np.stack([np.random.default_rng(row).permutation(30) for row in range(5)])
    by_borda = np.argsort(places.mean(axis=0), kind="stable")
    assert disagreements(kemeny_order(places), places) < disagreements(by_borda, places)
