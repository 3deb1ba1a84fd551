"""--push_to_hub: what must not be pushed, and the results, which are there only after the Trainer has pushed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import upload_folder

from ...errors import AlroFastError
from ...options import on_files
from .closing import RESULTS

if TYPE_CHECKING:
    from ..config import Config


def check_pushed(config: Config) -> None:
    """AlroFastError where the folder that is pushed would hold the lists: data sets have licences of their own."""
    if config.data.data_dir is None and not on_files(config.flat()) and config.data.dataset != "demo":
        raise AlroFastError(
            f"--push_to_hub true would push the lists of {config.data.dataset}, which are prepared into the output "
            "folder; prepare them apart with: python -m alro_fast.prepare, and give their folder as --data_dir"
        )


def push_results(trainer: Any, folder: Path) -> None:
    """The card and the results, into the repository that the Trainer pushed to; nothing that shows a user's list.

    Raises AlroFastError where the hub cannot be reached, or refuses; everything is in `folder` all the same.
    """
    try:
        upload_folder(
            repo_id=trainer.hub_model_id, folder_path=folder, allow_patterns=["README.md", *RESULTS],
            commit_message="Results", token=trainer.args.hub_token, revision=trainer.args.hub_revision,
        )  # fmt: skip
    except Exception as error:  # of whichever client the hub's library has
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AlroFastError(
            f"--push_to_hub true: the weights are pushed, and the results are not ({reason}); they are in {folder}: "
            f"hf upload {trainer.hub_model_id} {folder}/README.md README.md"
        ) from error
