"""Which checkpoint a run resumes from. They are written in place, trainer_state.json last: a kill can leave a part."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from safetensors import SafetensorError, safe_open

from ..errors import AlroFastError
from .config import RECORDED
from .unread import unread

if TYPE_CHECKING:
    from ..data.lists import PreparedData
    from .config import Config

RESUMABLE = {  # options that may differ between a checkpoint and the run that resumes it
    "output_dir", "dry_run", "overwrite_output_dir", "report_to", "disable_tqdm", "logging_steps", "save_total_limit",
    "resume_from_checkpoint", "data_dir", "raw_dir", "save_steps", "save_strategy", "max_test_lists",
    "logging_nan_inf_filter",
}  # fmt: skip


def find_checkpoint(config: Config, folder: Path) -> str | None:
    """The checkpoint to resume from: the one named, or the newest whole one in `folder`; None for a new run.

    AlroFastError when there is none, it is damaged, or its configuration differs.
    """
    wanted = config.training.resume_from_checkpoint
    if wanted is None:
        return None
    path = newest_checkpoint(folder) if wanted is True else Path(wanted)
    if path is None:
        raise AlroFastError(
            f"--resume_from_checkpoint: no whole checkpoint in {folder}; begin anew with --overwrite_output_dir true "
            "in place of it"
        )
    if not path.is_dir():
        raise AlroFastError(f"--resume_from_checkpoint {path}: no such folder; give a checkpoint of a run, or true")
    reason = damage(path)
    if reason is not None:
        raise AlroFastError(f"--resume_from_checkpoint: {path} cannot be resumed from: {reason}; choose another")
    check_same_options(path, config)
    return str(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; a line is printed for each newer one that is damaged."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        reason = damage(path)
        if reason is None:
            return path
        print(f"{path} is skipped: {reason}")
    return None


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None. Heads and tails of its files are read, not the tensors."""
    for name in ("config.yaml", "trainer_state.json"):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    broken = [path.name for path in sorted(checkpoint.iterdir()) if path.is_file() and not _readable(path)]
    return f"{broken[0]} is damaged" if broken else None


def check_same_options(checkpoint: Path, config: Config) -> None:
    """AlroFastError when a checkpoint was trained with other options than those at hand."""
    before, now = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8")), config.to_dict()
    options = config.flat()
    keys = {key for key in before.keys() | now.keys() if unread(key, options) is None} - RESUMABLE - set(RECORDED)
    for key in sorted(keys, key=lambda key: (key not in before or key not in now, key)):  # what one alone has, last
        if before.get(key) != now.get(key):
            raise AlroFastError(
                f"--resume_from_checkpoint: {checkpoint} was trained with {key}={before.get(key)}, "
                f"this run has {now.get(key)}; "
                "resume with the same options, or start in another --output_dir"
            )


def check_same_data(checkpoint: str | None, prepared: PreparedData) -> None:
    """AlroFastError when a checkpoint was trained on other lists than those at hand."""
    recorded = Path(checkpoint or "") / "data_manifest.json"
    if checkpoint is None or not recorded.is_file():
        return
    if json.loads(recorded.read_text(encoding="utf-8")).get("files") != prepared.manifest.get("files"):
        raise AlroFastError(
            f"--resume_from_checkpoint: {checkpoint} was trained on other lists than those of {prepared.path}; "
            "resume with the same data, or start in another --output_dir"
        )


def _readable(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.suffix in (".pt", ".pth"):  # a zip file, whose directory stands at its end
            return zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        if path.name == "config.yaml":
            return isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    except (SafetensorError, ValueError, yaml.YAMLError):
        return False
    return True
