"""One training run on ranking lists: options -> prepared lists -> base and adapter -> objective -> Trainer -> table."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
import yaml
from transformers import set_seed

from .. import __version__
from ..data.demo import make_demo
from ..data.lists import PreparedData, open_prepared, with_ratings
from ..data.prepared import FileOptions, prepare_lists
from ..data.records import RankingList
from ..data.sources.interactions import TABLES
from ..data.windows import ListOptions
from ..errors import AlroFastError
from ..evaluation.baselines import baseline_scores
from ..evaluation.report import report_line
from ..evaluation.targets import as_grades, evaluate_rankers, has_targets, save_measurement
from ..modeling.lm_head import head_of
from ..modeling.loading import (
    add_lora,
    base_path,
    load_base,
    load_tokenizer,
    make_scratch,
    order_embeddings,
    resolve_dtype,
)
from ..modeling.sharded import together
from ..objectives.alro import Scoring
from ..objectives.base import Objective, build_objective, learned_answers
from ..processes.dealing import after_the_first
from ..prompts import SignalPrompts, add_item_tokens, add_signal_tokens
from ..prompts.scale import fitted_template
from ..ranking.fusion import Fusion, check_fittable, fused_signals
from ..ranking.orders import Ranking
from ..ranking.ranker import Ranker
from ..run_folder import check_writable, held
from .checkpoints import check_same_data, find_checkpoint, settle_auto
from .checks.folders import begun, claim_folder, named_folder
from .checks.rehearsal import check_hub, check_metric, rehearse
from .config import Config
from .console import counted, show_end, show_example, show_plan, show_results
from .engines.checks import check_engine, check_launch, measured_later
from .plans.dataset import TreeDataset
from .signals import signal_vocabulary, signals_shown
from .speed.costs import Costs
from .stages import merge_adapter, stack_adapters, write_merged_base
from .tracking import Closing, check_pushed, model_card, push_results, read_results
from .trainer import RankerTrainer

VALIDATED = ("ndcg@1", "ndcg@3", "ndcg@5", "ndcg@10")


class Run:
    """One training run, checked and built; `train()` starts it."""

    def __init__(self, config: Config) -> None:
        self.settle(config)
        self.config, self.training = config, config.training
        self.made: list[Path] = []  # the output folder, and those above it, where they are new
        self.lock = contextlib.ExitStack()
        try:
            self.build()
        except BaseException as error:
            if isinstance(error, AlroFastError):
                self.unmake()
            self.lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the output folder free for others."""
        self.lock.close()

    def keep(self) -> None:
        """Keep the output folder, made where it is new, to this run; a dry run makes none."""
        if self.training.process_index:
            return
        check_writable(self.folder)
        if self.folder.is_dir() or not self.training.dry_run:
            made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.lock.enter_context(held(self.folder))
            self.made = made

    @staticmethod
    def settle(config: Config) -> None:
        """Set options that follow from others; AlroFastError for those that do not go together."""

    @staticmethod
    def given(config: Config) -> PreparedData | None:
        """The data that a run begins with, checked; None where it has yet to be prepared."""
        return None if config.data.data_dir is None else open_prepared(config.data.data_dir)

    def build(self) -> None:
        """Everything up to the Trainer."""
        config = self.config
        check_launch(self.training)
        if self.training.push_to_hub:
            check_pushed(config)
        after_the_first(self.claim)  # the others find the folder claimed and the data prepared
        check_same_data(self.checkpoint, self.prepared)
        set_seed(self.training.seed)
        limits = {
            "train": config.data.max_train_lists,
            "valid": config.data.max_eval_lists,
            "test": config.data.max_test_lists,
        }
        self.lists = {name: draw(lists, limits[name], self.training.seed) for name, lists in self.splits().items()}
        if not self.lists["train"]:
            raise AlroFastError(
                f"{self.prepared.path} holds no training lists; prepare it with a smaller --list_size, or fewer "
                "--test_lists"
            )
        if config.data.fuse:
            fused_signals(self.prepared)
            check_fittable(self.fitted_on)
        self.check_ratings()
        if self.training.push_to_hub:
            check_hub(self.training, self.folder)
            self.training.push_to_hub = not self.training.dry_run  # which asks nothing of the hub
        check_metric(self.training, ["loss", *config.description.logs, *self.watched])
        self.model, self.tokenizer = self.build_model()
        self.objective = self.build_objective()
        show = not self.training.disable_tqdm and self.training.process_index == 0
        prices = Costs.of(self.model)
        self.datasets = {
            name: TreeDataset(self.asked(name), self.objective, show, self.training.share, prices)
            for name in ("train", "valid")
        }
        self.closing = Closing()
        self.trainer = RankerTrainer(
            self.model,
            self.training,
            self.objective,
            self.datasets["train"],
            self.datasets["valid"],
            evaluate_ranking=self.validate if len(self.lists["valid"]) else None,
            save_extras=self.save_extras,
            callbacks=[self.closing],
            processing_class=self.tokenizer,
        )
        check_engine(self.trainer, self.checkpoint)
        rehearse(self.trainer, self.trainer.planned_steps())

    def claim(self) -> None:
        """The folder, the checkpoint to go on from, and the data."""
        self.folder = named_folder(self.config)
        self.keep()
        settle_auto(self.config, self.folder)
        claim_folder(self.config, self.folder)
        self.checkpoint = find_checkpoint(self.config, self.folder)
        self.prepared = self.prepare()

    @property
    def watched(self) -> Sequence[str]:
        """Names of what `validate` measures, where there are validation lists."""
        return VALIDATED if len(self.lists["valid"]) else ()

    def check_ratings(self) -> None:
        """AlroFastError where no training list holds two ratings, so that none has an order to learn."""
        train, grades = self.lists["train"], self.config.data.answer == "ratings"
        if self.config.description.run != "lists" or (grades and not with_ratings(train)):  # `asked` says so of those
            return
        if has_targets(self.prepared, "test"):  # there a rated candidate comes before those without a rating
            return
        if all(one.all_equal for one in train):
            raise AlroFastError(
                f"{self.prepared.path}: no training list has candidates with different ratings, so there is nothing to "
                "rank; where ratings are all one, as of clicks and purchases, prepare it with --negatives N --ungraded "
                "as_zero, or tune with --objective dmpo, which draws its own"
            )

    def unmake(self) -> None:
        """Leave no folder of a run that was a mistake."""
        if self.made:
            shutil.rmtree(self.made[0], ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else's files are there by now
                for folder in self.made[1:]:
                    folder.rmdir()

    @property
    def answers(self) -> str:
        """What an answer is, for the plan."""
        return learned_answers(self.config.to_dict())

    @property
    def signals(self) -> dict[str, tuple[str, ...]]:
        """Names of the signals that prompts show beside "history" and "candidates", where the lists carry them."""
        return getattr(self.builder, "signals", {})

    def splits(self) -> dict[str, Sequence[RankingList]]:
        """What to train, validate and test on."""
        return {split: self.prepared.lists(split) for split in ("train", "valid", "test")}

    def asked(self, split: str) -> Sequence[RankingList]:
        """The lists of a split that the loss is taken over: for grades, those that hold one."""
        if self.config.data.answer != "ratings":
            return self.lists[split]
        graded = with_ratings(self.lists[split])
        if split == "train" and not graded:
            raise AlroFastError(f"{self.prepared.path} holds no training list with a rated candidate to grade")
        return graded

    def build_prompts(self) -> Any:
        """Of the class that the objective's description names."""
        data = self.config.data
        if data.identifiers == "signals":
            return SignalPrompts(self.tokenizer, self.vocabulary, max_length=data.max_length)
        return self.config.description.prompts(
            self.tokenizer, self.fitted(data.answer == "ratings"), identifiers=data.identifiers,
            max_length=data.max_length, items=self.prepared.items,
        )  # fmt: skip

    def fitted(self, by_grades: bool) -> Any:
        """The prompt template, checked against the data's ratings."""
        shown, graded = self.prepared.rating_values()
        kind, name = self.config.description.prompts, cast(str, self.config.data.template)
        return fitted_template(kind, name, shown, graded, by_grades=by_grades, origin=str(self.prepared.path))

    def build_objective(self) -> Objective:
        """The objective, and the ranker that measures it."""
        config = self.config
        self.builder = self.build_prompts()
        self.ranker = Ranker(
            self.model, self.tokenizer, self.builder, answer=config.data.answer, token_budget=config.budget,
            share=self.training.share, scoring=Scoring.of(config.to_dict()),
        )  # fmt: skip
        return build_objective(config.objective, self.builder, answer=config.data.answer, seed=self.training.seed)

    def prepare(self) -> PreparedData:
        """The prepared lists. A dry run, and a run that will replace another, work in a folder that vanishes: nothing
        of the old run is touched before everything is checked."""
        work = self.folder
        self._aside = None
        if self.training.dry_run or (begun(work) and self.checkpoint is None):
            near = None if self.training.dry_run else work.parent
            self._aside = tempfile.TemporaryDirectory(prefix=".alro_fast-", dir=near)
            work = Path(self._aside.name)
            if self.training.dry_run:
                self.training.output_dir = str(work)
        elif self.training.process_index == 0:
            self.save_config(work)
        return self.load(work)

    def take_over(self) -> None:
        """Remove the run that this one replaces, and move the data prepared meanwhile to where it stood."""
        if self._aside is None or self.training.process_index:
            return
        made = Path(self._aside.name) / "data"
        for path in self.folder.iterdir():
            if path.name == "data" and not made.is_dir():
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if made.is_dir():
            shutil.move(made, self.folder / "data")
            self.prepared.path = self.folder / "data"
        self._aside.cleanup()
        self.save_config(self.folder)

    def load(self, work: Path) -> PreparedData:
        """The prepared lists; prepared below `work` where they are not yet."""
        return prepare(self.config, work)

    def build_model(self) -> tuple[Any, Any]:
        """The base model with its adapter, and the tokenizer."""
        options, training = self.config.model, self.training
        named = self.config.data.identifiers
        if named in ("items", "signals") and options.use_peft:
            raise AlroFastError(
                f"--identifiers {named} adds tokens, which an adapter cannot learn; add --use_peft false"
            )
        if named == "signals":
            self.vocabulary = signal_vocabulary(self.config, self.lists["train"])
        if options.model_name_or_path == "scratch":
            if options.use_peft:
                raise AlroFastError("--model_name_or_path scratch has nothing to adapt; add --use_peft false")
            model, tokenizer = cast(tuple[Any, Any], make_scratch(options, self.prepared.items, training.seed))
        else:
            dtype = resolve_dtype(options.dtype)
            tokenizer = load_tokenizer(options.model_name_or_path, options.trust_remote_code)
            model = load_base(options.model_name_or_path, dtype, options.trust_remote_code)
            if options.init_adapter is not None:
                model = merge_adapter(model, options.init_adapter, base_path(options.model_name_or_path))
        if named == "items":
            add_item_tokens(tokenizer, len(self.prepared.items))
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        elif named == "signals":
            scales = add_signal_tokens(tokenizer, self.vocabulary)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            order_embeddings(model, scales, training.seed)
        if options.use_peft:
            model = add_lora(model, options)
            model.enable_input_require_grads() if training.gradient_checkpointing else None
        return model, tokenizer

    def describe(self) -> None:
        """The plan, before anything is trained."""
        data, training, steps = self.datasets["train"], self.training, self.trainer.planned_steps()
        batches = self.trainer.get_train_dataloader().batch_sampler.plans.num_batches
        tokens = sum(data.sizes) - data.common * (len(data) - batches)  # what all lists have alike, once a batch
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        splits = ", ".join(f"{len(lists):,} {split}" for split, lists in self.lists.items())
        passes = f"{training.tokens_per_batch:,} tokens a batch"
        passes = f"{training.lists_per_batch:,} lists and {passes}" if training.lists_per_batch else passes
        passes += f", {counted(training.gradient_accumulation_steps * training.world_size, 'batch', 'batches')} a step"
        extent = "by --max_steps" if training.max_steps > 0 else f"in {counted(training.num_train_epochs, 'epoch')}"
        rows = {
            "data": f"{self.prepared.path}: {splits} lists",
            "model": f"{self.config.model.model_name_or_path}: {total:,} weights, {trainable:,} trained",
            "objective": f"{self.config.description.title}, answers as {self.answers}",
            "tokens": f"{tokens:,} distinct of {data.unshared_tokens:,} per epoch "
            f"({data.unshared_tokens / tokens:.2f}x shared), {data.answer_rows:,} head rows, "
            f"longest list {max(data.sizes):,}",
            "steps": f"{steps:,} {extent}, up to {passes}",
            "memory": f"about {self.estimate_memory() / 2**30:.2f} GiB for weights, optimiser and activations",
            "output": str(self.folder),
        }
        if shown := signals_shown(self.signals, self.prepared.lists("train") if self.prepared.items else ()):
            rows["signals"] = shown
        if data.dropped_history:
            rows["histories"] = f"{data.dropped_history:,} oldest items dropped to fit --max_length"
        if self.training.process_index == 0:
            show_plan(rows, self.training.log_json)
            if self.training.dry_run:
                show_example(*data.example(self.tokenizer), self.training.log_json)

    def estimate_memory(self) -> int:
        """Bytes, roughly: weights, gradients, Adam's moments and the activations of one packed batch."""
        config: Any = self.model.config.get_text_config()
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        trained = sum(p.numel() * (p.element_size() + 8) for p in self.model.parameters() if p.requires_grad)
        tokens = min(self.training.tokens_per_batch, sum(self.datasets["train"].sizes))
        width = 14 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
        layers = 1 if self.training.gradient_checkpointing else config.num_hidden_layers
        item = 2 if next(self.model.parameters()).dtype == torch.bfloat16 else 4
        return int(weights + trained + tokens * width * layers * item)

    def train(self) -> None:
        """Rank untuned, train, rank tuned; then the table and the files of the run."""
        self.take_over()
        started, test = time.perf_counter(), self.lists["test"]
        later = measured_later(self.trainer, self.config.model.use_peft)
        rankings = {} if later else {"untuned": self.ranker.rank(test)}
        self.fit()
        if later:
            with self.ranker.untuned():
                rankings = {"untuned": together(self.model, lambda: self.ranker.rank(test))}
        rankings |= together(self.model, lambda: self.rank_tuned(test))
        fusion = self.fuse() if self.config.data.fuse else None
        if not self.training.should_save:
            return
        if fusion is not None:
            rankings["fused"] = fusion.rank_all(test, rankings["tuned"])
        if test:
            own = {name: [ranking.scores for ranking in each] for name, each in rankings.items()}
            scores = baseline_scores(self.prepared, test, self.config.data.baselines) | own
            targets = has_targets(self.prepared, "test")
            results = evaluate_rankers(test, scores, targets=targets, prepared=self.prepared)
            results = results.noting(rankings=self.ranker.described())
            results = results if fusion is None else results.noting(fused=fusion.described())
            results = save_measurement(self.folder, results, test, rankings, targets=targets, prepared=self.prepared)
            show_results(results.table(), results.to_json(), self.training.log_json)
        report = report_line(self.folder) if test else ""
        following = f"python -m alro_fast.rank --adapter {self.folder} --lists {self.prepared.path} --limit 3"
        self.end(started, following, report)

    def end(self, started: float, following: str, report: str = "") -> None:
        """Card, trackers, hub, last lines; `started` of perf_counter, `following` the command to go on with."""
        self.save_card(self.folder, read_results(self.folder))
        self.closing.share(self.folder)
        if self.training.push_to_hub:
            push_results(self.trainer, self.folder)
        show_end(str(self.folder), time.perf_counter() - started, following, self.training.log_json, report)

    @property
    def fitted_on(self) -> Sequence[RankingList]:
        """What the weights of `--fuse` are fitted on: the validation lists; of one target each, with 1 for it alone."""
        return as_grades(self.lists["valid"]) if has_targets(self.prepared, "valid") else self.lists["valid"]

    def fuse(self) -> Fusion:
        """Fit the weights of the tuned model's scores and the signals, and save them."""
        scores = together(self.model, lambda: self.ranker.scores(self.lists["valid"]))
        fusion = Fusion.fit(self.fitted_on, scores, fused_signals(self.prepared))
        if self.training.should_save:
            fusion.save(self.folder)
        return fusion

    def rank_tuned(self, lists: Sequence[RankingList]) -> dict[str, list[Ranking]]:
        """Rankings of the tuned model for the closing table, by their rows; `tuned` is what it is judged by."""
        return {"tuned": self.ranker.rank(lists)}

    def fit(self) -> None:
        """Train, and write weights and state; an adapter over an earlier stage's is made whole."""
        options = self.config.model
        self.compile_kernels()
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        self.trainer.save_model()
        if options.init_adapter is not None and self.training.should_save:
            if options.stage_adapter == "stacked":
                stack_adapters(options.init_adapter, self.folder)
            else:
                base = load_base(options.model_name_or_path, resolve_dtype(options.dtype), options.trust_remote_code)
                base = merge_adapter(base, options.init_adapter, base_path(options.model_name_or_path))
                write_merged_base(base, self.tokenizer, self.folder)
        self.trainer.save_state()

    def compile_kernels(self) -> None:
        """On CUDA: the head's kernels, before the first step rather than in it."""
        if self.training.device.type != "cuda" or self.config.objective.backend not in ("auto", "triton"):
            return
        from ..ops.backends import triton
        from ..ops.backends.warmup import warmup

        head = head_of(self.model)
        if triton.unavailable(self.training.device, head.weight.dtype) is None:
            warmup(
                head.weight.shape[1], head.weight.shape[0], dtype=head.weight.dtype, softcap=head.softcap,
                bias=head.bias is not None, trainable=head.weight.requires_grad, device=self.training.device,
            )  # fmt: skip

    def validate(self) -> dict[str, float]:
        """NDCG of the model as it stands, on the validation lists."""
        lists, targets = self.lists["valid"], has_targets(self.prepared, "valid")
        scores = {"model": together(self.model, lambda: self.ranker.scores(lists))}
        results = evaluate_rankers(lists, scores, targets=targets, prepared=self.prepared, split="valid", bootstrap=0)
        return {name: results.mean("model", name) for name in VALIDATED}

    def save_extras(self, folder: Path) -> None:
        """What a run leaves beside the weights: prompt format, data manifest, options, model card."""
        if self.builder is not None:
            self.builder.save(folder)
        (folder / "data_manifest.json").write_text(
            json.dumps(self.prepared.manifest, indent=2) + "\n", encoding="utf-8"
        )
        self.save_config(folder)
        self.save_card(folder)

    def save_card(self, folder: Path, results: dict[str, Any] | None = None) -> None:
        """README.md, which the hub shows; with `results` once there are some."""
        card = model_card(self.config, self.prepared, self.answers, results)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def save_config(self, folder: Path) -> None:
        options = self.config.to_dict()
        resolved = {"alro_fast_version": __version__, "learned_answers": learned_answers(options), **options}
        if resolved.get("data_dir") is not None:  # read again from other working directories
            resolved["data_dir"] = str(Path(resolved["data_dir"]).absolute())
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")


def prepare(config: Config, folder: Path) -> PreparedData:
    """The prepared lists: `data_dir` as it is, or `dataset` prepared into <output_dir>/data."""
    data = config.data
    if data.data_dir is not None:
        return open_prepared(data.data_dir)
    target = folder / "data"
    if config.training.resume_from_checkpoint is None or not (target / "manifest.json").is_file():
        if data.dataset == "demo":
            make_demo(target, seed=config.training.seed)
        else:
            if data.dataset in TABLES:
                raise AlroFastError(
                    f"--dataset {data.dataset} is any table; prepare it first with: python -m alro_fast.prepare, "
                    "then give its output folder as --data_dir"
                )
            if data.raw_dir is None:
                raise AlroFastError(
                    f"--dataset {data.dataset} needs --raw_dir (or --data_dir with lists prepared before)"
                )
            options = ListOptions(
                history_length=data.history_length, list_size=data.list_size, train_stride=data.train_stride or None,
                seed=config.training.seed,
            )  # fmt: skip
            prepare_lists(FileOptions(data.dataset, target, True, Path(data.raw_dir)), options)
    return open_prepared(target)


def draw(lists: Sequence[RankingList], limit: int | None, seed: int) -> Sequence[RankingList]:
    """All lists, or a seeded draw of `limit` of them in their own order."""
    if limit is None or limit >= len(lists):
        return lists
    chosen = torch.randperm(len(lists), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    return [lists[i] for i in chosen.tolist()]
