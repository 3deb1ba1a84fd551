"""What a training run says while it runs: for people a plan, one progress line and a table; for machines lines of JSON.

`python -m alro_fast.train --log_json true` prints nothing but objects of one line each, told apart by "event": plan,
example (of a dry run), step, validation, results, done; the keys of a step are those of the Trainer's log.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..texts import json_line

WATCHED = ("loss", "ndcg@3", "ndcg@10", "pair_accuracy", "user_auc")


def show_plan(rows: Mapping[str, str], as_json: bool) -> None:
    """What will be trained, on what, and how long it takes."""
    if as_json:
        print_json("plan", rows)
        return
    for name, text in rows.items():
        print(folded(f"{name:<10} {text}"), flush=True)


def counted(number: float, one: str, more: str = "") -> str:
    """ "1 epoch", "2.5 epochs", "3 batches"."""
    return f"{number:,.12g} {one if number == 1 else more or one + 's'}"


def folded(row: str) -> str:
    """A row of the plan in 80 columns."""
    return textwrap.fill(row, 80, subsequent_indent=" " * 11, break_on_hyphens=False, break_long_words=False)


def show_example(prompt: str, answer: str, as_json: bool) -> None:
    """One prompt and its answer as the model gets them, special tokens included; what is no print is escaped."""
    shown = {"prompt": _printable(prompt), "answer": _printable(answer)}
    if as_json:
        print_json("example", shown)
        return
    print(f"\nthe first prompt of the first training list:\n{shown['prompt'].rstrip()}", flush=True)
    print(f"\nand its answer:\n{shown['answer']}\n", flush=True)


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


def show_results(text: str, document: Mapping[str, Any], as_json: bool) -> None:
    """The closing table; for machines, what the results file holds."""
    print_json("results", document) if as_json else print(f"\n{text}\n", flush=True)


def show_end(folder: str, seconds: float, following: str, as_json: bool, report: str = "") -> None:
    """Where everything is, and the command that comes next."""
    if as_json:
        print_json("done", {"output_dir": folder, "seconds": round(seconds, 1), "next": following})
        return
    print(*([report] if report else []), f"{seconds:.0f} s; everything is in {folder}", sep="\n")
    print(f"next: {following}", flush=True)


def print_json(event: str, values: Mapping[str, Any]) -> None:
    """An object on a line of its own; NaN and infinities, which JSON does not have, are null."""
    print(json_line({"event": event, **_finite(values)}), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def described(logs: Mapping[str, float]) -> str:
    """A log in words: loss and speed of a step, loss and NDCG of a validation, the speed of the run; "" for others."""
    if "lists_per_second" in logs:
        tokens = logs["unique_tokens_per_second"]
        loss = f"loss {logs['loss']:.4f}" if "loss" in logs else "no finite loss"
        said = f"{loss}, {logs['lists_per_second']:.1f} lists/s, {tokens:,.0f} tokens/s"
        said += f", {logs['skipped_steps']:,} steps skipped" if "skipped_steps" in logs else ""
        return f"{said}, utilisation {logs['utilisation']:.2f}" if "utilisation" in logs else said
    if "train_runtime" in logs and "utilisation" in logs:
        return f"trained in {logs['train_runtime']:.0f} s, utilisation {logs['utilisation']:.2f} of the GEMM peak"
    if "eval_loss" in logs:
        means = (f"{name} {logs[f'eval_{name}']:.4f}" for name in WATCHED if f"eval_{name}" in logs)
        return f"validation {', '.join(means)}"
    return ""


def reporter(args: Any) -> TrainerCallback:
    """What tells of the steps of a run, by its options."""
    return JsonLines() if args.log_json else PlainLines() if args.disable_tqdm else ProgressLine()


class ProgressLine(ProgressCallback):
    """One bar with the loss and the speed in it; validation results on lines of their own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if "lists_per_second" in logs:
            self.training_bar.set_postfix_str(described(logs))
        elif described(logs):
            self.training_bar.write(f"step {state.global_step}: {described(logs)}")


class PlainLines(TrainerCallback):
    """A line for every log, where a bar would not show: in files, and with --disable_tqdm."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and (shown := described(logs)):
            print(f"step {state.global_step}/{state.max_steps}: {shown}", flush=True)


class JsonLines(TrainerCallback):
    """Every log of the Trainer as a line of JSON."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            event = "validation" if "eval_loss" in logs else "trained" if "train_runtime" in logs else "step"
            print_json(event, {"step": state.global_step, **logs})
