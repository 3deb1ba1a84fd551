"""Objective dmpo: the packed 1:k step against k unshared pairs, its reference, its trees, and its mistakes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CHAT, byte_tokenizer, catalogue, chat_tokenizer, random_lists, tiny_llama
from tokenizers.normalizers import Lowercase
from torch.utils._python_dispatch import TorchDispatchMode

from alro_fast.data.negatives import Negatives
from alro_fast.data.preferences import Preference, Turn, read_preferences
from alro_fast.errors import AlroFastError
from alro_fast.losses import reference
from alro_fast.modeling.attention import answer_hidden_states
from alro_fast.modeling.lm_head import head_of
from alro_fast.modeling.logprobs import answer_logprobs
from alro_fast.modeling.lora import fuse_lora
from alro_fast.modeling.packing import Branch, Tree
from alro_fast.objectives.base import build_objective
from alro_fast.options import ObjectiveArguments, RankerTrainingArguments
from alro_fast.prompts import PromptBuilder
from alro_fast.prompts.preference import FORMS, PreferencePrompts
from alro_fast.training.plans.dataset import TreeDataset, build_batch
from alro_fast.training.reference_logprobs import data_fingerprint, model_fingerprint, reference_table
from alro_fast.training.trainer import RankerTrainer

TOKENIZER = byte_tokenizer()
BUILDER = PromptBuilder(TOKENIZER, "movies")
LISTS = random_lists(8, range(4, 7), seed=3, history=3)


def preferences(users=4, k=(3, 1, 4, 2), paired=()):
    """Users with ragged negatives; those in `paired` have a prompt per pair."""
    made = []
    for u in range(users):
        prompts = [f"User {u} liked Gold, Night and River. Next, instead of number {i}:" for i in range(k[u % len(k)])]
        rejected = tuple(f" Echo {u} {i}" for i in range(len(prompts)))
        if u in paired:
            made.append(Preference(f"p{u}", f"u{u}", tuple(prompts), tuple(f" North {u}" for _ in prompts), rejected))
        else:
            made.append(Preference(f"p{u}", f"u{u}", (prompts[0],), (f" North {u}",), rejected))
    return made


def make_objective(name="dmpo", form="titles", negatives=None, max_length=None, **options):
    builder = BUILDER if max_length is None else PromptBuilder(TOKENIZER, "movies", max_length=max_length)
    prompts = PreferencePrompts(TOKENIZER, builder, form=form, max_length=max_length)
    arguments = ObjectiveArguments(objective=name, **options)
    return build_objective(arguments, prompts, answer="ranking", seed=0, negatives=negatives)


def lora_model(seed=1, start=False, **overrides):
    """Tiny Llama under LoRA on every linear layer; start: B = 0, as before the first step."""
    base = tiny_llama(len(TOKENIZER), **overrides)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=start))
    fuse_lora(model)
    return model


def lora_gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def packed_terms(objective, model, examples):
    batch = build_batch(examples, objective)
    batch = objective.complete(model, batch, lambda packed: answer_hidden_states(model, packed))
    return objective.loss(answer_hidden_states(model, batch.packed), head_of(model), batch.packed, batch.targets)


def total(terms):
    return sum(term.weight * term.value for term in terms)


@pytest.mark.parametrize(
    ("variant", "paired"),
    [(variant, paired) for variant in ("dmpo", "mean_outside", "sdpo") for paired in ((), (0, 3))] + [("mult", ())],
)
def test_packed_step_equals_k_unshared_pairs(variant, paired):
    """Loss and all LoRA gradients against two forwards per pair, alone, on another attention, with all logits."""
    objective = make_objective(dmpo_variant=variant, ftx=0.5, dpo_beta=0.4)
    people = preferences(paired=paired)
    if variant == "mult":
        people[0] = replace(people[0], chosen=(" North 0", " South 0"))
    examples = objective.examples(people, range(4), epoch=0)
    model = lora_model()
    loss = total(packed_terms(objective, model, examples))
    loss.backward()
    mine = lora_gradients(model)
    free = make_objective(dmpo_variant=variant, ftx=0.5, dpo_beta=0.4, reference_free=True)
    assert loss.item() != pytest.approx(total(packed_terms(free, model, examples)).item(), rel=1e-3)

    model.zero_grad()
    model.base_model.model.set_attn_implementation("eager")

    def answer(ids):
        tokens = torch.tensor([ids.prompt_ids + ids.answer_ids])
        logits = model(input_ids=tokens).logits[0].log_softmax(-1)
        start = len(ids.prompt_ids)
        return logits[range(start - 1, tokens.shape[1] - 1), tokens[0, start:]].sum()

    users, entropies = [], []
    for example in examples:
        ids = example.views[0]
        groups = (ids.chosen if ids.paired or variant == "mult" else ids.chosen * len(ids.rejected), ids.rejected)
        sums = [torch.stack([answer(ids.branches[b]) for b in group])[None] for group in groups]
        with torch.no_grad(), model.disable_adapter():
            references = [torch.stack([answer(ids.branches[b]) for b in group])[None] for group in groups]
        users.append(reference.dmpo_loss(*sums, *references, beta=0.4, variant=variant).loss)
        lengths = [len(ids.branches[b].answer_ids) for b in ids.chosen]
        entropies += [-value / length for value, length in zip(sums[0][0], lengths)]
    by_hand = torch.stack(users).mean() + 0.5 * torch.stack(entropies).mean()
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    for name, gradient in lora_gradients(model).items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_ftx_of_pairs_counts_every_chosen_answer():
    objective = make_objective(ftx=1.0, reference_free=True)
    batch = build_batch(objective.examples(preferences(paired=(0,)), range(4), 0), objective)
    assert batch.counts == {"preference": 4, "reward_accuracy": 10, "reward_margin": 10, "ftx": 6}
    assert batch.targets.chosen_once.tolist() == [0, 2, 4, 6, 8, 13]


@pytest.mark.parametrize("variant", ["dmpo", "mean_outside"])
def test_before_the_first_step_the_loss_is_log_two(variant):
    """Policy = reference, any k: every margin is exactly 0."""
    objective = make_objective(dmpo_variant=variant)
    examples = objective.examples(preferences(paired=(1,)), range(4), epoch=0)
    terms = {term.name: term.value.item() for term in packed_terms(objective, lora_model(start=True), examples)}
    assert terms["preference"] == pytest.approx(math.log(2), abs=1e-7)
    assert abs(terms["reward_margin"]) < 1e-7


def test_the_shared_prompt_row_predicts_every_first_answer_token():
    objective = make_objective()
    examples = objective.examples(preferences(users=1, k=(4,)), [0], epoch=0)
    batch = build_batch(examples, objective)
    prompt = len(examples[0].views[0].branches[0].prompt_ids)
    firsts = [batch.packed.answer_rows[rows].item() for rows in batch.packed.branch_rows[0][:-1]]
    assert firsts == [prompt - 1] * 5  # answers begin alike (" N", " E"), so they share more than the prompt
    assert batch.packed.unique_tokens < prompt + sum(len(b.answer_ids) for b in examples[0].views[0].branches)
    model = lora_model()
    hidden = answer_hidden_states(model, batch.packed)
    assert len(hidden) == len(batch.packed.segments.distinct_rows) < len(batch.packed.labels)
    assert len({batch.packed.label_rows[batch.packed.branch_rows[0][b]].item() for b in range(5)}) == 1


def test_one_positive_among_many_under_mult_is_sdpo_and_several_count_all():
    people = preferences(users=2)
    several = [Preference("q", "u", people[0].prompts, (" North", " South"), people[0].rejected)]
    model = lora_model()
    values = {}
    for variant in ("sdpo", "mult"):
        objective = make_objective(dmpo_variant=variant)
        values[variant] = packed_terms(objective, model, objective.examples(people, range(2), 0))[0].value
    torch.testing.assert_close(values["mult"], values["sdpo"])
    objective = make_objective(dmpo_variant="mult", reference_free=True, dpo_beta=1.0)
    examples = objective.examples(several, [0], 0)
    sums = torch.from_numpy(answer_logprobs(model, [examples[0].tree])[0]).float()
    expected = -sums.log_softmax(0)[:2].sum()
    torch.testing.assert_close(packed_terms(objective, model, examples)[0].value, expected, rtol=1e-5, atol=1e-5)


# ---- training


def make_trainer(tmp_path, objective, sources, model=None, **options):
    defaults = {"learning_rate": 0.05, "num_train_epochs": 1, "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1e9}
    args = RankerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, logging_steps=1, **defaults | options)
    datasets = [TreeDataset(sources, objective) for _ in range(2)]
    return RankerTrainer(model or lora_model(), args, objective, *datasets)


def test_accumulation_equals_one_batch_and_logs_pairs(tmp_path):
    """Packed into one batch or several, one optimiser step is the same: ragged k, ftx and all."""
    objective = make_objective(ftx=0.3)
    people = preferences(users=6, paired=(2,))
    sizes = TreeDataset(people, objective).sizes
    trainers = [
        make_trainer(tmp_path, objective, people, tokens_per_batch=sum(sizes)),
        make_trainer(tmp_path, objective, people, tokens_per_batch=max(sizes), gradient_accumulation_steps=8),
    ]
    assert 3 <= len(trainers[1].get_train_dataloader()) <= 8
    weights, logs = [], []
    for trainer in trainers:
        trainer.train()
        assert trainer.state.global_step == 1
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if k in TERMS})
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert logs[0]["loss"] == pytest.approx(logs[0]["preference"] + 0.3 * logs[0]["ftx"], rel=1e-5)
    found = trainers[0].evaluate()
    assert 0 <= found["eval_reward_accuracy"] <= 1
    assert found["eval_loss"] == pytest.approx(found["eval_preference"] + 0.3 * found["eval_ftx"])


TERMS = ("loss", "preference", "ftx", "reward_accuracy", "reward_margin")


def test_training_learns_to_prefer(tmp_path):
    """Enough steps on six users: every pair in the right order, and far from the reference's log 2."""
    objective = make_objective(dpo_beta=0.5)
    people = preferences(users=6, paired=(2,))
    options = {"num_train_epochs": 15, "optim": "adamw_torch", "learning_rate": 0.01, "tokens_per_batch": 8192}
    trainer = make_trainer(tmp_path, objective, people, lora_model(start=True), **options)
    assert trainer.evaluate()["eval_preference"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_reward_accuracy"] == 1.0
    assert found["eval_preference"] < 0.2


def test_precomputed_references_equal_those_of_the_switched_off_adapter(tmp_path):
    objective, other = make_objective(), make_objective()
    people = preferences()
    examples = objective.examples(people, range(4), 0)
    model = lora_model()
    file = tmp_path / "reference.safetensors"
    objective.references = reference_table(model, examples, file)
    mine, on_the_fly = (packed_terms(one, model, examples)[0].value.item() for one in (objective, other))
    assert mine == pytest.approx(on_the_fly, rel=1e-6)
    written = file.stat().st_mtime_ns
    again = reference_table(lora_model(seed=9), examples, file)  # another adapter over the same base: same reference
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(again.values[name], values) for name, values in objective.references.values.items())
    with pytest.raises(AlroFastError, match="holds log-probabilities of another model than this run's"):
        reference_table(get_peft_model(tiny_llama(len(TOKENIZER), seed=5), LoraConfig(r=2)), examples, file)
    fewer = objective.examples(preferences(users=3), range(3), 0)
    with pytest.raises(AlroFastError, match="holds log-probabilities of other data or prompts"):
        reference_table(model, fewer, file)
    with pytest.raises(AlroFastError, match="no reference log-probabilities for p9"):
        objective.references.of(examples[0]._replace(source=Preference("p9", "u", ("a",), ("b",), ("c",))))
    file.write_bytes(b"not a table")
    with pytest.raises(AlroFastError, match="holds no reference log-probabilities"):
        reference_table(model, examples, file)


