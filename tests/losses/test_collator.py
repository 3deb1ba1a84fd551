"""The collator: padded batches that give the loss of the lists one by one, and `eval_loss` in the Trainer."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments

from alro_fast import ALROLoss, RankingCollator, RankingLists
from alro_fast.errors import AlroFastError
from alro_fast.losses import reference
from alro_fast.modeling.lm_head import fused_head

LETTERS, SEPARATOR, END, PAD = (10, 11, 12, 13), 14, 15, 0


def examples(count: int = 6) -> list[dict]:
    """Lists of 2 to 4 items in two orders, named by letters, behind prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        size = 2 + number % 3
        orders = [list(range(size)), list(range(size))[::-1]]
        prompts = [torch.randint(20, 64, (5 + number % 4,), generator=generator).tolist() for _ in orders]
        names = [[LETTERS[order.index(i)] for i in range(size)] for order in orders]
        ratings = torch.randint(1, 6, (size,), generator=generator).tolist()
        made.append({"prompts": prompts, "candidate_ids": names, "ratings": ratings})
    return made


class RankingTrainer(Trainer):
    """As docs/drop-in.md shows it."""

    loss = ALROLoss()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        trunk = fused_head(model)
        hidden = trunk.hidden_states(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        rows, lists = hidden.flatten(0, 1)[inputs["rows"]], RankingLists.from_batch(inputs)
        out = self.loss(rows, trunk.head.weight, inputs["labels"], lists, bias=trunk.head.bias)
        mine = model.training and num_items_in_batch is not None  # then the Trainer leaves accumulation to us
        loss = out.loss / self.current_gradient_accumulation_steps if mine else out.loss
        return (loss, {"loss": out.loss}) if return_outputs else loss


def by_the_definition(model, batch: list[dict], collator: RankingCollator):
    """The loss of logits of every prompt alone, without pads."""
    logits, labels, sizes = [], [], []
    for example in batch:
        for prompt, names in zip(example["prompts"], example["candidate_ids"]):
            best_first = [names[i] for i in sorted(range(len(names)), key=lambda i: -example["ratings"][i])]
            answer = [token for name in best_first for token in (*collator.separator, name)][len(collator.separator) :]
            answer += [] if collator.end_token_id is None else [collator.end_token_id]
            with torch.no_grad():
                out = model(torch.tensor([prompt + answer])).logits[0]
            logits.append(out[len(prompt) - 1 : -1])
            labels += answer
            sizes.append(len(answer))
    lists = RankingLists.from_ratings(
        [example["ratings"] for example in batch for _ in example["prompts"]],
        [names for example in batch for names in example["candidate_ids"]],
        twin=[-1 if not place else 2 * number for number, example in enumerate(batch) for place in range(2)],
        first_rows=[sum(sizes[:n]) for n in range(len(sizes))],
        step=1 + len(collator.separator),
    )
    return reference.alro_loss_from_logits(torch.cat(logits), torch.tensor(labels), lists)


@pytest.mark.parametrize(("separator", "end"), [((), None), ((SEPARATOR,), END)])
def test_pads_and_other_lists_change_nothing(tmp_path, separator, end):
    model, collator = tiny_llama(64, initializer_range=0.5), RankingCollator(PAD, separator=separator, end_token_id=end)
    model.set_attn_implementation("sdpa")
    trainer = RankingTrainer(model, arguments(tmp_path), data_collator=collator)
    wanted = by_the_definition(model, examples(), collator)
    with torch.no_grad():
        ours = trainer.compute_loss(model, collator(examples()))
    torch.testing.assert_close(ours, wanted.loss, rtol=1e-4, atol=1e-5)
    assert wanted.permutation > 1e-3


def arguments(folder, **options) -> TrainingArguments:
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 6, "learning_rate": 0.01} | options
    return TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, **options,
    )  # fmt: skip


def test_the_trainer_trains_and_reports_eval_loss(tmp_path):
    model, collator = tiny_llama(64), RankingCollator(PAD)
    model.set_attn_implementation("sdpa")
    trainer = RankingTrainer(
        model, arguments(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=3), data_collator=collator,
        train_dataset=examples(), eval_dataset=examples(),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(by_the_definition(model, examples(), collator).loss.item(), rel=1e-4)
    trainer.train()
    reported = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(reported) == 2
    assert reported[-1] < before


def test_accumulated_steps_are_means_not_sums(tmp_path):
    """Two batches that are alike, accumulated, are one of them: the gradient norm of the first step says so."""
    norms = []
    for steps in (1, 2):
        model = tiny_llama(64)
        model.set_attn_implementation("sdpa")
        options = {"gradient_accumulation_steps": steps, "max_steps": 1, "logging_steps": 1}
        trainer = RankingTrainer(
            model, arguments(tmp_path, **options), data_collator=RankingCollator(PAD), train_dataset=examples(2) * steps
        )
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"prompts": None},
            "example 1 has no prompts; expected prompts, candidate_ids, ratings .*remove_unused_columns",
        ),
        ({"prompts": []}, "example 1 has 0 prompts and 2 candidate_ids"),
        ({"prompts": [[1], []]}, "none of them empty"),
        ({"ratings": [1, 2]}, r"example 1 has 2 ratings and candidate_ids of \[3, 3\]"),
        ({"ratings": []}, "example 1 has 0 ratings"),
        ({"candidate_ids": [[10, 11, 12], [10, 11, 13]]}, "are not the same distinct tokens in every prompt"),
        ({"candidate_ids": [[10, 11, 11], [10, 11, 11]]}, "are not the same distinct tokens in every prompt"),
        ({"prompts": [[1, 2], [1, 2]]}, "example 1 has one prompt twice"),
        ({"ratings": [1, None, 2]}, r"example 1: ratings\[0\]\[1\] is None; expected a number in 0 .. 100"),
        ({"ratings": [1, -1, 2]}, r"example 1: ratings\[0\]\[1\] is -1"),
        ({"candidate_ids": [[10, 11, 12.5], [10, 11, 12]]}, r"example 1: candidate_ids\[0\]\[2\] is 12.5"),
        ({"prompts": [[1, -2], [1, 2]]}, r"example 1: prompts\[0\]\[1\] is -2; expected a token id"),
        ({"prompts": 5}, "example 1: prompts is 5; expected a sequence for every list"),
    ],
)
def test_examples_that_do_not_fit(change, said):
    batch = examples(2)
    batch[1] = {key: value for key, value in (batch[1] | change).items() if value is not None}
    with pytest.raises(AlroFastError, match=said):
        RankingCollator(PAD)(batch)
    with pytest.raises(AlroFastError, match="ratings holds no lists"):
        RankingCollator(PAD)([])
