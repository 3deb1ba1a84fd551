"""Stages of training one after the other, and what becomes of the adapters between them.

A stage trains a new LoRA adapter over the base with the earlier stage's adapter merged in, so that switching the new
one off gives the earlier stage: the reference of preference tuning. What is written in the end is one of

    stacked   one adapter over the original base that holds both: [A1; A2], [s1 B1, s2 B2], of rank r1 + r2
    merged    the new adapter, and the merged base it belongs to
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import AlroFastError
from ..modeling.loading import LOAD_ERRORS, recorded_base, same_base
from ..run_folder import ADAPTER, ADAPTER_CONFIG, MERGED_BASE, adapter_config, share
from .unread import stage_names

if TYPE_CHECKING:
    from .config import Config


def stage_arguments(config: Config, root: Path) -> list[list[str]]:
    """Command-line words of every stage of `--stages a,b`, to be added to those of the run; each has its own folder."""
    model, training = config.model, config.training
    if training.stage_preferences is not None and config.data.preferences is not None:
        raise AlroFastError("--stage_preferences names the file of every stage; leave --preferences out")
    names = stage_names(training.stages)
    columns = {
        "num_train_epochs": _each(training.stage_epochs, "stage_epochs", len(names)),
        "learning_rate": _each(training.stage_learning_rates, "stage_learning_rates", len(names)),
        "preferences": _each(training.stage_preferences, "stage_preferences", len(names)),
    }
    stages = []
    for number, name in enumerate(names):
        words = ["--objective", name, "--output_dir", str(root / f"{number + 1}-{name}")]
        for key, values in columns.items():
            words += [f"--{key}", values[number]] if values else []
        if number:
            before = root / f"{number}-{names[number - 1]}"
            words += ["--init_adapter" if model.use_peft else "--model_name_or_path", str(before)]
            if model.stage_adapter == "merged" and (number > 1 or model.init_adapter is not None):
                words += ["--model_name_or_path", str(before / MERGED_BASE)]
        stages.append(words)
    return stages


def finished(folder: Path) -> bool:
    """True where a stage has written its final weights and state."""
    return (folder / "trainer_state.json").is_file() and any(
        (folder / name).is_file() for name in (ADAPTER, "model.safetensors", "model.safetensors.index.json")
    )


def merge_adapter(model: PreTrainedModel, folder: str | Path, base: str) -> PreTrainedModel:
    """`model` with the adapter of an earlier stage merged into its weights; `base` is what the model was loaded from.

    Raises AlroFastError when the folder holds no LoRA adapter, or one of another base.
    """
    read_adapter_config(folder)
    recorded = recorded_base(folder)
    if not same_base(recorded, base):
        raise AlroFastError(
            f"--init_adapter {folder} was trained over {recorded}, not over {base}: give that as --model_name_or_path, "
            f"or, where it was moved, name its new place in {ADAPTER_CONFIG}"
        )
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except LOAD_ERRORS as error:
        raise AlroFastError(f"--init_adapter {folder} does not fit {base} ({str(error).splitlines()[0]})") from error
    return merged


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter; AlroFastError for anything else."""
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        raise AlroFastError(
            f"--init_adapter {folder}: no {ADAPTER_CONFIG} there; expected the output of an earlier stage"
        )
    config = adapter_config(folder)
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("use_rslora"):
        raise AlroFastError(f"--init_adapter {folder} is no plain LoRA adapter; stages can follow only on one")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise AlroFastError(
                f"--init_adapter {folder} has a {key}: its layers differ in rank or scale; stages can follow only on "
                "an adapter with one of each"
            )
    return config


def stack_adapters(first: str | Path, second: str | Path) -> None:
    """Make `second` (trained over the base with `first` merged in) one adapter over the original base, in place.

    Exact: the sum of both updates, as one pair of matrices per layer; a layer only one of them has is filled up by 0.
    """
    folders = [Path(first), Path(second)]
    configs = [read_adapter_config(folder) for folder in folders]
    pairs = [_pairs(load_file(folder / ADAPTER)) for folder in folders]
    scales = [config["lora_alpha"] / config["r"] for config in configs]
    stacked: dict[str, Tensor] = {}
    for layer in sorted(pairs[0].keys() | pairs[1].keys()):
        downs, ups = [], []
        for number, config in enumerate(configs):
            down, up = pairs[number].get(layer) or _zeros(*pairs[1 - number][layer], rank=config["r"])
            downs.append(down.float())
            ups.append(scales[number] * up.float())
        stacked[f"{layer}.lora_A.weight"] = torch.cat(downs)
        stacked[f"{layer}.lora_B.weight"] = torch.cat(ups, dim=1)
    rank = configs[0]["r"] + configs[1]["r"]
    targets = sorted({layer.rsplit(".", 1)[-1] for layer in pairs[0].keys() | pairs[1].keys()})
    config = configs[1] | {
        "r": rank, "lora_alpha": rank, "target_modules": targets,
        "base_model_name_or_path": configs[0]["base_model_name_or_path"],
    }  # fmt: skip
    save_file(stacked, folders[1] / ADAPTER, metadata={"format": "pt"})
    share(folders[1])
    (folders[1] / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_merged_base(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save `base` (earlier adapter merged in) beside the adapter in `folder`, and name it there as its base."""
    folder = Path(folder)
    base.save_pretrained(folder / MERGED_BASE)
    tokenizer.save_pretrained(folder / MERGED_BASE)
    share(folder / MERGED_BASE)
    config = read_adapter_config(folder) | {"base_model_name_or_path": str((folder / MERGED_BASE).resolve())}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _pairs(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    layers = {name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")}
    strange = [name for name in weights if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange:
        raise AlroFastError(f"an adapter holds {strange[0]}, which is no LoRA matrix of a linear layer: not stackable")
    return {layer: (weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"]) for layer in layers}


def _zeros(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return down.new_zeros(rank, down.shape[1]), up.new_zeros(up.shape[0], rank)


def _each(values: str | None, name: str, stages: int) -> Sequence[str]:
    if values is None:
        return []
    found = [value.strip() for value in values.split(",")]
    if len(found) != stages:
        raise AlroFastError(f"--{name} {values!r} has {len(found)} values for {stages} stages; give one for each")
    return found
