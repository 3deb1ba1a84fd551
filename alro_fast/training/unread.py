"""Options that a run does not read: given, they are refused by name, with who reads them.

What reads an option is said once: by the descriptions of the objectives (`Description.reads`), by a field of options.py
(`read=`), and, of those of transformers that nothing here reads, by WITHOUT_MEANING.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from ..errors import AlroFastError
from ..objectives.base import Description, describe, describe_on_answers, descriptions
from ..options import DataArguments, ModelArguments, RankerTrainingArguments, Where, on_files

_TOKENS = "batches are measured in tokens"
_EVERY_TREE = "every batch is a tree of another shape, to be compiled anew"
_NO_PREDICTIONS = "evaluation measures rankings and losses, and keeps no predictions of the Trainer's"
_LOADER = "batches are built whole by --dataloader_num_workers, and handed over as they are"
WITHOUT_MEANING = {  # options of transformers.TrainingArguments that packed batches or our losses leave nothing to do
    "per_device_train_batch_size": f"{_TOKENS}; give --tokens_per_batch, and --lists_per_batch for so many at most",
    "per_device_eval_batch_size": f"{_TOKENS}; give --eval_tokens_per_batch",
    "auto_find_batch_size": f"{_TOKENS}; lower --tokens_per_batch where memory runs out",
    "train_sampling_strategy": f"{_TOKENS} and packed by length, in an order drawn by --seed; leave it out",
    "length_column_name": f"{_TOKENS} and packed by length; leave it out",
    "dataloader_drop_last": "no batch is left over; leave it out",
    "dataloader_pin_memory": "batches are pinned wherever a CUDA device trains; leave it out",
    "dataloader_persistent_workers": f"{_LOADER}; leave it out",
    "dataloader_multiprocessing_context": f"{_LOADER}; leave it out",
    "dataloader_in_order": f"{_LOADER}; leave it out",
    "remove_unused_columns": "lists have no columns; leave it out",
    "label_names": "labels are the answers' tokens; leave it out",
    "label_smoothing_factor": "the loss is that of --objective; leave it out",
    "neftune_noise_alpha": "its noise goes by the length of a sequence, and batches are packed into one; leave it out",
    "average_tokens_across_devices": "a loss is always a mean over the whole step of all processes; leave it out",
    "include_num_input_tokens_seen": "the log counts tokens already; leave it out",
    "use_liger_kernel": "the layers are fused already; leave it out",
    "liger_kernel_config": "the layers are fused already; leave it out",
    "use_cache": "a forward pass over trees keeps no cache; leave it out",
    "torch_compile": f"{_EVERY_TREE}; leave it out",
    "torch_compile_backend": f"{_EVERY_TREE}; leave it out",
    "torch_compile_mode": f"{_EVERY_TREE}; leave it out",
    "logging_nan_inf_filter": "steps without a finite loss are left out anyway; leave it out",
    "enable_jit_checkpoint": "SIGTERM and SIGINT always leave a checkpoint; leave it out",
    "do_train": "training is what this command does; leave it out (--dry_run true trains nothing)",
    "do_eval": "validation goes by --eval_strategy; give that",
    "do_predict": "the closing table is of the test lists; leave it out",
    "prediction_loss_only": f"{_NO_PREDICTIONS}; leave it out",
    "batch_eval_metrics": f"{_NO_PREDICTIONS}; leave it out",
    "include_for_metrics": f"{_NO_PREDICTIONS}; leave it out",
    "eval_accumulation_steps": f"{_NO_PREDICTIONS}; leave it out",
    "eval_do_concat_batches": f"{_NO_PREDICTIONS}; leave it out",
    "eval_use_gather_object": f"{_NO_PREDICTIONS}; leave it out",
    "bf16_full_eval": "evaluation computes in the precision of training; give --bf16",
    "fp16_full_eval": "evaluation computes in the precision of training; give --fp16",
}
_ON = (
    "do_train",
    "dataloader_in_order",
    "average_tokens_across_devices",
)  # what happens anyway; of all others, nothing
_OFF = (None, 0, "no")

BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedules


class Unread(NamedTuple):
    """Why an option is not read; decided_by: the options that would have to be others."""

    message: str
    decided_by: frozenset[str]


def stage_names(stages: str | None) -> list[str]:
    """The objectives that `--stages` names, in their order; none for None. AlroFastError for a name that is none."""
    if stages is None:
        return []
    names = [name.strip() for name in stages.split(",") if name.strip()]
    if not names:
        raise AlroFastError(f"--stages {stages!r} names no objective; expected some, such as sft,dmpo")
    known = descriptions()
    for name in names:
        if name not in known:
            offered = [one.name for one in known.values() if not one.stands_for]
            raise AlroFastError(f"--stages names {name!r}, no objective; expected some of {', '.join(offered)}")
    return names


def objectives_of(options: Any) -> list[Description]:
    """What a run trains, stage after stage; where one of them is trained on answers, a stand-in is taken (`sft`)."""
    names = stage_names(options.stages) or [options.objective]
    answers = on_files(options) or any(describe(name).run == "preferences" for name in names)
    return [describe_on_answers(name) if answers else describe(name) for name in names]


def unread(name: str, options: Any) -> Unread | None:
    """Why a run with these options (as attributes) does not read one of them; None where it does.

    Of a run in stages, what one stage reads is read.
    """
    if name in WITHOUT_MEANING:
        return Unread(f"--{name} has no meaning here: {WITHOUT_MEANING[name]}", frozenset())
    where = _WHERE.get(name)
    if where is not None and not where.holds(options):
        return _elsewhere(name, where)
    readers = [one for one in descriptions().values() if name in one.reads]
    if not readers:
        return None
    mine = objectives_of(options)
    wheres = [one.reads[name] for one in mine if one in readers]
    if not wheres:
        return _belongs_to_others(name, mine, readers)
    told = [where for where in wheres if where is not None]
    if len(told) < len(wheres) or any(where.holds(options) for where in told):
        return None
    return _elsewhere(name, told[0])


def without_meaning(name: str, value: Any) -> bool:
    """Whether giving this value to an option of WITHOUT_MEANING says something that does not happen."""
    if name == "do_eval":  # the Trainer's arguments set it themselves
        return True
    return value is not True if name in _ON else not (value in _OFF or value == [])


def _elsewhere(name: str, where: Where) -> Unread:
    return Unread(f"--{name} is read {where.said}; leave it out", frozenset(where.decided_by))


def _belongs_to_others(name: str, mine: list[Description], readers: list[Description]) -> Unread:
    instead = next((one.instead[name] for one in mine if name in one.instead), None)
    hint = f"give --{instead}" if instead else "leave it out"
    titles = " and ".join(dict.fromkeys(one.title for one in readers))
    run = ", ".join(dict.fromkeys(one.title for one in mine))
    message = f"--{name} has no meaning for --objective {run}; it is read by --objective {titles}: {hint}"
    return Unread(message, frozenset(("objective", "stages", "preferences")))


_BEST = Where(
    "with --load_best_model_at_end true, --save_strategy best, or a schedule that goes by evaluations",
    lambda o: o.load_best_model_at_end or o.save_strategy == "best" or o.lr_scheduler_type in BY_EVALUATIONS,
    ("load_best_model_at_end", "save_strategy", "lr_scheduler_type"),
)
_PUSHED = Where("with --push_to_hub true", lambda o: o.push_to_hub, ("push_to_hub",))
_THEIRS = {  # options of transformers that others of theirs switch on
    "eval_steps": Where("with --eval_strategy steps", lambda o: o.eval_strategy == "steps", ("eval_strategy",)),
    "eval_delay": Where("with an --eval_strategy", lambda o: o.eval_strategy != "no", ("eval_strategy",)),
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "hub_model_id": _PUSHED,
    "hub_strategy": _PUSHED,
    "hub_private_repo": _PUSHED,
    "hub_always_push": _PUSHED,
    "hub_revision": _PUSHED,
}
_WHERE = _THEIRS | {
    entry.name: entry.metadata["read"]
    for part in (ModelArguments, DataArguments, RankerTrainingArguments)
    for entry in dataclasses.fields(part)
    if "read" in entry.metadata
}
