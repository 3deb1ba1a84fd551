"""What objectives say of themselves, and who asks; what a run has learned to answer."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import yaml
from places import ROOT
from tiny import byte_tokenizer, make_run, random_lists

from alro_fast.errors import AlroFastError
from alro_fast.losses import reference
from alro_fast.modeling.attention import use_tree_attention
from alro_fast.modeling.packing import Branch, Tree, collate
from alro_fast.objectives.alro import Scoring
from alro_fast.objectives.base import (
    LEARNED,
    TEXTS,
    Batch,
    build_objective,
    describe,
    descriptions,
    learned_answers,
)
from alro_fast.options import ObjectiveArguments
from alro_fast.ranking.decoding import decode
from alro_fast.ranking.options import RANKED
from alro_fast.ranking.ranker import Ranker, expected_slots
from alro_fast.ranking.served import RankingClient
from alro_fast.training.help import groups, help_text
from alro_fast.training.kinds import KINDS
from alro_fast.training.plans.dataset import build_batch


def test_every_file_of_objectives_is_found_by_itself():
    assert sorted(descriptions()) == ["alro", "dmpo", "recranker", "sft", "sft_chosen"]
    assert {one.run for one in descriptions().values()} <= KINDS.keys()
    with pytest.raises(AlroFastError, match=r"'dmpoo' is unknown; expected one of alro, dmpo, recranker, sft$"):
        describe("dmpoo")


def test_nobody_else_knows_objectives_by_name():
    """No module compares with the name of one: what it wants to know stands in the description."""
    name = re.compile(rf"""["']({"|".join(descriptions())})["']""")
    own = {"options.py": {"alro", "dmpo"}, "prompts/recranker/task_template.py": {"recranker"}}  # defaults; a folder
    for path in (ROOT / "alro_fast").rglob("*.py"):
        file = path.relative_to(ROOT / "alro_fast").as_posix()
        found = set(name.findall(path.read_text())) - own.get(file, set())
        assert not found or file.startswith(("objectives/", "losses/")), f"{file} names {found}"


@pytest.mark.parametrize("name", ["sft", "alro", "recranker"])
def test_the_terms_it_logs_are_those_of_its_loss(name):
    tokenizer = byte_tokenizer()
    prompts = describe(name).prompts(tokenizer, "movies")
    objective = build_objective(ObjectiveArguments(objective=name), prompts, answer="ranking", seed=0)
    lists = random_lists(2, 4)
    batch = build_batch(objective.examples(lists, [0, 1], epoch=0), objective)
    assert batch.counts.keys() == describe(name).logs.keys()


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ("answer: ranking\\ngamma: null", "ranking"),
        ("objective: alro\\nanswer: ratings", "ratings"),
        ("objective: sft\\nanswer: ratings\\npreference_answer: titles", "ratings"),
        ("objective: recranker\\nanswer: ranking", "tasks"),
        ("objective: dmpo\\npreferences: null\\npreference_answer: titles", "titles"),
        (
            "objective: dmpo\\npreference_answer: identifiers\\nanswer: ratings",
            "identifiers",
        ),  # no grade was ever trained
        ("objective: sft_chosen\\npreference_answer: pairs", "pairs"),
        ("objective: sft_chosen\\npreferences: p.json\\npreference_answer: identifiers", "given"),
        ("objective: gone\\nlearned_answers: ranking", "ranking"),
    ],
)
def test_a_run_of_the_version_before_has_learned_what_its_options_say(options, learned):
    """They did not record it; some hold options of other objectives, given and never read."""
    options = yaml.safe_load(options.replace("\\n", "\n"))
    assert learned_answers(options) == learned
    assert (learned in RANKED) != (learned in TEXTS)
    assert learned in LEARNED


