"""What a launcher (torchrun, accelerate launch) says in the environment, before torch is imported."""

from __future__ import annotations

import os
import time

PATIENCE = 3.0  # seconds; a launcher ends the others sooner once one process has failed


def launched() -> int:
    """How many processes were launched together; 1 without a launcher."""
    number = os.environ.get("WORLD_SIZE", "")
    return int(number) if number.isdecimal() and "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes for all."""
    return launched() == 1 or os.environ["RANK"] == "0"


def give_way() -> None:
    """Let the first process speak first: where all make one mistake, it says so, and its launcher ends the others
    before they do."""
    if not is_first():
        time.sleep(PATIENCE)
