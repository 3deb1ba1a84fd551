"""RankerTrainer: every list once an epoch, exact losses under accumulation, logs, and the loss it minimises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, random_lists, tiny_llama

from alro_fast.errors import AlroFastError
from alro_fast.losses import reference
from alro_fast.modeling.attention import answer_hidden_states
from alro_fast.modeling.lm_head import head_of
from alro_fast.modeling.planning import EpochPlans
from alro_fast.objectives.base import build_objective
from alro_fast.options import ObjectiveArguments, RankerTrainingArguments
from alro_fast.prompts import PromptBuilder
from alro_fast.training.batches import CURSOR, Cursor, PlannedBatches
from alro_fast.training.plans import dataset
from alro_fast.training.plans.dataset import TreeDataset, build_batch
from alro_fast.training.trainer import RankerTrainer, _Progress

TOKENIZER = byte_tokenizer()
PROMPTS = PromptBuilder(TOKENIZER, "movies")
LISTS = random_lists(8, range(3, 6), seed=3, history=3)


def make_objective(name="alro", answer="ranking", **options):
    return build_objective(ObjectiveArguments(objective=name, **options), PROMPTS, answer=answer, seed=0)


def make_trainer(tmp_path, objective=None, lists=LISTS, model=None, callbacks=(), **options):
    defaults = {"learning_rate": 0.05, "num_train_epochs": 1, "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1.0}
    args = RankerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, logging_steps=1, **defaults | options)
    objective = objective or make_objective()
    model = model or tiny_llama(len(TOKENIZER))
    return RankerTrainer(
        model,
        args,
        objective,
        TreeDataset(lists, objective),
        TreeDataset(lists[:3], objective),
        callbacks=list(callbacks),
    )


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_every_list_is_trained_once_an_epoch(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2, tokens_per_batch=900)
    seen = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **more: seen.extend(inputs.sources) or compute(model, inputs, **more)
    planned = trainer.planned_steps()
    trainer.train()
    ids = [source.list_id for source in seen]
    assert len(ids) == 16
    assert {i: ids.count(i) for i in ids} == {source.list_id: 2 for source in LISTS}
    assert trainer.state.global_step == planned > 2


def test_plans_are_made_once_in_a_run(tmp_path, monkeypatch):
    """One of the training lists, one of the validation lists, whoever asks for loaders and however often."""
    made, plan = [], dataset.EpochPlans
    monkeypatch.setattr(dataset, "EpochPlans", lambda *given: made.append(given) or plan(*given))
    trainer = make_trainer(tmp_path, num_train_epochs=2, tokens_per_batch=900, eval_strategy="epoch")
    assert trainer.planned_steps() == trainer.planned_steps()
    trainer.train()
    assert [len(sizes) for sizes, *_ in made] == [8, 3]


def test_a_cursor_says_what_is_left_within_the_last_rounds(tmp_path):
    """Of three processes: nothing while that is the plan, then the batches that are no longer its own."""
    trainer = make_trainer(tmp_path)
    batches = PlannedBatches(
        EpochPlans([25] * 7, 50, 5), 0, 3
    )  # four batches: two rounds, the last of one or two lists
    trainer._batches, trainer._here, trainer._before = batches, 0, 0
    trainer.current_gradient_accumulation_steps = 1
    args = SimpleNamespace(world_size=3, gradient_accumulation_steps=1)
    state = SimpleNamespace(stateful_callbacks={}, epoch=0.0)
    left = batches.left(0)
    assert left[:3] != batches.plans(0)[:3]
    for trained, epoch in ((3, 0.5), (6, 1.0)):
        _Progress(trainer).on_step_end(args, state, None)
        cursor = Cursor(**state.stateful_callbacks[CURSOR])
        assert (cursor.trained, cursor.rest, state.epoch) == (trained, left[trained:], epoch)


def test_so_many_lists_a_batch(tmp_path):
    trainer = make_trainer(tmp_path, tokens_per_batch=8192, lists_per_batch=3)
    sizes = sorted(len(batch) for [(_, batch)] in trainer.get_train_dataloader().batch_sampler)
    assert sizes == [2, 3, 3]
    assert trainer.planned_steps() == 3
    assert len(trainer.get_eval_dataloader()) == 1


def test_emitted_candidates_are_left_out_of_the_permutation_loss():
    """As the definition has it, on a tiny model; and it is another loss than with them."""
    model, found = tiny_llama(len(TOKENIZER)), {}
    for masked in (False, True):
        objective = make_objective(psl_mask_emitted=masked)
        batch = build_batch(objective.examples(LISTS, range(len(LISTS)), 0), objective)
        hidden, head = answer_hidden_states(model, batch.packed), head_of(model)
        terms = {term.name: term.value for term in objective.loss(hidden, head, batch.packed, batch.targets)}
        expected = reference.alro_loss(
            hidden, head.weight, batch.packed.label_table, batch.targets.lists,
            alpha=0.5, beta=0.5, gamma=1.0, sigma=1.0, psl_mask_emitted=masked,
        )  # fmt: skip
        found[masked] = terms["permutation"].item()
        assert found[masked] == pytest.approx(expected.permutation.item(), rel=1e-4)
    assert abs(found[True] - found[False]) > 1e-3 * found[False]


@pytest.mark.parametrize("answer", ["ranking", "ratings"])
def test_accumulation_equals_one_batch(tmp_path, answer):
    """Packed four ways or one, the step is the same: terms are means over the whole step."""
    objective = make_objective(answer=answer)
    sizes = TreeDataset(LISTS, objective).sizes
    whole = make_trainer(tmp_path, objective, tokens_per_batch=sum(sizes))
    parts = make_trainer(
        tmp_path, objective, tokens_per_batch=max(*sizes, sum(sizes) // 4), gradient_accumulation_steps=8
    )
    before = parameters(whole)
    batches = len(parts.get_train_dataloader())
    assert 3 <= batches <= 8
    for trainer in (whole, parts):
        trainer.train()
        assert trainer.state.global_step == 1
    assert (parameters(whole) - before).abs().max() > 1e-3
    torch.testing.assert_close(parameters(parts), parameters(whole), rtol=1e-6, atol=1e-6)
    logs = [
        {k: v for k, v in t.state.log_history[0].items() if k in ("loss", "sft", "soft_lambda", "permutation")}
        for t in (parts, whole)
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-6, abs=1e-7)
    assert logs[0]["loss"] == pytest.approx(
        logs[0]["sft"] + 0.5 * logs[0]["soft_lambda"] + 0.5 * logs[0]["permutation"]
    )


@pytest.mark.parametrize("answer", ["ranking", "ratings"])
def test_loss_is_the_reference_loss_of_unshared_forwards(answer):
    """Trees, packing, targets and ops against full logits of every presentation alone and reference.alro_loss."""
    objective = make_objective(answer=answer, alpha=0.7, beta=0.3)
    examples = objective.examples(LISTS[:3], [0, 1, 2], epoch=1)
    batch = build_batch(examples, objective)
    model = tiny_llama(len(TOKENIZER)).double()

    terms = objective.loss(answer_hidden_states(model, batch.packed), head_of(model), batch.packed, batch.targets)
    model.set_attn_implementation("eager")
    rows = [
        model.get_decoder()(torch.from_numpy(branch)[None]).last_hidden_state[0, start - 1 : -1]
        for example in examples
        for branch, start in zip(example.tree.ids, example.tree.answer_starts)
    ]
    distinct = len(batch.packed.segments.distinct_rows)
    hidden = torch.zeros(distinct, rows[0].shape[1], dtype=torch.double).index_copy(
        0, batch.packed.label_rows, torch.cat(rows)
    )
    head = head_of(model)
    expected = reference.alro_loss(
        hidden, head.weight, batch.packed.label_table, batch.targets.lists, alpha=0.7, beta=0.3, gamma=1.0, sigma=1.0
    )
    assert {t.name: t.value.item() for t in terms} == pytest.approx(
        {
            "sft": expected.sft.item(),
            "soft_lambda": expected.soft_lambda.item(),
            "permutation": expected.permutation.item(),
        },
        rel=1e-5,
    )
    assert expected.permutation > 0
    assert expected.soft_lambda > 0


def test_targets_name_the_right_rows():
    """Row slot_rows[l, k] predicts the identifier of the candidate whose target slot is k + 1."""
    objective = make_objective(permutations=2)
    examples = objective.examples(LISTS, range(len(LISTS)), epoch=0)
    batch = build_batch(examples, objective)
    lists = batch.targets.lists
    assert lists.twin.tolist() == [v for t in range(len(LISTS)) for v in (-1, 3 * t, 3 * t)]
    for l in range(len(lists.twin)):
        m = len(LISTS[l // 3].candidates)
        assert (lists.slot_rows[l, m:] == -1).all()
        by_rank = lists.candidate_ids[l, :m][lists.ranks[l, :m].argsort()]
        labels = batch.packed.label_table[lists.slot_rows[l, :m]]  # of every view whose candidates read alike
        assert (labels == by_rank[:, None]).any(dim=1).all()
    assert batch.counts == {"sft": len(batch.packed.labels), "soft_lambda": 24, "permutation": 16}


def test_presentations_depend_on_seed_epoch_and_list_alone():
    objective = make_objective()
    orders = [objective.orders(LISTS[0], index, epoch)[1] for index in range(3) for epoch in range(3)]
    assert orders == [make_objective().orders(LISTS[0], index, epoch)[1] for index in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) > 3
    assert all(sorted(order) == list(range(len(order))) != order for order in orders)


def test_logs_parts_throughput_and_validation(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="epoch", tokens_per_batch=1200)
    trainer.evaluate_ranking = lambda: {"ndcg@3": 0.5}
    trainer.train()
    line = trainer.state.log_history[0]
    wanted = {"loss", "sft", "soft_lambda", "permutation", "grad_norm", "learning_rate", "lists_per_second"}
    assert wanted | {"unique_tokens_per_second", "sharing_ratio", "padding_ratio", "head_row_share"} <= line.keys()
    assert line["sharing_ratio"] > 1.2
    validation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert validation["eval_ndcg@3"] == 0.5
    parts = validation["eval_sft"] + 0.5 * validation["eval_soft_lambda"] + 0.5 * validation["eval_permutation"]
    assert validation["eval_loss"] == pytest.approx(parts)


def test_a_list_over_the_budget_is_named_before_training(tmp_path):
    with pytest.raises(AlroFastError, match=r"list l\d has \d+ distinct tokens, more than --tokens_per_batch 64"):
        make_trainer(tmp_path, tokens_per_batch=64)


def test_sft_has_one_presentation_and_no_other_term(tmp_path):
    trainer = make_trainer(tmp_path, make_objective("sft"), tokens_per_batch=2000)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(line["sft"])
    assert "permutation" not in line
    assert trainer.train_dataset.unshared_tokens == sum(trainer.train_dataset.sizes) + len(LISTS)  # but for their ends


def test_an_unknown_objective_is_named():
    with pytest.raises(AlroFastError, match="--objective 'alroo' is unknown; expected one of alro, dmpo, re"):
        make_objective("alroo")
