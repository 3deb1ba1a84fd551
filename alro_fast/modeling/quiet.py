"""What libraries may say while a command runs."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..processes.launch import is_first

DEPRECATED = "`is_gradient_checkpointing` is deprecated"  # a name that transformers warns of in its own Trainer


def quiet_libraries() -> None:
    """Log lines of ours go above a progress bar, not into it; libraries say what is wrong, not what they are at. Of
    several processes the first alone says more than errors."""
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.NOTSET if is_first() else logging.ERROR)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "torch", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
    if not torch.accelerator.is_available():  # where it is installed, DeepSpeed says on stdout that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextlib.contextmanager
def loading_quietly() -> Iterator[None]:
    """Libraries say what is wrong, not what they are at, while a model loads; afterwards they are as they were."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class _AboveTheBar(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
