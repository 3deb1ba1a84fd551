"""What libraries may say while a command runs."""

from __future__ import annotations

import logging
import warnings

from tqdm import tqdm
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Log lines of ours go above a progress bar, not into it; libraries say what is wrong, not what they are at.

    `is_gradient_checkpointing` is a name that transformers warns of in its own Trainer.
    """
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "torch", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


class _AboveTheBar(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
