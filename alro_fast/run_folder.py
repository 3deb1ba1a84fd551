"""Folders of runs: whether one can be written to, files that are replaced together, and what a run recorded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import AlroFastError
from .texts import from_json, from_yaml, read_text

ASIDE = ".saving"  # where a checkpoint is written before it has its name
RESULTS, READY = ".results", ".results-ready"  # the same for what is measured, and when all of it is written
ADAPTER, ADAPTER_CONFIG, MERGED_BASE = "adapter_model.safetensors", "adapter_config.json", "merged_base"
LEFT_BY_A_KILL = (".alro_fast-*", ".data-*")  # of `check_writable` and of lists prepared into a run's folder
LEFT_BY_A_RUN = (  # what --overwrite_output_dir may remove
    *LEFT_BY_A_KILL, ASIDE, RESULTS, READY,
    "checkpoint-*", "runs", "data", "plots", "tables", "comparison", "profile", "evaluation", "[1-9]-*",
    "merged_base", "base", "references*", "config.yaml", "*.json", "*.jsonl", "log.part", "*.safetensors", "*.trec",
    "README.md", "report.html", "prompt_template.yaml", "training_args.bin", "tokenizer*", "chat_template.jinja",
    "merges.txt", "vocab.*",
)  # fmt: skip
BEFORE_THE_FIRST_CHECKPOINT = {ASIDE, "config.yaml", "data", "log.jsonl", "log.part", "reference.safetensors"}
OF_PREFERENCES = {"preference_results.json", "preference_predictions.jsonl"}
LEFT_BY_AN_EVALUATION = OF_PREFERENCES | {  # what a later one may replace
    "results.json", "predictions.jsonl", "run.trec", "qrels.trec", "report.html", "plots", "tables", "comparison",
}  # fmt: skip
_NEW, _EARLIER = "new", "earlier"


def check_writable(folder: Path) -> None:
    """AlroFastError unless `folder` can be written to, or made where it does not exist."""
    try:
        stands = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if stands.is_file():
            raise AlroFastError(f"output folder {folder} cannot be written ({stands} is a file); choose another")
        with tempfile.TemporaryDirectory(prefix=".alro_fast-", dir=stands):
            pass
    except OSError as error:
        raise AlroFastError(f"output folder {folder} cannot be written ({error.strerror}); choose another") from None


def contents(folder: Path) -> set[str]:
    """Names in a folder, none where there is none; without folders that were to vanish, and that a kill left."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {path.name for path in paths if not any(map(path.match, LEFT_BY_A_KILL))}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder, which is made where it does not exist, to this process; one left empty that was made is removed.

    AlroFastError where another process, or another run of this one, has it. The lock is the folder's own (flock): it
    leaves no file, and ends with the process. On file systems without locks nobody is kept out.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlroFastError(
                    f"another process is at work in {folder}; wait until it ends, or give another folder"
                ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # no longer empty
                for path in made:
                    path.rmdir()
    finally:
        os.close(lock)


@contextlib.contextmanager
def replacing(folder: Path, earlier: Iterable[str]) -> Iterator[Path]:
    """A folder for files that then take the place of `earlier` ones in `folder`: all of them, or none.

    A process that ends before all are written leaves the earlier ones. After that the new ones are taken: what is not
    in its place by then, `settle` moves there. Files of both are never there together.
    """
    settle(folder)
    work = folder / RESULTS
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        new = [path.name for path in work.iterdir()]
        (work / READY).write_text(json.dumps({_NEW: new, _EARLIER: sorted(earlier)}), encoding="utf-8")
        for path in (*work.iterdir(), work):
            sync(path)
        work.rename(folder / READY)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    settle(folder)


def settle(folder: Path) -> None:
    """Finish a replacement that was broken off when all of it was written; nothing where there is none."""
    ready = folder / READY
    if not (ready / READY).is_file():
        return
    names = from_json(read_text(ready / READY), str(ready / READY))
    for name in {*names[_NEW], *names[_EARLIER]}:
        path = folder / name
        if path.exists() and (name not in names[_NEW] or (ready / name).exists()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in names[_NEW]:
        if (ready / name).exists():
            (ready / name).rename(folder / name)
    sync(folder)
    shutil.rmtree(ready, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def share(folder: Path) -> None:
    """Give weights the mode that other files get, by the umask: safetensors writes them for their owner alone, and a
    server under another account would not read them."""
    os.umask(mask := os.umask(0o022))
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def run_options(folder: str | Path) -> dict[str, Any]:
    """The options a run was started with, of its config.yaml, as this version calls them; {} where none are there."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return {}
    try:
        options = from_yaml(read_text(path), str(path))
    except AlroFastError:
        options = None
    if not isinstance(options, dict):
        raise AlroFastError(f"{path} is damaged: expected the options that alro_fast.train recorded; restore the file")
    return as_now_called(options)


def as_now_called(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a run of this or an earlier version recorded, as this version calls them."""
    renamed = dict(options)
    if renamed.get("hybrid") == "paper":
        renamed["hybrid"] = "figure"
    if renamed.get("alro_fast_version") == "0.1.0" and renamed.get("preferences") is not None:
        renamed.pop("num_negatives", None)  # it recorded what it did not read, and took all of a file's
    return renamed


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """What adapter_config.json holds; AlroFastError where it is damaged, or has PEFT import a module of its choice."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        config = from_json(read_text(path), str(path))
    except AlroFastError:
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path"), str):
        raise AlroFastError(f"{path} is damaged: expected what PEFT wrote, with its base model; restore the file")
    if config.get("megatron_config") is not None:
        raise AlroFastError(
            f"{path} has a megatron_config, for which PEFT imports the module {config.get('megatron_core')!s:.80}; "
            "set it to null: adapters of Megatron are not read"
        )
    return config