def test_every_reader_asks_what_was_learned(tmp_path, monkeypatch):
    """A run of the version before, tuned on identifiers while --answer ratings was given: rank reads identifiers."""
    run = make_run(tmp_path)
    (run / "config.yaml").write_text("objective: dmpo\npreference_answer: identifiers\nanswer: ratings\ngamma: 3\n")
    ranker = Ranker.load(run, device="cpu")
    assert (ranker.answer, ranker.scoring) == ("ranking", Scoring())
    assert RankingClient.load(run, "http://localhost", "m")
    (run / "config.yaml").write_text("objective: dmpo\npreferences: p.json\npreference_answer: identifiers\n")
    for load in (lambda: Ranker.load(run, device="cpu"), lambda: RankingClient.load(run, "http://localhost", "m")):
        with pytest.raises(AlroFastError, match="was tuned on answers that are titles"):
            load()
    (run / "config.yaml").write_text("learned_answers: essays\n")
    with pytest.raises(AlroFastError, match="has learned to answer 'essays'; expected one of"):
        Ranker.load(run, device="cpu")


# ---- the expected slot is read as it was trained

SCORINGS = [
    ("logprob", "candidates", 1.0), ("prob", "candidates", None), ("logit", "candidates", 0.5),
    ("logprob", "vocab", 2.0), ("prob", "vocab", None),
]  # fmt: skip


@pytest.mark.parametrize(("score", "space", "gamma"), SCORINGS)
def test_expected_slots_are_those_of_the_loss(tmp_path, score, space, gamma):
    """From the run's folder to the scores: the soft-argmax of the definition, over teacher-forced full logits."""
    run = make_run(tmp_path)
    options = {"objective": "alro", "answer": "ranking", "score": score, "score_space": space, "gamma": gamma}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    ranker, (entry,) = Ranker.load(run, device="cpu"), random_lists(1, 4, seed=6)
    (found,) = ranker.scores([entry], method="expected")
    (prompt,) = ranker.prompts.rankings([entry], [None])
    (greedy,) = decode(ranker.model, [prompt], 1, 0)
    answer = list(prompt.answer_ids)
    for slot, candidate in zip(prompt.slot_offsets, greedy.order):
        answer[slot] = prompt.candidate_ids[candidate]
    ids = torch.tensor([prompt.prompt_ids + answer])
    base = ranker.model.get_base_model()
    base.set_attn_implementation("eager")
    with torch.no_grad():
        logits = ranker.model(input_ids=ids).logits[0].double()
    use_tree_attention(base)
    rows = [len(prompt.prompt_ids) + slot - 1 for slot in prompt.slot_offsets]
    y = reference.identifier_scores(logits[rows], torch.tensor(prompt.candidate_ids), score, space)
    sharp = gamma if gamma is not None else 10.0
    np.testing.assert_allclose(found, -reference.soft_argmax(y, sharp).numpy(), atol=1e-4)
    if (score, space) != ("logprob", "candidates"):
        assert np.abs(found + expected_slots(greedy.slots, 1.0)).max() > 1e-3  # the defaults would say otherwise


# ---- --help


def test_help_groups_options_by_objective():
    overview = help_text(None, ["demo"])
    for one in descriptions().values():
        assert one.stands_for or f"{one.name} {one.summary}" in " ".join(overview.split())
    assert "--dpo_beta FLOAT" in help_text("dmpo", [])
    assert "[0.1]" in help_text("dmpo", [])
    assert "--dpo_beta" not in help_text("alro", [])
    assert "Read with --answer ranking" in help_text("alro", [])
    for name in groups():
        assert name in overview
        lines = help_text(name, []).splitlines()
        assert all(len(line) <= 100 for line in lines), name
        assert len(lines) <= 60 or name == "transformers", (name, len(lines))
    assert len(overview.splitlines()) <= 50
    assert max(map(len, overview.splitlines())) <= 100


def test_a_batch_is_pinned_whole(monkeypatch):
    """Every tensor of it, those of its segments and of its targets; what else it holds stays."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(id(tensor)) or tensor.clone())
    packed = collate([Tree([Branch([1, 2, 3], 1), Branch([1, 4], 1)])], [0])
    batch = Batch(packed, ((torch.ones(2), None), 3), {"sft": 3}, 1, [])
    made = batch.pin_memory()
    wanted = {id(t) for part in (packed, packed.segments) for t in vars(part).values() if isinstance(t, torch.Tensor)}
    assert wanted | {id(batch.targets[0][0])} <= set(pinned)
    assert made.targets[0][0] is not batch.targets[0][0]
    assert made.targets[1] == 3
    assert torch.equal(made.packed.labels, packed.labels)