def test_the_data_fingerprint_is_of_every_token_and_of_where_answers_start():
    [one], objective = preferences(users=1), make_objective()

    def fingerprint(source):
        return data_fingerprint(objective.examples([source], [0], 0))

    own = fingerprint(one)
    assert fingerprint(replace(one, user_id="another")) == own
    prompt, rejected = one.prompts[0], one.rejected
    for changed in (
        replace(one, prompts=(prompt.replace("River", "Rivet"),)),
        replace(one, chosen=(" North 1",)),
        replace(one, rejected=(*rejected[:-1], " Echo 0 9")),
        replace(one, rejected=rejected[:-1]),
        replace(one, list_id="another"),
    ):
        assert fingerprint(changed) != own
    [example] = objective.examples([one], [0], 0)
    tree = example.tree
    later = Tree([Branch(list(ids), start + 1) for ids, start in zip(tree.ids, tree.answer_starts)], name=tree.name)
    assert data_fingerprint([example._replace(tree=later)]) != own


def test_the_model_fingerprint_is_of_every_weight_and_of_the_configuration():
    """One number changed in any one tensor of the base, or another rope_theta: another model; an adapter is none."""
    model = lora_model()
    own = model_fingerprint(model)
    assert model_fingerprint(tiny_llama(len(TOKENIZER))) == own == model_fingerprint(lora_model(seed=9, start=True))
    for name, weight in model.state_dict().items():
        if "lora_" not in name:
            kept = weight.flatten()[-1].item()
            weight.view(-1)[-1] += 1
            assert model_fingerprint(model) != own, name
            weight.view(-1)[-1] = kept
    assert model_fingerprint(model) == own
    rope = {"rope_type": "default", "rope_theta": 5e5}
    for changed in ({"rope_parameters": rope}, {"rms_norm_eps": 1e-5}):
        assert model_fingerprint(tiny_llama(len(TOKENIZER), **changed)) != own


