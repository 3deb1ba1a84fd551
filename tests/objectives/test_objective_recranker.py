"""Objective recranker: what is asked, in which order, and a loss equal to that of the unshared prompts."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, random_lists, tiny_llama

from alro_fast.errors import AlroFastError
from alro_fast.modeling.attention import answer_hidden_states
from alro_fast.modeling.lm_head import head_of
from alro_fast.objectives.base import build_objective
from alro_fast.objectives.recranker import TASKS
from alro_fast.options import ObjectiveArguments
from alro_fast.prompts.recranker.prompts import Ask, RecRankerPrompts
from alro_fast.training.plans.dataset import build_batch

TOKENIZER = byte_tokenizer()
PROMPTS = RecRankerPrompts(TOKENIZER, "movies")


def hinted(count: int, seed: int = 0) -> list:
    """Lists of ten, every third candidate unrated, with hints."""
    draw = np.random.default_rng(seed)
    return [
        replace(
            one,
            ratings=tuple(math.nan if i % 3 == 2 else rating for i, rating in enumerate(one.ratings)),
            hints=tuple(draw.uniform(1, 5, 10).round(1).tolist()),
        )
        for one in random_lists(count, 10, seed=seed, history=6)
    ]


def objective(seed: int = 0, **options):
    return build_objective(
        ObjectiveArguments(objective="recranker", **options), PROMPTS, answer="tasks", seed=seed
    )  # fmt: skip


def test_the_loss_is_that_of_the_unshared_prompts():
    """Every question alone through the plain model: per task the mean over its answer tokens; gradients as well."""
    model = tiny_llama(len(TOKENIZER))
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    tuned, lists = objective(task_weights="1,2,0.5"), hinted(3)
    examples = tuned.examples(lists, [0, 1, 2], epoch=0)
    batch = build_batch(examples, tuned)
    terms = tuned.loss(answer_hidden_states(model, batch.packed), head_of(model), batch.packed, batch.targets)
    sum(term.weight * term.value for term in terms).backward()

    totals, counts = [torch.zeros(()) for _ in TASKS], [0, 0, 0]
    for example in examples:
        made = example.views[0]
        for task, (page, questions) in enumerate(
            [(made.rated_ids, made.points), (made.liked_ids, made.pairs), (made.liked_ids, made.listings)]
        ):
            for one in questions:
                ids = torch.tensor([page + one.ids + one.answer_ids])
                logprobs = plain(input_ids=ids).logits[0].log_softmax(-1)
                n = len(one.answer_ids)
                totals[task] = totals[task] - logprobs[-n - 1 : -1].gather(1, ids[0, -n:, None]).sum()
                counts[task] += n
    expected = [total / count for total, count in zip(totals, counts)]
    (expected[0] + 2 * expected[1] + 0.5 * expected[2]).backward()
    assert [(term.name, term.weight, term.count) for term in terms] == list(zip(TASKS, (1.0, 2.0, 0.5), counts))
    assert batch.counts == dict(zip(TASKS, counts))
    for term, value in zip(terms, expected):
        assert term.value.item() == pytest.approx(value.item(), abs=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_users_questions_share_their_pages():
    tuned = objective(points_per_list=10, pairs_per_list=12)
    (example,) = tuned.examples([hinted(1)[0]], [0], 0)
    made, tree = example.views[0], example.tree
    points, others = 7, len(made.pairs) + 1  # the rated ones of ten; pairs and a listing
    assert len(tree.ids) == points + others
    repeated = (points - 1) * len(made.rated_ids) + (others - 1) * len(made.liked_ids)
    assert tree.num_tokens < tree.unshared_tokens - repeated  # and what both pages begin with


def test_only_what_the_ratings_answer_is_asked():
    tuned = objective(points_per_list=20, pairs_per_list=100)
    for index, source in enumerate(hinted(20)):
        ask = tuned.ask(source, index, 0)
        rated = [i for i, rating in enumerate(source.ratings) if not math.isnan(rating)]
        assert list(ask.points) == rated
        liked = {i for i in rated if source.ratings[i] >= 4}
        assert len(ask.pairs) == len(liked) * (10 - len(liked))
        assert all(len(liked & set(pair)) == 1 for pair in ask.pairs)
        made = PROMPTS.encode([ask])[0]
        assert all(one.answer_ids for one in [*made.points, *made.pairs, *made.listings])
    nothing = replace(hinted(1)[0], ratings=(math.nan,) * 10)
    assert not tuned.usable(nothing)
    only_worse = replace(hinted(1)[0], ratings=(2.0,) * 10)
    assert not tuned.ask(only_worse, 0, 0).pairs
    assert tuned.usable(only_worse)


def test_position_shifting_depends_on_seed_epoch_and_list_alone():
    source = hinted(1)[0]
    first = objective(seed=3).ask(source, 5, 2)
    assert objective(seed=3).ask(source, 5, 2) == first
    changed = [
        objective(seed=4).ask(source, 5, 2),
        objective(seed=3).ask(source, 5, 3),
        objective(seed=3).ask(source, 6, 2),
    ]
    assert all((ask.orders, ask.past) != (first.orders, first.past) for ask in changed)
    still = objective(seed=3, position_shifting=False).ask(source, 5, 2)
    assert still.orders == [list(range(10))]
    assert still.past == list(range(6))


def test_half_of_the_pairs_are_swapped_with_their_answer_and_hint():
    source, tuned = hinted(1, seed=2)[0], objective(pairs_per_list=1)
    liked = set(PROMPTS.liked(source))
    assert liked
    assert len(liked) < 10
    asked = [tuned.ask(source, 0, epoch).pairs[0] for epoch in range(2000)]
    swapped = sum(second in liked for _, second in asked)
    assert abs(swapped / 2000 - 0.5) < 3 * math.sqrt(0.25 / 2000)
    pairs = Counter(tuple(sorted(pair)) for pair in asked)
    assert len(pairs) == len(liked) * (10 - len(liked))
    unshifted = objective(pairs_per_list=100, position_shifting=False).ask(source, 0, 0)
    assert all(first in liked for first, _ in unshifted.pairs)
    for first, second in asked[:20]:
        made = PROMPTS.text(Ask(source, pairs=[(first, second), (second, first)]))
        answers = {answer for _, answer in made}
        assert answers == {" Yes</s>", " No</s>"}
        hints = {prompt.rsplit("Hint: ")[-1].split("\n")[0] for prompt, _ in made}
        assert hints in ({"Yes", "No"}, {"Unknown."})


def test_every_place_of_a_list_is_as_likely():
    """Over epochs a candidate is shown everywhere, so that no place tells how good it is."""
    source, tuned = hinted(1)[0], objective()
    places = Counter(tuned.ask(source, 0, epoch).orders[0].index(0) for epoch in range(3000))
    for place in range(10):
        assert abs(places[place] / 3000 - 0.1) < 4 * math.sqrt(0.09 / 3000)
    past = Counter(tuned.ask(source, 0, epoch).past.index(0) for epoch in range(3000))
    for place in range(6):
        assert abs(past[place] / 3000 - 1 / 6) < 4 * math.sqrt(5 / 36 / 3000)


def test_a_weight_of_zero_leaves_a_task_out():
    (example,) = objective(task_weights="0,1,0").examples([hinted(1, seed=2)[0]], [0], 0)
    made = example.views[0]
    assert not made.points
    assert made.pairs
    assert not made.listings
    for text in ("1,1", "a,b,c", "-1,1,1", "0,0,0", "nan,1,1"):
        with pytest.raises(AlroFastError, match=r"--task_weights .*: expected three numbers"):
            objective(task_weights=text)
