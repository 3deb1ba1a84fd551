"""What a run asks of transformers, tried before the first step: else it would fail after hours, or in its first minute.

The optimiser and the schedule are made for the run's own weights and steps, and thrown away; the optimiser takes a step
on a few numbers of its own; the schedule is asked for the rates of its corners.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

from ...errors import AlroFastError
from ...options import RankerTrainingArguments
from ..unread import BY_EVALUATIONS

NO_STEP = {"params", "model", "optimizer_dict"}  # what optimisers ask for that are made for one model alone


def rehearse(trainer: Trainer, steps: int) -> None:
    """AlroFastError for an optimiser or a schedule that a run of `steps` steps could not go on with."""
    args: Any = trainer.args
    if args.deepspeed or args.fsdp:  # they make optimisers of their own, for shards of the weights
        return
    try:
        _check_optimizer(trainer)
        _check_schedule(trainer, steps)
    finally:
        trainer.optimizer = trainer.lr_scheduler = None


def check_hub(args: RankerTrainingArguments, folder: Path) -> None:
    """AlroFastError for a name that no repository of the hub has; nothing is asked of the hub."""
    name = args.hub_model_id or folder.name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise AlroFastError(
            f"--hub_model_id {name} is no name of a repository ({_reason(error)}); give another"
        ) from None


def check_metric(args: Any, measured: Collection[str]) -> None:
    """AlroFastError where the best model, or the schedule, goes by something that no evaluation measures.

    measured: names of what an evaluation measures.
    """
    waits = args.lr_scheduler_type in BY_EVALUATIONS
    best = args.load_best_model_at_end or args.save_strategy == "best"
    if not best and not waits:
        return
    what = f"--lr_scheduler_type {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}"
    if best:
        what = "--load_best_model_at_end" if args.load_best_model_at_end else "--save_strategy best"
    if args.eval_strategy == "no":
        raise AlroFastError(f"{what} goes by evaluations; give --eval_strategy steps or epoch")
    name = args.metric_for_best_model
    if name is None:
        raise AlroFastError(f"{what} needs --metric_for_best_model; expected one of {', '.join(measured)}")
    if name.removeprefix("eval_") not in measured:
        raise AlroFastError(f"--metric_for_best_model {name} is not measured; expected one of {', '.join(measured)}")


def _check_optimizer(trainer: Trainer) -> None:
    args: Any = trainer.args
    name = getattr(args.optim, "value", args.optim)
    if args.optim_target_modules and not re.search("galore|apollo", name):
        raise AlroFastError(
            f"--optim_target_modules is read with an --optim of galore or apollo, not {name}; leave it out"
        )
    given = f" with --optim_args {args.optim_args}" if args.optim_args else ""
    try:
        trainer.create_optimizer()
        model: Any = trainer.model
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        without = copy.copy(args)
        without.optim_args = None
        if args.optim_args and Trainer.get_optimizer_cls_and_kwargs(without, model) == (kind, options):
            raise ValueError("it reads none of them")
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and not NO_STEP & options.keys():
            toy = torch.nn.Parameter(torch.ones(64, 64, device=args.device))
            toy.grad = torch.ones_like(toy)
            kind([toy], **options).step()
    except Exception as error:  # whatever the optimisers of a dozen packages raise
        raise AlroFastError(f"--optim {name}{given} cannot be used here: {_reason(error)}") from error


def _check_schedule(trainer: Trainer, steps: int) -> None:
    args: Any = trainer.args
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    known = inspect.signature(cast(Any, TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type])).parameters
    for key in args.lr_scheduler_kwargs or {}:
        if key not in known:
            offered = ", ".join(known.keys() - {"optimizer", "num_warmup_steps", "num_training_steps"}) or "none"
            raise AlroFastError(f"--lr_scheduler_kwargs: {key} is no setting of {name}; expected some of {offered}")
    try:
        schedule = trainer.create_scheduler(steps, optimizer=trainer.optimizer)
        if isinstance(schedule, ReduceLROnPlateau | GreedyLR) or not isinstance(schedule, LambdaLR):
            return
        warm = args.get_warmup_steps(steps)
        corners = {0, 1, warm, warm + 1, steps // 2, steps - 1, steps}
        for step in sorted(at for at in corners if 0 <= at <= steps):
            for rate in schedule.lr_lambdas:
                if not math.isfinite(rate(step)):
                    raise ValueError(f"the rate of step {step} is not finite")
    except Exception as error:
        given = f" with --lr_scheduler_kwargs {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
        raise AlroFastError(
            f"--lr_scheduler_type {name}{given} cannot be used for {steps:,} steps: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, with its kind where it says little."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if " " in text else f"{type(error).__name__} {text}".strip()