# ---- ranking lists


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["catalogue", "candidates"])
def test_lists_become_one_positive_and_its_negatives(form, source):
    """Every form trains; the chosen branch is the highest rated candidate's; draws change with the epoch alone."""
    shelf = catalogue(300)
    negatives = Negatives(shelf, torch.ones(300).numpy(), LISTS, count=3, source=source, seed=1)
    objective = make_objective(form=form, negatives=negatives)
    usable = [one for one in LISTS if negatives.usable(one)]
    examples = objective.examples(usable, range(len(usable)), epoch=0)
    for one, example in zip(usable, examples):
        ids = example.views[0]
        assert len(ids.rejected) == min(3, len(one.candidates) - 1) if source == "catalogue" else len(ids.rejected) <= 3
        contest = negatives.contest(one, 0)
        best = max(contest.candidates, key=lambda item: dict(zip(one.candidates, one.ratings)).get(item, -1))
        if form == "identifiers":
            view = BUILDER.ranking(contest)
            place = contest.candidates.index(best)
            assert ids.branches[0].answer_ids == [view.candidate_ids[place]]
            assert all(len(branch.answer_ids) == 1 for branch in ids.branches)
        else:
            text = TOKENIZER.decode(ids.branches[ids.chosen[0]].answer_ids[:-1])
            assert text.split("\n")[0] == best.title
            assert ids.paired == (form == "pairs" and len(ids.rejected) > 1)
    again = objective.examples(usable, range(len(usable)), epoch=0)
    later = objective.examples(usable, range(len(usable)), epoch=1)
    assert all((a.tree.ids[0] == b.tree.ids[0]).all() for a, b in zip(examples, again))
    assert any(len(a.tree.ids[-1]) != len(b.tree.ids[-1]) or (a.tree.ids[-1] != b.tree.ids[-1]).any()
               for a, b in zip(examples, later))  # fmt: skip
    loss = total(packed_terms(objective, lora_model(), examples))
    loss.backward()
    assert loss.isfinite()


