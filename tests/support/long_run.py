"""A run over some hundred lists that stops where it is told to and says which lists it trained.

As a script, in one process of several: `long_run.py FOLDER key=value ...` with the arguments of `train`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, random_lists, tiny_llama
from transformers import TrainerCallback

from alro_fast.objectives.base import build_objective
from alro_fast.options import ObjectiveArguments, RankerTrainingArguments
from alro_fast.prompts import PromptBuilder
from alro_fast.training.plans.dataset import TreeDataset
from alro_fast.training.trainer import RankerTrainer

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


class _StrikeAt(TrainerCallback):
    """SIGTERM for the last process alone, after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _options(folder: Path) -> None:
    (folder / "config.yaml").write_text("use_peft: true\n", encoding="utf-8")


def train(
    folder: Path, *, lists=400, epochs=3, stop=0, resume=None, dropout=0.0, budget=600, accumulation=4, device="cpu",
    objective="sft", backend="auto", strike=0, judged=0, **options,
):  # fmt: skip
    """Train to the end, or to optimiser step `stop`, where a checkpoint is left as after every 20 steps.

    judged: how many lists to validate on.

    Returns the trainer, and [(epoch, list_id)] of what this process trained, in order.
    """
    tokenizer = byte_tokenizer()
    objective = build_objective(
        ObjectiveArguments(objective=objective, backend=backend), PromptBuilder(tokenizer, "movies"), answer="ranking",
        seed=0,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_dropout=dropout)
    model = get_peft_model(tiny_llama(len(tokenizer), **SMALL), lora)
    options = {"save_strategy": "steps", "save_steps": 20, "save_total_limit": 99, "optim": "adamw_torch"} | options
    options = {"learning_rate": 0.01, "logging_steps": 50} | options
    args = RankerTrainingArguments(
        output_dir=str(folder), use_cpu=device == "cpu", disable_tqdm=True, num_train_epochs=epochs,
        tokens_per_batch=budget, gradient_accumulation_steps=accumulation, report_to=[], **options,
    )  # fmt: skip
    data = TreeDataset(random_lists(lists, range(2, 6), seed=3, history=0), objective)
    valid = TreeDataset(random_lists(judged, range(2, 6), seed=4, history=0), objective) if judged else None
    trainer = RankerTrainer(
        model, args, objective, data, valid, callbacks=[_StopAt(stop), _StrikeAt(strike)], save_extras=_options
    )
    seen, compute = [], trainer.compute_loss

    def note(model, inputs, **more):
        seen.extend((trainer.cursor.epoch, source.list_id) for source in inputs.sources)
        return compute(model, inputs, **more)

    trainer.compute_loss = note
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, seen


def weights(trainer: RankerTrainer) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in trainer.model.parameters() if p.requires_grad])


if __name__ == "__main__":
    folder, options = Path(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[2:])
    trainer, seen = train(folder, **{key: value if key == "resume" else int(value) for key, value in options.items()})
    torch.save(
        {"seen": seen, "weights": weights(trainer), "step": trainer.state.global_step},
        folder / f"seen-{trainer.args.process_index}.pt",
    )
