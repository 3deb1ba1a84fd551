"""The Trainer of transformers, but for what it would lose: see the modules beside this one."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ...cli import lack_of_memory
from ...errors import AlroFastError, Stopped
from ...options import RankerTrainingArguments
from ...run_folder import ASIDE
from ..checkpoints import newest_of
from .finite import LOOK, Batch, FiniteSteps, all_finite, told_on_device, withhold
from .saving import RunLog, logged_until, publish, writing
from .stopping import Stopping

SKIPPED = "skipped_steps"


class GuardedTrainer(Trainer):
    """transformers.Trainer whose checkpoints are whole, which stops when asked to, and passes over bad steps.

    `_sums`: the loss's parts since the last log line, by their names, as a subclass adds them up.
    """

    args: RankerTrainingArguments
    model: torch.nn.Module

    def __init__(self, *given: Any, **options: Any) -> None:
        self.stopping, self.finite = Stopping(), FiniteSteps()
        self._sums: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}  # `_sums`, and the Trainer's own below, as the step at hand began
        self._loss_before = torch.zeros(())
        self._aside = self._push = False
        super().__init__(*given, **options)
        self.run_log = RunLog(self.run_folder)
        self.add_callback(_AtSteps(self))

    @property
    def run_folder(self) -> Path:
        return Path(cast(str, self.args.output_dir))

    # ---- from the first step to the last

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> TrainOutput:  # type: ignore[override]
        """As the Trainer's.

        Raises Stopped where a signal ended it, and AlroFastError where memory ran out, too many steps in a row had no
        number, or weights are none.
        """
        with self.stopping.listening(say=self.args.process_index == 0):
            try:
                done = super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
            except (MemoryError, RuntimeError) as error:
                wanted = lack_of_memory(error)
                if wanted is None:
                    raise
                raise AlroFastError(self._too_large(wanted)) from error
            self._look()
            self._check_weights()
            if self.stopping.agreed is not None:
                self._stop()
        if self.stopping.heard is not None:  # when all had agreed to end: as if nobody had listened
            signal.raise_signal(self.stopping.heard)
        return done

    def _finalize_training(self, *given: Any) -> TrainOutput:
        """As the Trainer's; a run that stops keeps its own weights and checkpoint, whichever is best."""
        if self.stopping.agreed is None:  # in the last step it came too late to be agreed upon
            self.stopping.agree_now(self.accelerator)
        state, best = self.state, self.state.best_model_checkpoint
        if self.stopping.agreed is not None:
            state.best_model_checkpoint = None
        try:
            return cast(TrainOutput, cast(Any, super())._finalize_training(*given))
        finally:
            state.best_model_checkpoint = best

    def _stop(self) -> None:
        """Raise Stopped, with a checkpoint of the step."""
        number, step = cast(Any, self.stopping.agreed), self.state.global_step
        checkpoint = self.run_folder / f"checkpoint-{step}"
        if not checkpoint.is_dir():
            self._save_checkpoint(self.model, None)
        if not checkpoint.is_dir():
            checkpoint = newest_of(self.run_folder) or checkpoint
        further = "go on with the same command and --resume_from_checkpoint true"
        if self.args.save_only_model:
            further = "it holds the model alone, as --save_only_model true asked for: nothing goes on from it"
        message = f"stopped by {number.name} after step {step:,} of {self.state.max_steps:,}: {checkpoint}; {further}"
        raise Stopped(message if self.args.process_index == 0 else "", 128 + number)

    def _too_large(self, wanted: str) -> str:
        return (
            f"there is not enough memory{wanted} for step {self.state.global_step + 1:,} with --tokens_per_batch "
            f"{self.args.tokens_per_batch}; give fewer (--gradient_accumulation_steps keeps a step as large), or add "
            "--gradient_checkpointing true"
        )

    def _init_training_state(self, *given: Any) -> tuple[int, int]:
        """As the Trainer's; the log of a run that goes on is that of its folder."""
        begun = super()._init_training_state(*given)
        checkpoint, state = next((g for g in given if isinstance(g, str)), None), self.state
        if checkpoint is not None:
            state.log_history = state.log_history or logged_until(state.global_step, Path(checkpoint).parent)
            self.finite.skipped = int(cast(Any, state.stateful_callbacks).get(SKIPPED, 0))
        if self.args.process_index == 0:
            self.run_log.begin(state.log_history)
        return begun

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, of the steps that counted; a run that stops says nothing of its end."""
        if "loss" in logs:
            self._look()
            self.finite.logged(logs)
        if "train_runtime" in logs and self.stopping.agreed is not None:
            return
        super().log(logs, start_time)
        if self.args.process_index == 0:
            with writing(self.run_log.path, self.run_folder):
                self.run_log.add(self.state.log_history[-1])

    # ---- steps without a number

    def training_step(self, model: torch.nn.Module, inputs: Any, *more: Any) -> Tensor:
        """As the Trainer's; `inputs` has `sources`, each with a `list_id`."""
        loss: Tensor = super().training_step(model, inputs, *more)
        self.finite.batches.append(Batch([source.list_id for source in inputs.sources], loss))
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """As the Trainer's; where it is no number, the step at hand changes nothing, not even what is logged.

        With --fp16 the scaler leaves out steps by itself, at first to find its scale: there the loss decides.
        """
        norm = cast(Any, super())._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's is of shards
        loss = self._tr_loss - self._loss_before
        bad = ~(loss if self.args.fp16 else torch.as_tensor(norm, device=self.args.device)).isfinite()
        if self.args.fp16 and self.args.world_size > 1:
            bad = cast(Tensor, self.accelerator.reduce(bad.float(), "sum")) > 0
        on_device = told_on_device(self.optimizer, self.args.device)
        if not self.args.fp16:
            withhold(self.optimizer, bad, on_device)
        before = self._parts
        parts = {name: total - before.get(name, 0.0) for name, total in self._sums.items()}
        self._sums = {n: torch.where(bad, before.get(n, torch.zeros_like(v)), v) for n, v in self._sums.items()}
        self._tr_loss.copy_(torch.where(bad, self._loss_before, self._tr_loss))
        self.finite.judge(self.state.global_step + 1, bad, parts)
        if not on_device or len(self.finite.pending) >= LOOK:
            self._look()
        return norm

    def _look(self) -> None:
        """AlroFastError after too many steps in a row; at the first where DeepSpeed has taken it already."""
        self.finite.look()
        row, args = self.finite.row, self.args
        most = 1 if self.is_deepspeed_enabled else args.max_nonfinite_steps
        if row is None or row.last - row.first + 1 < most:
            return
        row = row.joined(gather_object([row]))  # all raise here: the norm is the same in all
        steps = f"step {row.first:,} has" if row.last == row.first else f"steps {row.first:,} to {row.last:,} have"
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        mixed = ", --bf16 true" if args.bf16 else ", --fp16 true" if args.fp16 else ""
        raise AlroFastError(
            f"{steps} no finite loss and gradient ({row.described()}; --learning_rate {args.learning_rate:g}, weights "
            f"in {dtype}{mixed}); none of them changed a weight. Lower --learning_rate, or look at these lists; "
            f"{self._kept()}"
        )

    def _check_weights(self) -> None:
        """AlroFastError where a weight is no number: no checkpoint of such weights takes the place of a good one."""
        good = torch.tensor(float(all_finite(self.model)), device=self.args.device)
        if self.args.world_size > 1:
            good = cast(Tensor, self.accelerator.reduce(good, "mean"))
        if good < 1:
            raise AlroFastError(
                f"after step {self.state.global_step:,} weights are no numbers, with --learning_rate "
                f"{self.args.learning_rate:g}; lower it; {self._kept()}"
            )

    def _kept(self) -> str:
        newest = newest_of(self.run_folder)
        return "there is no checkpoint yet" if newest is None else f"{newest} is the last good checkpoint"

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run_folder / ASIDE) if self._aside else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the Trainer's, without the log, written aside and named when it is whole; none among bad steps."""
        self._look()
        if self.finite.row is not None:  # what is wrong may take more than steps: the checkpoint before it stays
            return
        self._check_weights()
        folder, state, args = self.run_folder, self.state, self.args
        final = folder / f"checkpoint-{state.global_step}"
        aside = folder / ASIDE / final.name
        best = folder / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best == final or best.is_dir()):
            state.best_model_checkpoint = str(best)
        cast(Any, state.stateful_callbacks)[SKIPPED] = self.finite.skipped
        with writing(final, folder):
            if args.should_save:
                shutil.rmtree(folder / ASIDE, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._aside, self.state = True, dataclasses.replace(state, log_history=[])
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside, slim, self.state = False, self.state, state
            if args.should_save:
                slim.best_model_checkpoint = state.best_model_checkpoint  # by the name that it will have
                slim.save_to_json(str(aside / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if args.process_index == 0 or (args.local_process_index == 0 and args.save_on_each_node):
                publish(aside, final)
                shutil.rmtree(folder / ASIDE, ignore_errors=True)
                rotate_checkpoints(str(folder), args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
        if self._push:
            self._push = False
            super()._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._push = True  # when it has its name

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; AlroFastError where it cannot be written."""
        told = writing(Path(output_dir or self.run_folder), self.run_folder)
        with contextlib.nullcontext() if self._aside else told:
            super().save_model(output_dir, _internal_call)


class _AtSteps(TrainerCallback):
    """Where the sums of a step begin, and whether it is the last one."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        trainer._parts, trainer._loss_before = dict(trainer._sums), trainer._tr_loss.clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, stopping = self.trainer, self.trainer.stopping
        if args.world_size == 1:
            stopping.agreed = stopping.heard
        if stopping.agreed is None:
            return
        if control.should_evaluate:  # which may take longer than there is time
            trainer._save_checkpoint(trainer.model, None)
        control.should_training_stop = control.should_save = control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopping.agreed is not None and state.epoch % 1:  # within the epoch
            control.should_save = control.should_evaluate = control.should_log = False
