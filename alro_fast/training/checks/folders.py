"""The output folder of a run: which one, and whether the run may have it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AlroFastError
from ...run_folder import BEFORE_THE_FIRST_CHECKPOINT, LEFT_BY_A_RUN, contents

if TYPE_CHECKING:
    from ..config import Config


def named_folder(config: Config) -> Path:
    """The output folder: given, or the next free out/<recipe>, which is then that of the options."""
    training = config.training
    if training.output_dir is None:
        if training.world_size > 1:
            raise AlroFastError("several processes need --output_dir: each would number its own folder")
        training.output_dir = str(next_folder(config))
    return Path(training.output_dir)


def claim_folder(config: Config, folder: Path) -> None:
    """AlroFastError where the output folder holds something else, or a run neither resumed nor to be replaced."""
    training = config.training
    if training.process_index:
        return
    if contents(folder):
        recorded = [folder / "config.yaml", *folder.glob("checkpoint-*/config.yaml")]  # the first may be cut short
        if not any(path.is_file() and b"alro_fast_version" in path.read_bytes() for path in recorded):
            raise AlroFastError(
                f"--output_dir {folder} holds something else than a run of alro_fast; give another folder"
            )
        if begun(folder) and not training.resume_from_checkpoint and not training.overwrite_output_dir:
            raise AlroFastError(
                f"--output_dir {folder} holds an earlier run; add --resume_from_checkpoint true or "
                "--overwrite_output_dir true, or give another folder"
            )
        foreign = sorted(path.name for path in folder.iterdir() if not any(map(path.match, LEFT_BY_A_RUN)))
        if foreign and begun(folder) and not training.resume_from_checkpoint:
            raise AlroFastError(
                f"--output_dir {folder} holds {foreign[0]}, which no run wrote: it is not replaced; give another folder"
            )


def begun(folder: Path) -> bool:
    """Whether `folder` holds more than a run that ended before its first checkpoint leaves."""
    return not contents(folder) <= BEFORE_THE_FIRST_CHECKPOINT


def next_folder(config: Config) -> Path:
    """The next free out/<recipe>."""
    folder, n = Path("out") / config.recipe, 1
    while folder.exists():
        n += 1
        folder = Path("out") / f"{config.recipe}-{n}"
    return folder
