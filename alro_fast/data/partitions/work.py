"""What a run has done so far, in a folder of the disk: steps that are whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import AlroFastError
from ...texts import read_json


class Work:
    """Steps of a plan. A folder that holds steps of the same plan is gone on with, any other is emptied first.

    plan: what decides the results, as JSON. Attributes: folder; resumed: steps of an earlier run were found.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder
        self.resumed = folder.is_dir() and _known(folder / "plan.json") == json.loads(json.dumps(plan))
        if not self.resumed:
            shutil.rmtree(folder, ignore_errors=True)
            with whole(folder) as made:
                write_json(made / "plan.json", plan)

    def has(self, name: str) -> bool:
        """Whether a step is done."""
        return (self.folder / name).is_dir()

    def at(self, name: str) -> Path:
        """The folder of a step."""
        return self.folder / name

    @contextmanager
    def step(self, name: str) -> Iterator[Path]:
        """An empty folder that becomes the step's, when it has been filled without an error."""
        with whole(self.folder / name) as made:
            yield made

    def forget(self, name: str) -> None:
        """Remove the steps of a kind, which later ones have taken the place of."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder under another name, which is renamed to `folder` when it has been filled without an error."""
    made = folder.with_name(f".{folder.name}-making")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    yield made
    made.rename(folder)


def write_json(file: Path, document: Any) -> None:
    """Numbers, texts, lists and mappings of them."""
    file.write_text(json.dumps(document, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _known(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, AlroFastError):
        return None
