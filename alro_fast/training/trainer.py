"""RankerTrainer: transformers.Trainer over packed token trees, with exact losses under gradient accumulation.

Checkpoints, resumption, schedulers, clipping, distribution and logging are the Trainer's. Ours: batches measured in
tokens, the trunk over every distinct token once, the head on answer rows alone, and loss terms that are means over the
whole optimiser step, however many forward passes and processes it is split into.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..errors import AlroFastError
from ..modeling.attention import answer_hidden_states
from ..modeling.lm_head import Head
from ..modeling.packing import PackedBatch
from ..modeling.planning import EpochPlans
from ..modeling.sharded import accept_work, trained_weights, with_head, within
from ..objectives.base import Batch, LossTerm, Objective
from ..options import RankerTrainingArguments
from ..run_folder import share
from .batches import CURSOR, Cursor, PlannedBatches
from .console import reporter
from .guards.finite import felt_by_all
from .guards.trainer import GuardedTrainer
from .plans.dataset import PlannedLoader, TreeDataset, only
from .speed.meter import Meter
from .speed.profile import VALIDATION, Profiler, part
from .speed.tally import Tally

logger = logging.getLogger(__name__)


class RankerTrainer(GuardedTrainer):
    """transformers.Trainer for ranking objectives.

    `evaluate_ranking()` -> {"ndcg@3": ...} is called at every evaluation; `save_extras(folder)` after every
    save, on the process that saves. Where the Trainer hands dictionaries of tensors on, this one has a `Batch`, hence
    the overrides that a type checker does not accept.
    """

    objective: Objective
    train_dataset: TreeDataset

    def __init__(
        self,
        model: torch.nn.Module,
        args: RankerTrainingArguments,
        objective: Objective,
        train_dataset: TreeDataset,
        eval_dataset: TreeDataset | None = None,
        *,
        evaluate_ranking: Callable[[], dict[str, float]] | None = None,
        save_extras: Callable[[Path], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        self.objective, self.evaluate_ranking, self.save_extras = objective, evaluate_ranking, save_extras
        self.meter = Meter(model, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None)
        self.start = self.cursor = Cursor()
        try:
            super().__init__(
                model, args, data_collator=cast(Any, only), train_dataset=train_dataset, eval_dataset=eval_dataset,
                callbacks=callbacks, **options,
            )  # fmt: skip
        except AlroFastError:
            raise
        except (ValueError, TypeError, ImportError) as error:  # options that do not go together, or with this machine
            raise AlroFastError(f"{next(iter(str(error).strip().splitlines()), error)}") from error
        self.loss_is_scaled_for_ga = True
        self.tally = Tally(self.meter, args.world_size, self._total)
        train_dataset.check(args.tokens_per_batch)
        if eval_dataset is not None:
            eval_dataset.check(self._eval_budget, self._eval_option)
        accept_work(model)
        self.add_callback(_Progress(self))
        self.profiler = Profiler(self.meter, Path(cast(str, args.output_dir)), args.profile) if args.profile else None
        if self.profiler is not None and args.process_index == 0:
            self.add_callback(self.profiler)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(reporter(args))

    # ---- epochs and batches

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | None = None, **options: Any
    ) -> TrainOutput:
        """As the Trainer's; a resumed run goes on with the first list that its checkpoint has not trained."""
        self.start = Cursor() if resume_from_checkpoint is None else Cursor.of(resume_from_checkpoint)
        self.start = self.cursor = self.get_train_dataloader().batch_sampler.start
        if self.profiler is not None:
            self.profiler.check(self.planned_steps() - self.start.step)
        before, now = (
            (self.start.processes, self.start.accumulation),
            (self.args.world_size, self.args.gradient_accumulation_steps),
        )
        if self.args.process_index == 0 and None not in before and before != now:
            print(
                f"{resume_from_checkpoint} was trained by {before[0]} x {before[1]} batches a step, processes x "
                f"accumulation; with {now[0]} x {now[1]}, {self.planned_steps() - self.start.step:,} steps are left"
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def set_initial_training_values(  # type: ignore[override]
        self, args: RankerTrainingArguments, dataloader: PlannedLoader
    ) -> tuple[Any, ...]:
        """As the Trainer's; epochs and steps of a run that goes on are those before it and those to come."""
        values: tuple[Any, ...] = super().set_initial_training_values(args, dataloader)
        epochs, steps_in_epoch, *numbers, in_epoch, steps = values
        start, accumulation = self.start, args.gradient_accumulation_steps
        if start.step:
            left = dataloader.batch_sampler.rounds_left(start.epoch)
            if args.max_steps > 0:
                further = steps - start.step - -(-left // accumulation)
                epochs = start.epoch + 1 + max(0, -(-further // steps_in_epoch))
            else:
                wanted = min((steps - start.epoch * steps_in_epoch) * accumulation, in_epoch)  # fewer in a cut epoch
                here = max(0, -(-(wanted - in_epoch + left) // accumulation))
                steps = start.step + here + max(0, steps - (start.epoch + 1) * steps_in_epoch)
            if steps <= start.step:
                epochs = start.epoch
        return epochs, steps_in_epoch, *numbers, in_epoch, steps

    def _init_training_state(self, *given: Any) -> tuple[int, int]:
        """The epoch to begin with; what of it was trained is left out by the sampler, not by the Trainer."""
        super()._init_training_state(*given)
        return self.start.epoch, 0

    def _run_epoch(self, **given: Any) -> None:  # type: ignore[override]
        """One epoch, or what is left of it."""
        batches, epoch = given["train_dataloader"].batch_sampler, given["epoch"]
        while self.cursor.epoch < epoch:
            self.cursor = self.cursor.next_epoch()
        left = batches.rounds_left(epoch)
        steps = -(-left // self.args.gradient_accumulation_steps)
        self._batches, self._here = batches, 0  # trained of what is left of the epoch
        self._before = batches.done if epoch == self.start.epoch else 0
        cast(Any, super())._run_epoch(**given | {"steps_in_epoch": left, "num_update_steps_per_epoch": steps})

    def get_train_dataloader(self) -> PlannedLoader:
        args, data = self.args, self.train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        return self._loader(data, data.plans(args.tokens_per_batch, seed, args.lists_per_batch), self.start)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PlannedLoader:
        dataset = cast(TreeDataset, eval_dataset if eval_dataset is not None else self.eval_dataset)
        dataset.check(self._eval_budget, self._eval_option)
        return self._loader(dataset, dataset.plans(self._eval_budget, seed=None))

    @property
    def _eval_budget(self) -> int:
        return self.args.eval_tokens_per_batch or self.args.tokens_per_batch

    @property
    def _eval_option(self) -> str:
        return "--eval_tokens_per_batch" if self.args.eval_tokens_per_batch else "--tokens_per_batch"

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        return len(cast(TreeDataset, dataloader.dataset))

    def _loader(self, dataset: TreeDataset, plans: EpochPlans, start: Cursor | None = None) -> PlannedLoader:
        args = self.args
        workers = args.dataloader_num_workers
        return PlannedLoader(
            dataset,
            PlannedBatches(plans, args.process_index, args.world_size, start),
            num_workers=workers,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            pin_memory=args.device.type == "cuda",  # `_prepare_inputs` copies without waiting
        )

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, float] | None]:
        """The batches of one optimiser step and, per loss term, how many things it averages over in all processes."""
        with part("collation"):
            batches = list(itertools.islice(epoch_iterator, num_batches))
        totals: dict[str, float] = {}
        for batch in batches:
            for name, count in batch.counts.items():
                totals[name] = totals.get(name, 0) + count
        if self.args.world_size > 1:
            given = [*(totals[name] for name in sorted(totals)), *self.stopping.counts()]
            summed = self._total(torch.tensor(given, dtype=torch.float64, device=device)).tolist()
            self.stopping.agree(summed[len(totals) :])
            totals = dict(zip(sorted(totals), summed))
        return batches, totals

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        return cast(torch.Tensor, self.accelerator.reduce(values, "sum")) if self.args.world_size > 1 else values

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        self.meter.take(inputs.packed)
        return inputs.to(self.args.device, non_blocking=True)

    def floating_point_ops(self, inputs: Batch) -> int:  # type: ignore[override]
        return 0

    def planned_steps(self) -> int:
        """Optimiser steps of the whole run."""
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return int(steps)

    # ---- loss

    def compute_loss(  # type: ignore[override]
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: dict[str, float] | None = None,
    ) -> Any:
        """Sum of weight * term, each term counted by its share of the whole optimiser step."""
        terms = self.loss_terms(model, inputs)
        totals = num_items_in_batch or {term.name: term.count for term in terms}
        counts = inputs.counts  # those of the terms, or none where the batch is not to count
        share = {term.name: counts[term.name] / totals[term.name] if totals[term.name] else 0.0 for term in terms}
        loss: Any = sum(term.weight * share[term.name] * term.value for term in terms)
        if model.training:
            self._note(inputs, terms, share)
        # gradients are averaged over processes, each of which divided by the counts of all
        loss = felt_by_all(cast(torch.Tensor, loss)) * self.args.world_size
        return (loss, terms) if return_outputs else loss

    def loss_terms(self, model: torch.nn.Module, batch: Batch) -> list[LossTerm]:
        """One forward pass: trunk over the packed stream, head and losses on its answer rows; all of it within the
        model's own, where engines that shard weights have them whole."""
        plain: Any = self.accelerator.unwrap_model(model)
        terms: list[LossTerm] = []

        def trunk(packed: PackedBatch) -> torch.Tensor:
            with part("trunk"), self.meter.forward(packed):
                return answer_hidden_states(plain, packed)

        def work() -> tuple[torch.Tensor, ...]:
            whole = batch
            if hasattr(self.objective, "complete"):
                whole = cast(Any, self.objective).complete(plain, batch, trunk)
                torch.clear_autocast_cache()  # weights cast without gradients serve no forward that has them

            def losses(hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor, ...]:
                terms.extend(self.objective.loss(hidden, head, whole.packed, whole.targets))
                return tuple(term.value for term in terms)

            hidden = trunk(whole.packed)
            with part("loss"):
                return with_head(plain, hidden, losses)

        return [term._replace(value=value) for term, value in zip(terms, within(model, work), strict=True)]

    # ---- logs

    def _note(self, batch: Batch, terms: list[LossTerm], share: dict[str, float]) -> None:
        for term in terms:
            value = term.value.detach() * share[term.name]
            self._sums[term.name] = self._sums[term.name] + value if term.name in self._sums else value
        self.tally.note(batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss's parts, throughput and sharing, of all processes, to the Trainer's line of a training step."""
        if "loss" in logs:
            logs |= self.tally.line(self.state.global_step, self._sums)
            self._sums.clear()
        if "train_runtime" in logs:
            logs |= self.tally.end(self.state.global_step)
        super().log(logs, start_time)

    # ---- evaluation and saving

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss terms over the validation lists, and whatever `evaluate_ranking` measures (NDCG)."""
        with self.meter.outside(), part(VALIDATION):
            return self._evaluated(eval_dataset, metric_key_prefix)

    def _evaluated(self, eval_dataset: Any, metric_key_prefix: str) -> dict[str, float]:
        started = time.perf_counter()
        model = self.model
        model.eval()
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        weights: dict[str, float] = {}
        for batch in self.get_eval_dataloader(eval_dataset):
            with self.compute_loss_context_manager():
                for term in self.loss_terms(model, self._prepare_inputs(batch)):
                    sums[term.name] = sums.get(term.name, 0.0) + term.value.item() * batch.counts[term.name]
                    counts[term.name] = counts.get(term.name, 0) + batch.counts[term.name]
                    weights[term.name] = term.weight
        if self.args.world_size > 1:
            names = sorted(sums)
            both = torch.tensor([[sums[n], counts[n]] for n in names], dtype=torch.float64, device=self.args.device)
            summed = self._total(both).tolist()
            sums, counts = ({n: pair[i] for n, pair in zip(names, summed)} for i in (0, 1))
        means = {name: sums[name] / counts[name] if counts[name] else 0.0 for name in sums}
        metrics = {f"{metric_key_prefix}_loss": sum(weights[name] * mean for name, mean in means.items())}
        metrics |= {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        if self.evaluate_ranking is not None:
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.evaluate_ranking().items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the Trainer's; AlroFastError where the hub cannot be reached, or refuses."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:  # of whichever client the hub's library has
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise AlroFastError(
                f"--push_to_hub true: the hub cannot be reached, or refuses ({reason}); log in, or leave it out and "
                "push the folder later"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; of weights in shards it saves no file that anything but a resumption reads, so that is
        done here."""
        if self.is_fsdp_enabled and "SHARDED" in str(cast(Any, self.accelerator.state).fsdp_plugin.state_dict_type):
            weights = trained_weights(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *_: Any, **__: Any) -> None:  # in a push
        """None but the run's own, which `save_extras` wrote."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        token, self.args.hub_token = self.args.hub_token, None  # it is in no file, not even for a moment
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        folder = Path(cast(str, output_dir or self.args.output_dir))
        share(folder)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; config.yaml has the options
        if self.save_extras is not None and self.args.should_save:
            self.save_extras(folder)


class _Progress(TrainerCallback):
    """Keeps the place a run has reached in the state that goes into its checkpoints."""

    def __init__(self, trainer: RankerTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        start = self.trainer.start
        if start.step and not start.trained:
            state.epoch = float(start.epoch)
        # throughput and averages of a log line begin here, at the step a resumed run begins with
        self.trainer.tally.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        batches = trainer.current_gradient_accumulation_steps * args.world_size
        trainer._here += batches
        trainer.cursor = trainer.cursor.advanced(
            args.world_size, batches, args.gradient_accumulation_steps, trainer._batches.plans.fingerprint,
            trainer._batches.rest(trainer.cursor.epoch, trainer._here),
        )  # fmt: skip
        left, before = len(trainer._batches.left(trainer.cursor.epoch)), trainer._before
        state.epoch = trainer.cursor.epoch + (before + trainer._here) / (before + left)
        state.stateful_callbacks[CURSOR] = trainer.cursor.to_dict()
