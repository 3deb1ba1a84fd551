"""Options of `alro_fast.train`: a field is a command-line flag is a YAML key. The command line wins over the file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_available

from ..errors import AlroFastError

_SECRETS = {"hub_token"}
_TOKENS = "batches are measured in tokens"
_EVERY_TREE = "every batch is a tree of another shape, to be compiled anew"
WITHOUT_MEANING = {  # options of transformers.TrainingArguments that packed batches or our losses leave nothing to do
    "per_device_train_batch_size": f"{_TOKENS}; give --tokens_per_batch",
    "per_device_eval_batch_size": f"{_TOKENS}; give --eval_tokens_per_batch",
    "auto_find_batch_size": f"{_TOKENS}; lower --tokens_per_batch where memory runs out",
    "train_sampling_strategy": f"{_TOKENS} and packed by length, in an order drawn by --seed; leave it out",
    "dataloader_drop_last": "no batch is left over; leave it out",
    "label_smoothing_factor": "the loss is that of --objective; leave it out",
    "neftune_noise_alpha": "its noise goes by the length of a sequence, and batches are packed into one; leave it out",
    "include_num_input_tokens_seen": "the log counts tokens already; leave it out",
    "use_liger_kernel": "the layers are fused already; leave it out",
    "torch_compile": f"{_EVERY_TREE}; leave it out",
    "torch_compile_backend": f"{_EVERY_TREE}; leave it out",
    "torch_compile_mode": f"{_EVERY_TREE}; leave it out",
}
RECIPES = Path(__file__).parent / "recipes"


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help} | ({"choices": list(choices)} if choices else {}))


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
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    use_peft: bool = option(True, "Train a LoRA adapter. false: train every weight.")
    lora_r: int = option(16, "Rank of the LoRA matrices.")
    lora_alpha: int = option(32, "LoRA scale: updates are multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before the LoRA matrices, 0..1.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules to adapt: names, or all-linear."}
    )
    init_adapter: str | None = option(
        None, "Adapter folder of an earlier stage: merged into the base, which a new adapter is trained over."
    )
    stage_adapter: str = option(
        "stacked",
        "With init_adapter. stacked: the output is one adapter over the original base, both in one; merged: an "
        "adapter over a merged base, which is written beside it.",
        ["stacked", "merged"],
    )
    scratch_hidden_size: int = option(128, "Width of a `scratch` model.")
    scratch_layers: int = option(4, "Layers of a `scratch` model.")
    scratch_vocab_size: int = option(2048, "Text vocabulary of a `scratch` model's tokenizer, learned from the titles.")

    def __post_init__(self) -> None:
        if self.init_adapter is not None and not self.use_peft:
            raise AlroFastError(
                "--init_adapter goes under a new adapter, which --use_peft false does not train; leave one of them out"
            )
        for name in ("lora_r", "lora_alpha", "scratch_hidden_size", "scratch_layers"):
            _at_least(name, getattr(self, name), 1)
        if self.scratch_hidden_size % 32:
            raise AlroFastError(f"--scratch_hidden_size is {self.scratch_hidden_size}; expected a multiple of 32")
        if not 0 <= self.lora_dropout < 1:
            raise AlroFastError(f"--lora_dropout is {self.lora_dropout:g}; expected 0 <= lora_dropout < 1")


@dataclass
class DataArguments:
    """Ranking lists: a prepared folder, or raw ratings to prepare first."""

    data_dir: str | None = option(None, "Folder written by alro_fast.prepare. Leave out to prepare `dataset` first.")
    dataset: str = option(
        "demo", "With no data_dir: `demo`, or a dataset name alro_fast.prepare knows (needs raw_dir)."
    )
    raw_dir: str | None = option(None, "Folder with the raw files of `dataset`.")
    history_length: int = option(20, "Rated items shown before a list (when preparing).")
    list_size: int = option(10, "Candidates in a list (when preparing).")
    train_stride: int | None = option(
        None, "Rated items between two training windows (when preparing; default: list_size)."
    )
    template: str = option("movies", "Prompt template: the name of a ready one, or a YAML file.")
    identifiers: str = option(
        "letters",
        "How candidates are named: letters of the page, or one token per item; objective recranker: or their titles.",
        ["letters", "items", "titles"],
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
        metadata={"help": "Preference files to measure before and after training; the first one validates."},
    )
    preference_answer: str = option(
        "titles", "objective dmpo on ranking lists: what an answer is.", ["titles", "identifiers", "pairs"]
    )
    num_negatives: int = option(5, "Rejected items beside each positive (objective dmpo on ranking lists).")
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

    def __post_init__(self) -> None:
        for name in ("max_train_lists", "max_eval_lists", "max_test_lists"):
            _at_least(name, getattr(self, name), 1)
        cut = [name for name in ("history_length", "list_size", "train_stride") if getattr(self, name) != _CUT[name]]
        if self.data_dir is not None and self.raw_dir:
            raise AlroFastError("--raw_dir is for preparing; the lists of --data_dir are prepared: give one of the two")
        if self.data_dir is None and self.dataset == "demo" and (cut or self.raw_dir):
            raise AlroFastError(f"--{(cut or ['raw_dir'])[0]} needs a --dataset other than the demo")


_CUT = {"history_length": 20, "list_size": 10, "train_stride": None}


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
    psl: str = option("kl", "Distance of the permutation loss (docs/methods.md 1.3).", ["kl", "ce", "symmetric"])
    psl_space: str = option("candidates", "Distributions compared by the permutation loss.", ["candidates", "vocab"])
    psl_detach: bool = option(True, "No gradient through the original order's distribution.")
    dpo_beta: float = option(0.1, "objective dmpo: strength of the preference, times the log-ratio to the reference.")
    dmpo_variant: str = option(
        "dmpo",
        "dmpo: mean over negatives inside the sigmoid; mean_outside: DPO over pairs; sdpo: softmax over negatives; "
        "mult: several positives.",
        ["dmpo", "mean_outside", "sdpo", "mult"],
    )
    reference_free: bool = option(False, "objective dmpo: leave out the reference model.")
    ftx: float = option(0.0, "objective dmpo: weight of the cross-entropy of the chosen answer, per token.")
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's log-probabilities once, before training; negatives are then drawn once too."
    )
    ref_log_probs: str | None = option(
        None, "File they are kept in and taken from (.safetensors). Default: reference.safetensors of the output."
    )
    resample_negatives: bool = option(True, "Draw the negatives of ranking lists anew every epoch.")
    task_weights: str = option("1,1,1", "objective recranker: weights of the pointwise, pairwise and listwise task.")
    points_per_list: int = option(5, "objective recranker: rated candidates of a list that are graded in one epoch.")
    pairs_per_list: int = option(5, "objective recranker: pairs of a liked and another candidate in one epoch.")
    position_shifting: bool = option(
        True, "objective recranker: swap pairs and shuffle candidates and history, anew every epoch."
    )
    hybrid: str = option(
        "code", "objective recranker: utilities of the hybrid, with the constants of the released code or the paper.",
        ["code", "paper"],
    )  # fmt: skip
    backend: str = option("auto", "Backend of the fused ops.", ["auto", "eager", "cpp", "triton"])

    def __post_init__(self) -> None:
        if self.ref_log_probs is not None and not self.precompute_ref_log_probs:
            raise AlroFastError("--ref_log_probs is read and written by --precompute_ref_log_probs true; add it")
        for name in ("alpha", "beta", "ftx", "permutations", "points_per_list", "pairs_per_list"):
            _at_least(name, getattr(self, name), 0)
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
    eval_tokens_per_batch: int | None = option(None, "The same for evaluation. Default: tokens_per_batch.")
    logging_nan_inf_filter: bool = option(
        False,
        "Leave losses that are no number out of the log: then they stop no run, and every step waits for the device.",
    )
    stages: str | None = option(
        None, "Objectives one after the other, such as sft,dmpo: each stage starts from the adapter of the one before."
    )
    stage_epochs: str | None = option(None, "Epochs of each stage, such as 5,3. Default: num_train_epochs for all.")
    stage_learning_rates: str | None = option(None, "Learning rate of each stage. Default: learning_rate for all.")
    dry_run: bool = option(False, "Check everything, print the plan (lists, tokens, steps, memory), train nothing.")
    overwrite_output_dir: bool = option(False, "Replace an earlier run of alro_fast in output_dir.")
    learning_rate: float = option(2e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule, as in transformers.")
    warmup_steps: float = option(0.05, "Warm-up steps; below 1: a share of all steps.")
    num_train_epochs: float = option(3.0, "Passes over the training lists.")
    logging_steps: float = option(10, "Steps between log lines.")
    logging_first_step: bool = option(True, "Log the first step too.")
    save_total_limit: int | None = option(2, "Checkpoints kept.")

    def __post_init__(self) -> None:
        given, processes = self.output_dir, int(os.environ.get("WORLD_SIZE", 1))
        if processes > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it transformers would start as many runs of one process
        if self.deepspeed and not is_deepspeed_available():
            raise AlroFastError("--deepspeed needs the package deepspeed, which is not here: pip install deepspeed")
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
            self.resume_from_checkpoint = True
        self._check_numbers()
        known = get_available_reporting_integrations() if self.report_to else []
        for name in self.report_to:
            if name not in known:
                raise AlroFastError(
                    f"--report_to {name} is unknown, or not installed; expected none or {', '.join(known) or 'nothing'}"
                )

    def _check_numbers(self) -> None:
        """Those that transformers and torch would stumble over when training has begun."""
        for name in ("tokens_per_batch", "eval_tokens_per_batch", "gradient_accumulation_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "dataloader_num_workers"):
            _at_least(name, getattr(self, name), 0)
        for name in ("adam_beta1", "adam_beta2"):
            _at_least(name, getattr(self, name), 0, below=1)
        for name in ("seed", "data_seed"):
            _at_least(name, getattr(self, name), 0, below=2**32)
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise AlroFastError(f"--num_train_epochs is {self.num_train_epochs:g}; expected more than 0, and finite")


def _at_least(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    if value is None or least <= value < below:
        return
    upper = "" if value < least else ", and finite" if below == math.inf else f", and below {below:,}"
    raise AlroFastError(f"--{name} is {value:.12g}; expected at least {least:g}{upper}")


ARGUMENTS = (ModelArguments, DataArguments, ObjectiveArguments, RankerTrainingArguments)


@dataclass
class Config:
    """Everything a run is made of; `recipe` names its output folder."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    training: RankerTrainingArguments
    recipe: str

    def to_dict(self) -> dict[str, Any]:
        """Our own fields in full, and those of transformers that differ from their defaults: what config.yaml holds."""
        resolved: dict[str, Any] = {}
        for part in (self.model, self.data, self.objective):
            resolved |= dataclasses.asdict(part)
        given = self.training.to_dict()
        for entry in dataclasses.fields(RankerTrainingArguments):
            value = given.get(entry.name)
            changed = _plain(value) and value and value != _default(entry) and entry.name not in _SECRETS
            if entry.name in RankerTrainingArguments.__annotations__ or (entry.init and changed):
                resolved[entry.name] = value
        return resolved


