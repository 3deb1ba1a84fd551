"""What is read of the three tasks equals what the plain model says after each prompt alone; and methods built on it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, random_lists, tiny_llama

from alro_fast.data.seeds import generator
from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder
from alro_fast.prompts.recranker import Ask, RecRankerPrompts
from alro_fast.ranking import reading as reading_module
from alro_fast.ranking.hybrid import HYBRIDS, constants_of, pairs_of, utilities, win_shares
from alro_fast.ranking.options import TASK_METHODS
from alro_fast.ranking.orders import presentations
from alro_fast.ranking.ranker import Ranker
from alro_fast.ranking.task_generation import generate_tasks
from alro_fast.ranking.tasks import read_tasks

TOKENIZER = byte_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
PLAIN = tiny_llama(len(TOKENIZER))
PLAIN.set_attn_implementation("sdpa")
RANKERS = {
    kind: Ranker(MODEL, TOKENIZER, RecRankerPrompts(TOKENIZER, "movies", identifiers=kind), answer="tasks")
    for kind in ("letters", "titles")
}
RANKER = RANKERS["letters"]


def hinted(count: int, sizes=6, seed: int = 0) -> list:
    draw = np.random.default_rng(seed)
    return [
        replace(one, hints=tuple(draw.uniform(1, 5, len(one.candidates)).tolist()))
        for one in random_lists(count, sizes, seed=seed, history=4)
    ]


@torch.no_grad()
def after(prompt: list[int]) -> np.ndarray:
    """Log-probabilities of the next token, by the plain model."""
    return PLAIN(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("kind", RANKERS)
def test_readings_are_those_of_the_unshared_prompts(kind):
    ranker, entry = RANKERS[kind], hinted(1)[0]
    prompts, shown = ranker.prompts, presentations(entry, 2, 7)
    with torch.no_grad():
        (reading,) = read_tasks(ranker.reader, ranker.prompts, [entry], [shown], seed=7)

    made = prompts.encode([Ask(entry, points=range(6), orders=shown.tolist())])[0]
    grades = [np.exp(after(made.rated_ids + one.ids)[prompts.grade_ids]) for one in made.points]
    expected = [p @ prompts.grade_values / p.sum() for p in grades]
    np.testing.assert_allclose(reading.grades, expected, atol=1e-5)

    for b in range(2):
        pairs = pairs_of(6, "matching", generator(7, b, name=entry.list_id))
        chances = []
        for first, second in pairs:
            one, other = prompts.encode([Ask(entry, pairs=[(first, second), (second, first)])])[0].pairs
            page = prompts.encode([Ask(entry, pairs=[(first, second)])])[0].liked_ids
            yes, no = (np.exp(after(page + each.ids)[prompts.choice_ids]) for each in (one, other))
            chances.append((yes[0] / yes.sum() + no[1] / no.sum()) / 2)
        np.testing.assert_allclose(reading.wins[b], win_shares(6, pairs, chances), atol=1e-5)

        listing = made.listings[b]
        named = []
        for ids in listing.entries:
            prompt = made.liked_ids + listing.ids
            steps = [after(prompt + ids[:k])[token] for k, token in enumerate(ids)]
            named.append(sum(steps))
        named = np.array(named)
        np.testing.assert_allclose(reading.named[b], named - np.log(np.exp(named).sum()), atol=2e-5)


@pytest.mark.parametrize("hybrid", [*HYBRIDS, "grade=0.5,win=1,place=0.125"])
def test_the_hybrid_combines_what_is_read(hybrid):
    entry = hinted(1, sizes=10)[0]
    ranking_of = {method: RANKER.rank([entry], method=method, hybrid=hybrid)[0].scores for method in TASK_METHODS}
    places = np.argsort(np.argsort(-ranking_of["listwise"]))
    expected = utilities(ranking_of["pointwise"], ranking_of["pairwise"], places, constants_of(hybrid))
    np.testing.assert_allclose(ranking_of["hybrid"], expected, atol=1e-5)
    assert RANKER.rank([entry], hybrid=hybrid)[0].order == tuple(np.argsort(-expected, kind="stable"))


@pytest.mark.parametrize("pairing", ["matching", "all"])
def test_pairs_asked_in_one_order(pairing):
    """P(Yes) of the pair as it stands; both orders are the mean with 1 - P(Yes) of the other."""
    (entry,) = hinted(1, seed=5)
    pairs = pairs_of(6, pairing, generator(3, 0, name=entry.list_id))

    def chance(first, second):
        made = RANKER.prompts.encode([Ask(entry, pairs=[(first, second)])])[0]
        yes, no = np.exp(after(made.liked_ids + made.pairs[0].ids)[RANKER.prompts.choice_ids])
        return yes / (yes + no)

    for orders, first_wins in (
        ("one", [chance(*pair) for pair in pairs]),
        ("both", [(chance(*pair) + 1 - chance(*pair[::-1])) / 2 for pair in pairs]),
    ):
        found = RANKER.rank([entry], method="pairwise", pairing=pairing, pair_orders=orders, seed=3)[0].scores
        np.testing.assert_allclose(found, win_shares(6, pairs, first_wins), atol=1e-5)
    assert "pairs asked in one order" in RANKER.described(pair_orders="one")


def test_a_user_is_one_forward_pass(monkeypatch):
    calls, forward = [], reading_module.answer_hidden_states
    monkeypatch.setattr(reading_module, "answer_hidden_states", lambda *a: calls.append(a[1]) or forward(*a))
    alone = Ranker(MODEL, TOKENIZER, RANKER.prompts, answer="tasks", token_budget=0)
    alone.rank(hinted(3, sizes=10), shuffles=2)
    assert len(calls) == 3
    for batch in calls:
        assert len(batch.branch_rows) == 1
        assert batch.unshared_tokens > 2 * batch.unique_tokens


@pytest.mark.parametrize("method", TASK_METHODS)
def test_company_and_ratings_change_nothing(method):
    lists = hinted(8, sizes=range(1, 9), seed=4)
    together = RANKER.rank(lists, method=method, shuffles=2)
    alone = Ranker(MODEL, TOKENIZER, RANKER.prompts, answer="tasks", token_budget=0)
    everyone = alone.rank(lists, method=method, shuffles=2)
    for one, two, entry in zip(together, everyone, lists, strict=True):
        np.testing.assert_allclose(one.scores, two.scores, atol=2e-5)
        assert sorted(one.order) == list(range(len(entry.candidates)))
    blind = [replace(entry, ratings=(math.nan,) * len(entry.ratings)) for entry in lists]
    for one, two in zip(everyone, alone.rank(blind, method=method, shuffles=2), strict=True):
        assert one.scores.tobytes() == two.scores.tobytes()
    assert alone.rank([lists[3]], method=method, shuffles=2)[0].scores.tobytes() == everyone[3].scores.tobytes()


def test_hints_reach_the_model_and_every_pair_can_be_asked():
    entry = hinted(1)[0]
    other = replace(entry, hints=entry.hints[::-1])
    for method in TASK_METHODS:
        first, second = RANKER.rank([entry, other], method=method)
        assert not np.allclose(first.scores, second.scores)
    every = RANKER.rank([entry], method="pairwise", pairing="all")[0].scores
    assert len(np.unique(every)) == 6
    assert every.mean() == pytest.approx(0.5)


@pytest.mark.parametrize("size", [120, 200])
def test_more_candidates_than_letters(size):
    """Grades and pairs are those of the candidates alone, whatever the length; only the listwise order slides."""
    (entry,) = hinted(1, sizes=size, seed=2)
    found = {method: RANKER.rank([entry], method=method)[0] for method in TASK_METHODS}
    for one in found.values():
        assert sorted(one.order) == list(range(size))
    parts = [entry.select(range(start, start + 40)) for start in range(0, size, 40)]
    alone = np.concatenate([one.scores for one in RANKER.rank(parts, method="pointwise")])
    np.testing.assert_allclose(found["pointwise"].scores, alone, atol=1e-5)
    pairs = pairs_of(size, "matching", generator(0, 0, name=entry.list_id))
    two = RANKER.rank([entry.select(pair) for pair in pairs], method="pairwise")
    wins = win_shares(size, pairs, [one.scores[0] for one in two])
    np.testing.assert_allclose(found["pairwise"].scores, wins, atol=1e-5)
    places = np.argsort(found["listwise"].order)
    utility = utilities(alone, wins, places, HYBRIDS["code"])
    np.testing.assert_allclose(found["hybrid"].scores, utility, atol=1e-5)


def test_every_presentation_of_a_long_list_slides_by_itself():
    (entry,) = hinted(1, sizes=60, seed=2)
    found = RANKER.rank([entry], method="listwise", shuffles=2)[0]
    turned = entry.select(found.presented[1])
    np.testing.assert_array_equal(found.presentation_scores[0], RANKER.rank([entry], method="listwise")[0].scores)
    scores = RANKER.rank([turned], method="listwise")[0].scores
    np.testing.assert_array_equal(found.presentation_scores[1][found.presented[1]], scores)


def test_windows_of_all_long_lists_are_read_together(monkeypatch):
    """As many reads for three lists as for one, and the same places."""
    lists, reads, read = hinted(3, sizes=60, seed=2), [], RANKER.reader.read
    monkeypatch.setattr(RANKER.reader, "read", lambda trees, tokens: reads.append(len(trees)) or read(trees, tokens))
    alone = [RANKER.rank([one], method="listwise")[0].order for one in lists]
    each, reads[:] = list(reads), []
    assert [one.order for one in RANKER.rank(lists, method="listwise")] == alone
    assert each == [0, 1, 1] * 3  # two turns of windows
    assert reads == [0, 3, 3]


def test_what_cannot_be_read_is_said():
    (entry,) = hinted(1)
    plain = Ranker(MODEL, TOKENIZER, PromptBuilder(TOKENIZER, "movies"))
    with pytest.raises(AlroFastError, match="method 'hybrid' asks otherwise than this model was tuned"):
        plain.rank([entry], method="hybrid")
    with pytest.raises(AlroFastError, match=r"method 'greedy' asks otherwise .*; use pointwise, pairwise, listwise"):
        RANKER.rank([entry], method="greedy")
    with pytest.raises(AlroFastError, match="--hybrid 'both' is unknown; expected code or figure"):
        RANKER.rank([entry], hybrid="both")
    with pytest.raises(AlroFastError, match="--pairing 'some' is unknown; expected one of matching, all"):
        RANKER.rank([entry], pairing="some")
    broken = tiny_llama(len(TOKENIZER))
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(AlroFastError, match="not finite numbers"):
        Ranker(broken, TOKENIZER, RANKER.prompts, answer="tasks").rank([entry])


def test_generated_answers_are_parsed_as_the_release_does(monkeypatch):
    """Texts set by hand: an unreadable grade is the middle one, pairs whose orders disagree are halved, five listed."""
    (entry,) = hinted(1)
    pairs = pairs_of(6, "matching", generator(0, 0, name=entry.list_id))
    texts = ["9", "I say 7.", "?", "0", "8", "8"]  # 5, 4, middle of the scale, 0.5, 4.5, 4.5 stars
    texts += [" Yes", " No", " Yes", " Yes", " what", " No"]  # first wins; undecided; half and half with first winning
    texts.append(" B A Z B F")
    monkeypatch.setattr("alro_fast.ranking.task_generation.write_answers", lambda ranker, asked, size: texts)
    found = generate_tasks(RANKER, [entry], hybrid="code")
    wins = win_shares(6, pairs, [1.0, 0.5, 0.75])
    places = [1, 0, np.nan, np.nan, np.nan, 2]
    expected = utilities([5, 4, 3, 0.5, 4.5, 4.5], wins, places, HYBRIDS["code"])
    assert found.orders == [np.argsort(-expected, kind="stable").tolist()]
    assert found.valid == [False]


def test_generated_pairs_can_be_asked_in_one_order(monkeypatch):
    (entry,) = hinted(1)
    pairs, asked = pairs_of(6, "matching", generator(0, 0, name=entry.list_id)), []
    texts = ["9"] * 6 + [" Yes", " No", " what"] + [" A"]
    monkeypatch.setattr(
        "alro_fast.ranking.task_generation.write_answers", lambda ranker, prompts, size: asked.append(prompts) or texts
    )
    found = generate_tasks(RANKER, [entry], hybrid="win=1", pair_orders="one")
    assert len(asked[0]) == 6 + 3 + 1
    expected = win_shares(6, pairs, [1.0, 0.0, 0.5])
    assert found.orders == [np.argsort(-expected, kind="stable").tolist()]


def test_generation_runs_and_counts_what_it_cannot_read():
    lists = hinted(2)
    found = generate_tasks(RANKER, lists)
    assert [sorted(order) for order in found.orders] == [list(range(6))] * 2
    assert all(text.count("\n") >= 6 + 6 for text in found.texts)
    assert 0 <= found.invalid_rate <= 1
