"""Log-probabilities of a reference that never changes, kept on disk.

A file of reference log-probabilities names the model, the answers and the precision it was made with; one of another
model, of other data, or computed in another precision than the run's, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from ..errors import AlroFastError
from ..modeling.lm_head import head_of
from ..modeling.logprobs import Autocast, answer_logprobs
from ..objectives.base import Example
from ..objectives.dmpo import ReferenceTable
from ..processes.dealing import told
from ..processes.launch import is_first

FORMAT = "alro_fast reference log-probabilities 1"


def reference_table(
    model: nn.Module,
    examples: Sequence[Example],
    path: str | Path,
    token_budget: int = 8192,
    backend: str = "auto",
    autocast: Autocast = nullcontext,
    share: str = "batch",
) -> ReferenceTable:
    """The table kept in `path`, or, where there is none, computed under `model` as it stands and written there.

    An adapter of the model is switched off. Of several processes each computes a share (`processes.dealing`), and the
    first writes. Raises AlroFastError when the file was made with another model or other
    data, or in another precision than `autocast` gives.
    """
    path = Path(path)
    names = [example.source.list_id for example in examples]
    if len(set(names)) != len(names):
        raise AlroFastError("two records share a list_id; reference log-probabilities are kept by it")
    prints = {
        "format": FORMAT,
        "model": model_fingerprint(model),
        "data": data_fingerprint(examples),
        "precision": _precision(model, autocast),
    }
    if told(path.exists()):
        flat = _read(path, prints)
    else:
        with cast(Any, model).disable_adapter() if hasattr(model, "disable_adapter") else torch.no_grad():
            trees = [example.tree for example in examples]
            sums = answer_logprobs(model, trees, token_budget, backend, autocast, share)
        flat = np.concatenate(sums).astype(np.float32)
        if is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"log_probs": flat}, path, metadata=prints)
    counts = [len(example.tree.ids) for example in examples]
    parts = torch.split(torch.from_numpy(flat), counts)
    return ReferenceTable(dict(zip(names, parts)))


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the configuration, and over names, shapes and bytes of every weight that is no adapter's."""
    config = {key: value for key, value in cast(Any, model).config.to_dict().items() if not _beside_the_point(key)}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name or "modules_to_save" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def data_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids of every branch and where its answer starts."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.source.list_id, *map(int, example.tree.answer_starts)]).encode())
        for ids in example.tree.ids:
            digest.update(np.ascontiguousarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _beside_the_point(key: str) -> bool:
    """Entries of a configuration that no log-probability depends on, or that the weights already say."""
    return key.startswith("_") or key.endswith("_token_id") or key in ("transformers_version", "use_cache", "dtype")


def _precision(model: nn.Module, autocast: Autocast) -> str:
    """The type the model computes in: autocast's, else that of its head's weights."""
    weight = head_of(model).weight
    with autocast():
        casts = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if casts else weight.dtype
    return str(dtype).removeprefix("torch.")


def _read(path: Path, prints: dict[str, str]) -> np.ndarray:
    try:
        with safe_open(path, "np") as opened:
            found: dict[str, str] = opened.metadata() or {}
            flat: np.ndarray = opened.get_tensor("log_probs")
    except (OSError, SafetensorError) as error:
        raise AlroFastError(f"--ref_log_probs {path} holds no reference log-probabilities ({error})") from None
    if found.get("format") != FORMAT:
        raise AlroFastError(f"--ref_log_probs {path} was not written by --precompute_ref_log_probs")
    checked = (("model", "another model"), ("data", "other data or prompts"), ("precision", "another precision"))
    for kind, what in checked:
        if found.get(kind) != prints[kind]:
            raise AlroFastError(
                f"--ref_log_probs {path} holds log-probabilities of {what} than this run's; give another file, or "
                "delete it to compute them again"
            )
    return flat
