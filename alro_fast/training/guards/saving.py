"""Checkpoints that are whole or not there, the log beside them, and what is said where neither can be written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...errors import AlroFastError
from ...run_folder import ASIDE, sync
from ..checkpoints import newest_of

LOG = "log.jsonl"
_WRITER = re.compile("PytorchStreamWriter|inline_container|unexpected pos|cannot be opened|Parent directory")  # torch's


def publish(aside: Path, final: Path) -> None:
    """Give a folder its name once everything in it is on the disk; one that has the name already is replaced."""
    for path in sorted(aside.rglob("*")):
        sync(path)
    sync(aside)
    if final.exists():
        os.rename(final, aside.parent / "replaced")  # noqa: PTH104
    os.rename(aside, final)  # noqa: PTH104
    sync(final.parent)


@contextlib.contextmanager
def writing(what: Path, folder: Path) -> Iterator[None]:
    """AlroFastError where `what` cannot be written: why, and how the run in `folder` is gone on with."""
    try:
        yield
    except AlroFastError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _WRITER.search(str(error)):
            raise
        shutil.rmtree(folder / ASIDE, ignore_errors=True)  # the part that was written
        newest = newest_of(folder)
        further = (
            "begin anew with --overwrite_output_dir true"
            if newest is None
            else f"go on from {newest} with --resume_from_checkpoint true"
        )
        reason = _reason(error, folder)
        raise AlroFastError(f"{what} cannot be written ({reason}); mend that, then {further}") from error


def _reason(error: Exception, folder: Path) -> str:
    """What the system says; torch's writer and safetensors hand on only some of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    told = re.search(r"(\w[^:\[\]]*) \(os error \d+\)", str(error))
    if told:
        return told[1]
    if not os.access(folder, os.W_OK):
        return "Permission denied"
    if shutil.disk_usage(folder).free < 2**20:
        return os.strerror(28)  # no space left on device
    if isinstance(error, RuntimeError) and _WRITER.search(str(error)):
        return "the file was written in part"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class RunLog:
    """log.jsonl of a run's folder: every line of the Trainer's log, which checkpoints leave out."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG

    def begin(self, history: list[dict[str, Any]]) -> None:
        """The lines up to where a run begins; none for a new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
        part.replace(self.path)

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def logged_until(step: int, folder: Path) -> list[dict[str, Any]]:
    """What a run in `folder` logged up to an optimiser step; a last line that was cut is of a later one."""
    path = folder / LOG
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] <= step:
            lines.append(line)
    return lines
