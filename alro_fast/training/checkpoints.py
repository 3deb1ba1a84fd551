"""Which checkpoint a run resumes from. They are whole or not there (guards.saving), but disks and people damage files.

A checkpoint is whole when it has everything a run goes on with: options, place, random states, weights, optimiser and
schedule, in the files of plain training, of FSDP or of DeepSpeed.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_pt_utils import safe_globals

from ..errors import AlroFastError
from ..run_folder import contents, run_options
from ..texts import read_json
from .batches import Cursor
from .config import RECORDED, defaults
from .unread import unread

if TYPE_CHECKING:
    from ..data.lists import PreparedData
    from .config import Config

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin"), (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
PICKLED, UNREAD = (".pt", ".pth", ".bin"), "training_args.bin"  # UNREAD: of the version before
RESUMABLE = {  # options that may differ between a checkpoint and the run that resumes it
    "output_dir", "dry_run", "overwrite_output_dir", "report_to", "disable_tqdm", "log_json", "logging_steps",
    "save_total_limit", "resume_from_checkpoint", "data_dir", "raw_dir", "save_steps", "save_strategy",
    "max_test_lists", "baselines", "fuse", "logging_nan_inf_filter", "gradient_accumulation_steps",
    "max_nonfinite_steps", "use_cpu",
}  # fmt: skip


def find_checkpoint(config: Config, folder: Path) -> str | None:
    """The checkpoint to resume from: the one named, or the newest whole one in `folder`; None for a new run.

    AlroFastError when there is none, it is damaged, or its configuration differs.
    """
    wanted: str | bool | None = config.training.resume_from_checkpoint
    if wanted is None:
        return None
    path = newest_checkpoint(folder) if isinstance(wanted, bool) else Path(wanted)
    if path is None:
        why = "".join(f" ({newest.name}: {damage(newest)})" for newest in _numbered(folder)[:1])
        raise AlroFastError(
            f"--resume_from_checkpoint: no whole checkpoint in {folder}{why}; begin anew with "
            "--overwrite_output_dir true in place of it"
        )
    if not path.is_dir():
        raise AlroFastError(f"--resume_from_checkpoint {path}: no such folder; give a checkpoint of a run, or true")
    reason = damage(path)
    if reason is not None:
        raise AlroFastError(f"--resume_from_checkpoint: {path} cannot be resumed from: {reason}; choose another")
    check_same_options(path, config)
    return str(path)


def settle_auto(config: Config, folder: Path | None) -> None:
    """Make `--resume_from_checkpoint auto` true where `folder` holds a whole checkpoint, or else a new run.

    A run that broke off before its first checkpoint is replaced, never one that has left its weights.
    """
    training = config.training
    if training.resume_from_checkpoint != "auto":
        return
    training.resume_from_checkpoint = None
    if folder is None or not contents(folder):
        return
    if any(damage(path) is None for path in _numbered(folder)):
        training.resume_from_checkpoint = cast(str, True)  # as transformers has it: a path, or True
    elif not any((folder / name).exists() for kind in WEIGHTS for name in kind):
        training.overwrite_output_dir = True


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; a line is printed for each newer one that is damaged."""
    for path in _numbered(folder):
        reason = damage(path)
        if reason is None:
            return path
        print(f"{path} is skipped: {reason}")
    return None


