"""The options of `alro_fast.train`, as dataclasses: a field is a command-line flag is a YAML key.

`training/config.py` parses them; every room may read them. A field says beside its help where it is read, if not
everywhere; who reads those of the objectives, their descriptions say (`objectives/base.py`). What is given and not read
is refused (`training/unread.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_available
from transformers.utils import is_torch_bf16_gpu_available

from .errors import AlroFastError
from .texts import from_json, is_file, read_text

CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}


class Where(NamedTuple):
    """A circumstance in which an option is read. `said` completes "--option is read ...".

    holds: of all options of a run, as attributes. decided_by: the options it looks at.
    """

    said: str
    holds: Callable[[Any], bool]
    decided_by: tuple[str, ...]


SCRATCH = Where(
    "with --model_name_or_path scratch", lambda o: o.model_name_or_path == "scratch", ("model_name_or_path",)
)
LOADED = Where(
    "with a base model that is loaded, not scratch",
    lambda o: o.model_name_or_path != "scratch",
    ("model_name_or_path",),
)
LORA = Where("with --use_peft true", lambda o: o.use_peft, ("use_peft",))
FOLLOWED = Where(
    "with --init_adapter or --stages, and --use_peft true",
    lambda o: o.use_peft and (o.init_adapter is not None or o.stages is not None),
    ("init_adapter", "stages", "use_peft"),
)
STAGED = Where("with --stages", lambda o: o.stages is not None, ("stages",))
STAGE_EPOCHS = Where(
    "with --stages, and without --max_steps, which ends every stage",
    lambda o: o.stages is not None and o.max_steps <= 0,
    ("stages", "max_steps"),
)
EPOCHS = Where(
    "without --max_steps, which ends training, and without --stage_epochs",
    lambda o: o.max_steps <= 0 and o.stage_epochs is None,
    ("max_steps", "stage_epochs"),
)


def on_files(options: Any) -> bool:
    """Whether a run trains on preference files."""
    return options.preferences is not None or options.stage_preferences is not None


_FILES = ("preferences", "stage_preferences")
LISTS = Where("without --preferences, on ranking lists", lambda o: not on_files(o), _FILES)
WORDS = Where(
    "on ranking lists in words: without --preferences, and not with --identifiers signals",
    lambda o: not on_files(o) and o.identifiers != "signals",
    (*_FILES, "identifiers"),
)
FILES = Where("with --preferences", on_files, _FILES)
UNPREPARED = Where(
    "without --data_dir, whose lists are prepared, and without --preferences",
    lambda o: o.data_dir is None and not on_files(o),
    ("data_dir", *_FILES),
)
PREPARING = Where(
    "when lists are prepared: with a --dataset other than the demo, and without --data_dir and --preferences",
    lambda o: o.data_dir is None and not on_files(o) and o.dataset != "demo",
    ("data_dir", *_FILES, "dataset"),
)


def option(default: Any, help: str, choices: Sequence[str] | None = None, read: Where | None = None) -> Any:
    """A dataclass field with its help text; `read`: where, if not everywhere."""
    metadata: dict[str, Any] = {"help": help} | ({"choices": list(choices)} if choices else {})
    return field(default=default, metadata=metadata | ({"read": read} if read else {}))


@dataclass
class ModelArguments:
    """The base model and its adapter."""

    model_name_or_path: str = option(
        "demo", "Base model: a folder or hub id, `demo` (shipped, tiny) or `scratch` (random, sized by --scratch_*)."
    )
    dtype: str = option(
        "auto",
        "Type of the base weights. auto: bfloat16 on CUDA, float32 on the CPU.",
        ["auto", "float32", "bfloat16"],
        read=LOADED,
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.", read=LOADED)
    use_peft: bool = option(True, "Train a LoRA adapter. false: train every weight.")
    lora_r: int = option(16, "Rank of the LoRA matrices.", read=LORA)
    lora_alpha: int = option(32, "LoRA scale: updates are multiplied by lora_alpha / lora_r.", read=LORA)
    lora_dropout: float = option(0.0, "Dropout before the LoRA matrices, 0..1.", read=LORA)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules to adapt: names, or all-linear.", "read": LORA},
    )
    init_adapter: str | None = option(
        None, "Adapter folder of an earlier stage: merged into the base, which a new adapter is trained over."
    )
    stage_adapter: str = option(
        "stacked",
        "With init_adapter. stacked: the output is one adapter over the original base, both in one; merged: an "
        "adapter over a merged base, which is written beside it.",
        ["stacked", "merged"],
        read=FOLLOWED,
    )
    scratch_hidden_size: int = option(128, "Width of a `scratch` model.", read=SCRATCH)
    scratch_layers: int = option(4, "Layers of a `scratch` model.", read=SCRATCH)
    scratch_vocab_size: int = option(
        2048, "Text vocabulary of a `scratch` model's tokenizer, learned from the titles.", read=SCRATCH
    )

    def __post_init__(self) -> None:
        if self.init_adapter is not None and not self.use_peft:
            raise AlroFastError(
                "--init_adapter goes under a new adapter, which --use_peft false does not train; leave one of them out"
            )
        _at_least("lora_r", self.lora_r, 1, below=2**15)
        _at_least("lora_alpha", self.lora_alpha, 1, below=2**31)
        _at_least("scratch_hidden_size", self.scratch_hidden_size, 1, below=2**14 + 1)
        _at_least("scratch_layers", self.scratch_layers, 1, below=257)
        _at_least("scratch_vocab_size", self.scratch_vocab_size, 1, below=2**20 + 1)
        if self.scratch_hidden_size % 32:
            raise AlroFastError(f"--scratch_hidden_size is {self.scratch_hidden_size}; expected a multiple of 32")
        if not 0 <= self.lora_dropout < 1:
            raise AlroFastError(f"--lora_dropout is {self.lora_dropout:g}; expected 0 <= lora_dropout < 1")


@dataclass
class DataArguments:
    """Ranking lists: a prepared folder, or raw ratings to prepare first."""

    data_dir: str | None = option(
        None, "Folder written by alro_fast.prepare. Leave out to prepare `dataset` first.", read=LISTS
    )
    dataset: str = option(
        "demo", "With no data_dir: `demo`, or a dataset name alro_fast.prepare knows (needs raw_dir).", read=UNPREPARED
    )
    raw_dir: str | None = option(None, "Folder with the raw files of `dataset`.", read=PREPARING)
    history_length: int = option(20, "Rated items shown before a list.", read=PREPARING)
    list_size: int = option(10, "Candidates in a list.", read=PREPARING)
    train_stride: int | None = option(
        None, "Rated items between two training windows. Default: list_size.", read=PREPARING
    )
    template: str | None = option(
        None, "Prompt template: the name of a ready one, or a YAML file. Default: by the data set.", read=WORDS
    )
    identifiers: str = option(
        "letters",
        "How candidates are named: letters of the page, one token per item, or signals: a token for every bin of their "
        "signals in place of words; objective recranker: or their titles.",
        ["letters", "items", "signals", "titles"],
        read=LISTS,
    )
    answer: str = option(
        "ranking", "ranking: identifiers in order; ratings: one grade per candidate.", ["ranking", "ratings"]
    )
    max_length: int | None = option(
        None, "Longest prompt plus answer in tokens; longer histories drop their oldest items."
    )
    preferences: str | None = option(
        None, "Preference file (TRL or Alpaca; .json, .jsonl, .parquet) to train on, in place of ranking lists."
    )
    eval_preferences: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Preference files to measure before and after training; the first one validates.",
            "read": FILES,
        },
    )
    preference_answer: str = option("titles", "What an answer is.", ["titles", "identifiers", "pairs"])
    num_negatives: int | None = option(
        None,
        "Rejected answers beside each positive: of a record of --preferences the first so many. Default: 5 for a "
        "ranking list, all for a record.",
    )
    negatives: str = option(
        "uniform",
        "How they are drawn; hardest: the likeliest for the model at the start of each epoch.",
        ["uniform", "popularity", "hardest"],
    )
    negatives_from: str = option(
        "catalogue",
        "catalogue: items the user never saw; candidates: the list's own lower-rated ones.",
        ["catalogue", "candidates"],
    )
    max_train_lists: int | None = option(None, "Use at most this many training lists (seeded draw).")
    max_eval_lists: int | None = option(None, "Use at most this many validation lists during training.")
    max_test_lists: int | None = option(None, "Use at most this many test lists for the closing table.")
    baselines: str = option(
        "cheap",
        "Rankers without a language model in the closing table. cheap: what is fitted in a few seconds; all: also "
        "LambdaMART, or SASRec for lists with one target; none: random alone.",
        ["cheap", "all", "none"],
    )
    fuse: bool = option(
        False,
        "A row more in the closing table, `fused`: the model's scores and the lists' own signals in a weighted sum, "
        "fitted on the validation lists; needs lists with signals.",
    )

    def __post_init__(self) -> None:
        for name in ("max_train_lists", "max_eval_lists", "max_test_lists"):
            _at_least(name, getattr(self, name), 1)
        _at_least("num_negatives", self.num_negatives, 1, below=10_001)


@dataclass
class ObjectiveArguments:
    """What is minimised. docs/methods.md 1.4: loss = cross-entropy + alpha * soft lambda + beta * permutation."""

    objective: str = option("alro", "Training objective.")
    alpha: float = option(0.5, "Weight of the soft lambda loss.")
    beta: float = option(0.5, "Weight of the permutation-sensitive loss.")
    gamma: float | None = option(None, "Sharpness of the soft-argmax. Default: 1 for score=logprob, 10 for prob.")
    sigma: float = option(1.0, "Slope of the pairwise logistic in the soft lambda loss.")
    permutations: int = option(1, "Re-ordered presentations per list and step (0: none, and no permutation loss).")
    score: str = option("logprob", "Score of item i at slot k (docs/methods.md 1.2).", ["logprob", "prob", "logit"])
    score_space: str = option("candidates", "What scores are normalised over.", ["candidates", "vocab"])
    psl: str = option("kl", "Distance of the permutation loss, such as kl, ce, symmetric (docs/methods.md 1.3).")
    psl_space: str = option("candidates", "Distributions compared by the permutation loss.", ["candidates", "vocab"])
    psl_detach: bool = option(True, "No gradient through the original order's distribution.")
    psl_mask_emitted: bool = option(
        False, "At a slot, leave out of the permutation loss what the target has named before it."
    )
    dpo_beta: float = option(0.1, "Strength of the preference, times the log-ratio to the reference.")
    dmpo_variant: str = option(
        "dmpo",
        "dmpo: mean over negatives inside the sigmoid; mean_outside: DPO over pairs; sdpo: softmax over negatives; "
        "mult: several positives.",
        ["dmpo", "mean_outside", "sdpo", "mult"],
    )
    reference_free: bool = option(False, "Leave out the reference model.")
    ftx: float = option(0.0, "Weight of the cross-entropy of the chosen answer, per token.")
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's log-probabilities once, before training; negatives are then drawn once too."
    )
    ref_log_probs: str | None = option(
        None, "File they are kept in and taken from (.safetensors). Default: reference.safetensors of the output."
    )
    resample_negatives: bool = option(True, "Draw the negatives of ranking lists anew every epoch.")
    task_weights: str = option("1,1,1", "Weights of the pointwise, pairwise and listwise task.")
    points_per_list: int = option(5, "Rated candidates of a list that are graded in one epoch.")
    pairs_per_list: int = option(5, "Pairs of a liked and another candidate in one epoch.")
    position_shifting: bool = option(True, "Swap pairs and shuffle candidates and history, anew every epoch.")
    hints: bool = option(True, "Show the hints that lists have; false: no prompt has a line of them.")
    hybrid: str = option(
        "code",
        "Utilities of the hybrid: code (the released scoring), figure (the inference figure), or constants such as "
        "grade=1,win=0.5,order=0.05,place=0.025.",
    )
    backend: str = option("auto", "Backend of the fused ops.", ["auto", "eager", "cpp", "triton"])

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "ftx"):
            _at_least(name, getattr(self, name), 0)
        for name, most in (("permutations", 100), ("points_per_list", 10_000), ("pairs_per_list", 10_000)):
            _at_least(name, getattr(self, name), 0, below=most + 1)
        for name in ("gamma", "sigma", "dpo_beta"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise AlroFastError(f"--{name} is {getattr(self, name):g}; expected more than 0, and finite")


@dataclass
class RankerTrainingArguments(TrainingArguments):
    """transformers.TrainingArguments with batches measured in tokens and defaults for rankers."""

    output_dir: str | None = option(None, "Where the adapter and reports go. Default: the next free out/<recipe name>.")
    tokens_per_batch: int = option(
        4096, "Distinct tokens (shared prompts counted once) in one forward pass, per device."
    )
    share: str = option(
        "batch",
        "Prompts that begin alike go through the model once: batch: of all lists of a forward pass; list: of each list "
        "by itself; none: every prompt alone.",
        ["batch", "list", "none"],
    )
    lists_per_batch: int | None = option(
        None, "At most so many lists, or records of preferences, in one forward pass of training. Default: what fits."
    )
    eval_tokens_per_batch: int | None = option(None, "The same for evaluation. Default: tokens_per_batch.")
    logging_nan_inf_filter: bool = option(False, "No option here: steps without a finite loss are left out anyway.")
    max_nonfinite_steps: int = option(
        5, "Steps in a row without a finite loss and gradient that end the run; each is left out, and changes nothing."
    )
    stages: str | None = option(
        None, "Objectives one after the other, such as sft,dmpo: each stage starts from the adapter of the one before."
    )
    stage_epochs: str | None = option(
        None, "Epochs of each stage, such as 5,3. Default: num_train_epochs for all.", read=STAGE_EPOCHS
    )
    stage_preferences: str | None = option(
        None, "Preference file of each stage, such as sft.json,dmpo.json. Default: preferences for all.", read=STAGED
    )
    stage_learning_rates: str | None = option(
        None, "Learning rate of each stage. Default: learning_rate for all.", read=STAGED
    )
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint to go on from; true: the newest whole one in output_dir; auto: that if there is one, or begin.",
    )
    profile: int | None = option(
        None,
        "Profile so many optimiser steps, after two: where their time goes as profile/table.md, and a Chrome trace, in "
        "output_dir.",
    )
    dry_run: bool = option(
        False, "Check everything, print the plan (lists, tokens, steps, memory) and a prompt, train nothing."
    )
    overwrite_output_dir: bool = option(False, "Replace an earlier run of alro_fast in output_dir.")
    log_json: bool = option(False, "Print objects of JSON, one a line, in place of plan, progress bar and table.")
    learning_rate: float = option(2e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule, as in transformers.")
    warmup_steps: float = option(0.05, "Warm-up steps; below 1: a share of all steps.")
    num_train_epochs: float = option(3.0, "Passes over the training lists.", read=EPOCHS)
    logging_steps: float = option(10, "Steps between log lines.")
    logging_first_step: bool = option(True, "Log the first step too.")
    save_total_limit: int | None = option(2, "Checkpoints kept.")

    def __post_init__(self) -> None:
        given, processes = self.output_dir, int(os.environ.get("WORLD_SIZE", 1))
        if processes > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it transformers would start as many runs of one process
        if self.deepspeed and not is_deepspeed_available():
            raise AlroFastError("--deepspeed needs the package deepspeed, which is not here: pip install deepspeed")
        self._check_objects()
        if self.fsdp and processes == 1:
            raise AlroFastError(
                f"--fsdp {self.fsdp} shares a model out to several processes, and one was launched: launch several "
                "with torchrun, or leave it out"
            )
        if self.disable_tqdm is None:  # else transformers' verbosity would decide, differently at every stage
            self.disable_tqdm = self.log_json
        if self.bf16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            raise AlroFastError(
                "--bf16 true needs a GPU that computes in bfloat16, and there is none here; leave it out, "
                "or add --use_cpu true to train in it on the CPU"
            )
        if self.fp16 and (self.use_cpu or not torch.cuda.is_available()):
            raise AlroFastError(
                "--fp16 true needs a GPU, and this run has none: on the CPU it would train in float32; leave it out, "
                "or give --bf16 true --use_cpu true"
            )
        super().__post_init__()
        if processes != self.world_size:
            raise AlroFastError(
                f"{processes} processes were launched, but {self.device} would train in {self.world_size} each; "
                "add --use_cpu true, or launch one process"
            )
        if given is None:  # transformers puts a name of its own; ours is chosen when the run begins
            self.output_dir = None
        if str(self.resume_from_checkpoint).lower() in ("none", "false", ""):
            self.resume_from_checkpoint = None
        elif str(self.resume_from_checkpoint).lower() == "true":
            self.resume_from_checkpoint = cast(str, True)  # as transformers has it: a path, or True
        elif str(self.resume_from_checkpoint).lower() == "auto":
            self.resume_from_checkpoint = "auto"
        self._check_numbers()
        known = get_available_reporting_integrations() if self.report_to else []
        for name in self.report_to or ():
            if name not in known:
                raise AlroFastError(
                    f"--report_to {name} is unknown, or not installed; expected none or {', '.join(known) or 'nothing'}"
                )

    def _check_numbers(self) -> None:
        """Those that transformers and torch would stumble over when training has begun."""
        for name in (
            "tokens_per_batch", "lists_per_batch", "eval_tokens_per_batch", "gradient_accumulation_steps", "profile",
            "max_nonfinite_steps",
        ):  # fmt: skip
            _at_least(name, getattr(self, name), 1, below=2**31)
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "eval_delay"):
            _at_least(name, getattr(self, name), 0)
        _at_least("warmup_steps", self.warmup_steps, 0, below=2**31)
        _at_least("dataloader_num_workers", self.dataloader_num_workers, 0, below=1025)
        for name in ("adam_beta1", "adam_beta2"):
            _at_least(name, getattr(self, name), 0, below=1)
        for name in ("seed", "data_seed"):
            _at_least(name, getattr(self, name), 0, below=2**32)
        _at_least("max_steps", self.max_steps, -1, below=2**31)
        if self.max_steps <= 0 and not 0 < self.num_train_epochs <= 10**6:
            raise AlroFastError(
                f"--num_train_epochs is {self.num_train_epochs:g}; expected more than 0, up to 1,000,000"
            )
        _at_least("save_total_limit", self.save_total_limit, 1)
        _at_least("torch_empty_cache_steps", self.torch_empty_cache_steps, 1)
        for kind in ("logging", "eval", "save"):
            every = getattr(self, f"{kind}_steps")
            if getattr(self, f"{kind}_strategy") != "steps" or every is None:
                continue
            if not (0 < every < 1 or (every >= 1 and every == int(every) and every < 2**31)):
                raise AlroFastError(
                    f"--{kind}_steps is {every:g}; expected a whole number of steps, or a share of them all below 1"
                )

    def _check_objects(self) -> None:
        """Options that hold options: JSON objects, two of them also files of one."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str):
                continue
            if value.lstrip().startswith("{"):
                found = from_json(value, f"--{name}")
            elif name in ("accelerator_config", "fsdp_config", "deepspeed"):
                if not is_file(value):
                    raise AlroFastError(f"--{name} {value}: no such file; expected a JSON object, or a file of one")
                found = from_json(read_text(value), f"--{name} {value}")
            else:
                found = None
            if not isinstance(found, dict):
                raise AlroFastError(f'--{name} {value}: expected a JSON object, such as {{"name": 1}}')
            strange = sorted(found.keys() - CHECKPOINTING) if "checkpointing" in name else []
            if strange:
                raise AlroFastError(
                    f"--{name}: {strange[0]} is no setting of it; expected some of {', '.join(sorted(CHECKPOINTING))}"
                )


def _at_least(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    if value is None or least <= value < below:
        return
    upper = "" if value < least else ", and finite" if below == math.inf else f", and below {below:,}"
    raise AlroFastError(f"--{name} is {value:.12g}; expected at least {least:g}{upper}")