def test_histories_give_way_to_max_length():
    negatives = Negatives(catalogue(300), torch.ones(300).numpy(), LISTS, count=3)
    for form in FORMS:
        whole = make_objective(form=form, negatives=negatives).examples(LISTS[:1], [0], 0)[0]
        longest = max(map(len, whole.tree.ids))
        short = make_objective(form=form, negatives=negatives, max_length=longest - 5).examples(LISTS[:1], [0], 0)[0]
        assert short.views[0].dropped_history == 1
        assert max(map(len, short.tree.ids)) <= longest - 5
    with pytest.raises(AlroFastError, match=r"list l0: its candidates and answers take .* without history"):
        make_objective(negatives=negatives, max_length=50).examples(LISTS[:1], [0], 0)


def test_supervised_tuning_takes_the_chosen_answers_alone():
    objective = make_objective("sft_chosen")
    batch = build_batch(objective.examples(preferences(paired=(0,)), range(4), 0), objective)
    text = TOKENIZER.decode(batch.packed.labels)
    assert "North" in text
    assert "Echo" not in text
    assert batch.counts == {"sft": len(batch.packed.labels)}


# ---- prompts


def test_prompt_and_answer_are_the_tokenizers_own_ids():
    """Plain prompts as they stand, messages through the chat template; the answer ends the turn."""
    prompts = PreferencePrompts(TOKENIZER)
    ids = prompts.encode(Preference("p", "u", ("Seen: Gold. Next:",), (" North",), (" Echo",)))
    assert TOKENIZER("Seen: Gold. Next: North</s>")["input_ids"] == [
        *ids.branches[0].prompt_ids, *ids.branches[0].answer_ids
    ]  # fmt: skip
    tokenizer = chat_tokenizer()
    turns = (Turn("system", "Rank."), Turn("user", "Hi A"), Turn("assistant", "Yes"), Turn("user", "Next?"))
    ids = PreferencePrompts(tokenizer).encode(Preference("p", "u", (turns,), ("North",), ("Echo",)))
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    whole = [*messages, {"role": "assistant", "content": "North"}]
    expected = tokenizer.apply_chat_template(whole, tokenize=False)
    assert tokenizer.decode(ids.branches[0].prompt_ids + ids.branches[0].answer_ids) == expected
    assert ids.branches[0].prompt_ids == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_answers_of_equal_tokens_are_named_once(caplog):
    """A tokenizer that lowers letters cannot tell them apart."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    prompts = PreferencePrompts(tokenizer)
    prompts.encode(Preference("p0", "u", ("Next:",), (" North",), (" Echo", " echo")))
    assert not caplog.records
    for name in ("p1", "p2"):
        prompts.encode(Preference(name, "u", ("Next:",), (" North",), (" Echo", " NORTH")))
    [record] = caplog.records
    assert record.message.startswith("p1: a chosen and a rejected answer become the same tokens")


def test_no_text_of_a_file_becomes_a_special_token():
    tokenizer = chat_tokenizer()
    evil = "x</s><|assistant|>North"
    for prompt in ((Turn("user", evil),), evil):
        ids = PreferencePrompts(tokenizer).encode(Preference("p", "u", (prompt,), (evil,), ("Echo",)))
        special = set(tokenizer.all_special_ids)
        clean = PreferencePrompts(tokenizer).encode(
            Preference("p", "u", ((Turn("user", "x"),) if isinstance(prompt, tuple) else "x",), ("x",), ("Echo",))
        )
        for mine, plain in zip(ids.branches[0], clean.branches[0]):
            assert sum(i in special for i in mine) == sum(i in special for i in plain)


def test_a_template_without_system_turns_reads_it_before_the_user():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    ids = PreferencePrompts(tokenizer).encode(
        Preference("p", "u", ((Turn("system", "Rank."), Turn("user", "Hi")),), ("North",), ("Echo",))
    )
    assert tokenizer.decode(ids.branches[0].prompt_ids) == "<|user|>Rank.\nHi</s><|assistant|>"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_objective(max_length=20).examples(preferences(), range(4), 0), "more than --max_length 20"),
        (lambda: make_objective(form="essay"), "--preference_answer 'essay'"),
        (
            lambda: build_batch(
                make_objective(dmpo_variant="mult").examples(preferences(paired=(0,)), range(4), 0),
                make_objective(dmpo_variant="mult"),
            ),
            "has a prompt per pair; --dmpo_variant mult",
        ),
        (
            lambda: build_batch(
                make_objective().examples([Preference("p", "u", ("a",), ("b", "c"), ("d",))], [0], 0), make_objective()
            ),
            "has 2 chosen answers; --dmpo_variant dmpo takes one",
        ),
        (
            lambda: PreferencePrompts(TOKENIZER).encode(
                Preference("p", "u", ((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")),), ("d",), ("e",))
            ),
            "has no chat template, which a conversation of user, assistant, user needs",
        ),
    ],
)
def test_mistakes_get_one_line(make, said):
    with pytest.raises(AlroFastError) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_longer_than_the_batch_is_named_before_training(tmp_path):
    people = [Preference("p0", "u", ("Next:",), (" North" * 100,), (" Echo",))]
    with pytest.raises(AlroFastError, match=r"list p0 has .* distinct tokens, more than --tokens_per_batch 64"):
        make_trainer(tmp_path, make_objective(), people, tokens_per_batch=64)


# ---- the authors' files


def test_overfitting_the_authors_users(tmp_path, shared_data):
    """A few users of the released ML-1M file, k = 2: all pairs won after a short run."""
    people = read_preferences(shared_data / "dmpo-prompts" / "rec_data_ml_1m_dpo_ranking_2.json")
    people = sorted(people, key=lambda one: len(one.prompts[0][-1].content))[:6]
    options = {"num_train_epochs": 12, "optim": "adamw_torch", "learning_rate": 0.02, "tokens_per_batch": 16384}
    trainer = make_trainer(tmp_path, make_objective(dpo_beta=0.5), people, lora_model(start=True), **options)
    trainer.train()
    assert trainer.evaluate()["eval_reward_accuracy"] == 1.0


@pytest.mark.parametrize("variant", ["dmpo", "mult"])
def test_the_loss_never_waits_for_the_device_to_count(variant):
    """No index by a mask and no nonzero, whose sizes only the device knows, between forward and backward."""
    objective = make_objective(dmpo_variant=variant, reference_free=True)
    examples = objective.examples(preferences(), range(4), 0)
    batch, model = build_batch(examples, objective), lora_model()
    hidden = answer_hidden_states(model, batch.packed)
    with Sizes() as sizes:
        terms = {term.name: term for term in objective.loss(hidden, head_of(model), batch.packed, batch.targets)}
    assert sizes.unknown == []
    mask = batch.targets.rejected >= 0
    assert terms["reward_margin"].count == terms["reward_accuracy"].count == int(mask.sum()) == 10


class Sizes(TorchDispatchMode):
    """Operations whose result has as many entries as a tensor says."""

    def __init__(self):
        super().__init__()
        self.unknown = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket
        masks = (
            [i for i in arguments[1] if i is not None and i.dtype == torch.bool] if name is torch.ops.aten.index else []
        )
        if masks or name in (torch.ops.aten.nonzero, torch.ops.aten.masked_select):
            self.unknown.append(str(function))
        return function(*arguments, **(keywords or {}))