def newest_of(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; nothing is printed."""
    return next((path for path in _numbered(folder) if damage(path) is None), None)


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None. Heads, tails and sizes of files are read, not the tensors."""
    for name in ("config.yaml", "trainer_state.json"):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    broken = next((path for path in files if not _readable(path)), None)
    if broken is not None:
        return f"{broken.relative_to(checkpoint)} is damaged"
    for path in (path for path in sorted(checkpoint.rglob("*")) if path.suffix in PICKLED and path.name != UNREAD):
        if (code := _calls(path)) is not None:
            return f"{path.relative_to(checkpoint)} would run code ({code}), as no checkpoint of a run does"
    options = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    if options.get("save_only_model"):
        return "it holds the model alone, as --save_only_model true asked for"
    return _missing(checkpoint, adapter=options.get("use_peft", True))


def check_same_options(checkpoint: Path, config: Config) -> None:
    """AlroFastError when a checkpoint was trained with other options than those at hand.

    Compared is what the run at hand reads; a version before recorded all options of all objectives. What a file does
    not record was at its default, or there was no such option yet.
    """
    before, now = run_options(checkpoint), config.to_dict()
    options = config.flat()
    keys = {key for key in before.keys() | now.keys() if unread(key, options) is None} - RESUMABLE - set(RECORDED)
    default = defaults()
    for key in sorted(keys, key=lambda key: (key not in before or key not in now, key)):  # what one alone has, last
        then, here = (given.get(key, default.get(key)) for given in (before, now))
        if then != here:
            raise AlroFastError(
                f"--resume_from_checkpoint: {checkpoint} was trained with {key}={then}, this run has {here}; "
                "resume with the same options, or start in another --output_dir"
            )


def check_same_data(checkpoint: str | None, prepared: PreparedData) -> None:
    """AlroFastError when a checkpoint was trained on other lists than those at hand."""
    recorded = Path(checkpoint or "") / "data_manifest.json"
    if checkpoint is None or not recorded.is_file():
        return
    if read_json(recorded).get("files") != prepared.manifest.get("files"):
        raise AlroFastError(
            f"--resume_from_checkpoint: {checkpoint} was trained on other lists than those of {prepared.path}; "
            "resume with the same data, or start in another --output_dir"
        )


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, the newest first."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _missing(checkpoint: Path, adapter: bool) -> str | None:
    """What a checkpoint lacks of the files that a run goes on with, or None."""

    def has(*patterns: str) -> bool:
        return any(True for pattern in patterns for _ in checkpoint.glob(pattern))

    sharded = has("global_step*")  # DeepSpeed keeps weights, optimiser and schedule there
    names = WEIGHTS[0] if adapter else WEIGHTS[1]
    if not sharded and not has(*names, "pytorch_model_fsdp*"):
        return f"it has no {names[0]}"
    for index in checkpoint.glob("*.index.json"):
        shards = read_json(index).get("weight_map", {}).values()
        lost = sorted(name for name in set(shards) if not (checkpoint / name).is_file())
        if lost:
            return f"it has no {lost[0]}"
    if not sharded and not has("optimizer.pt", "optimizer.bin", "optimizer_*"):
        return "it has no optimizer.pt"
    if not sharded and not has("scheduler.pt"):
        return "it has no scheduler.pt"
    try:
        processes = Cursor.of(checkpoint).processes or 1
    except (KeyError, TypeError, ValueError):
        return "its trainer_state.json does not say what was trained"
    several = processes > 1 or has("rng_state_*.pth")
    states = [f"rng_state_{rank}.pth" for rank in range(processes)] if several else ["rng_state.pth"]
    return next((f"it has no {name}" for name in states if not has(name)), None)


def _readable(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # its header's offsets against its size
                return True
        if path.suffix in PICKLED:
            return _whole_archive(path)
        if path.suffix == ".json":
            read_json(path)
        if path.name == "config.yaml":
            return isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
        return path.suffix != ".distcp" or path.stat().st_size > 0
    except (SafetensorError, ValueError, yaml.YAMLError, zipfile.BadZipFile):
        return False


def _calls(path: Path) -> str | None:
    """What a pickle would call that plain tensors and random states do not need, or None; nothing of it is run.

    The Trainer loads checkpoints with weights_only=True, which refuses the same, when training has begun. DeepSpeed
    does not: of its files its own classes are let through.
    """
    try:
        with cast(Any, safe_globals)():  # numpy's random states
            found = get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # of a pickle that is none
        return "it cannot be told which"
    return ", ".join(sorted(name for name in found if not name.startswith("deepspeed."))) or None


def _whole_archive(path: Path) -> bool:
    """Whether a zip file has the directory at its end, and every entry where that says."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        for entry in archive.infolist():
            raw.seek(entry.header_offset)
            if raw.read(4) != b"PK\x03\x04":
                return False
    return True