def parse(argv: Sequence[str]) -> Config:
    """Flags and an optional `--config` (a YAML file, or the name of a ready recipe) -> Config.

    Raises AlroFastError for an unknown flag or key, a value of the wrong type, or a file that is no configuration.
    """
    argv = list(argv)
    parser = _Parser(ARGUMENTS, allow_abbrev=False, prog="python -m alro_fast.train", description=__doc__)
    parser.add_argument("--config", help=f"YAML file, or one of: {', '.join(recipe_names())}. Default: demo.")
    name = _config_name(argv)
    if name is None and not any(_flag(a) in {"model_name_or_path", "data_dir", "dataset", "preferences"} for a in argv):
        name = "demo"
    values = read_recipe(name) if name else {}
    known = {entry.name: entry for part in ARGUMENTS for entry in dataclasses.fields(part) if entry.init}
    for key in values:
        if key not in known:
            parser.error(f"{name}: unknown option {key!r}{_hint(key, known)}")
    from_file = [word for key, value in values.items() for word in _as_flags(key, value)]
    try:
        *parts, extra = parser.parse_args_into_dataclasses(
            from_file + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except AlroFastError:
        raise
    except (ValueError, TypeError, KeyError, ImportError) as error:  # raised by TrainingArguments' own checks
        raise AlroFastError(str(error).strip().splitlines()[0]) from error
    if extra:
        parser.error(f"unknown option {extra[0]!r}{_hint(_flag(extra[0]), known)}")
    given = {_flag(word) for word in from_file + argv}
    for key, reason in WITHOUT_MEANING.items():
        if key in given and getattr(parts[3], key) not in (None, 0, "no"):  # switched off explicitly is no mistake
            raise AlroFastError(f"--{key} has no meaning here: {reason}")
    return Config(*parts[:4], recipe=Path(name).stem if name else "run")


def recipe_names() -> list[str]:
    """Names that `--config` accepts besides a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Keys and values of a recipe file; AlroFastError when it is missing or not a flat YAML mapping."""
    ready = RECIPES / f"{name}.yaml"
    path = ready if ready.is_file() else Path(name)
    if not path.is_file():
        raise AlroFastError(f"--config {name}: no such file or recipe; ready recipes: {', '.join(recipe_names())}")
    problem = AlroFastError(
        f"--config {name} is not a configuration: expected YAML lines such as 'learning_rate: 2e-4'; "
        "prepared data goes to --data_dir"
    )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise problem from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise problem
    return values


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AlroFastError(f"{message}; python -m alro_fast.train --help lists the options")


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _flag(argument: str) -> str:
    return argument.lstrip("-").split("=")[0].replace("-", "_") if argument.startswith("--") else ""


def _config_name(argv: Sequence[str]) -> str | None:
    names = []
    for i, argument in enumerate(argv):
        if argument == "--config":
            if i + 1 == len(argv):
                raise AlroFastError("--config needs a YAML file or the name of a recipe")
            names.append(argv[i + 1])
        if argument.startswith("--config="):
            names.append(argument.split("=", 1)[1])
    if len(names) > 1:
        raise AlroFastError(f"--config is given {len(names)} times ({', '.join(names)}); give one, and flags beside it")
    return names[0] if names else None


def _as_flags(key: str, value: Any) -> list[str]:
    """A YAML entry as command-line words, so that both go through the same checks. None: the option's default."""
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{key}", yaml.safe_dump(value, default_flow_style=True).strip()]
    return [f"--{key}", str(value)]


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def _default(entry: dataclasses.Field) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
