"""What a launcher (torchrun, accelerate launch) says in the environment, before torch is imported."""

from __future__ import annotations

import os
import time

PATIENCE = 10.0  # seconds; a launcher ends the others sooner once one process has failed
all_know = False  # of the mistake at hand, as `dealing` finds


def launched() -> int:
    """How many processes were launched together; 1 without a launcher."""
    number = os.environ.get("WORLD_SIZE", "")
    return int(number) if number.isdecimal() and "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes for all."""
    return launched() == 1 or os.environ["RANK"] == "0"


def speaks() -> bool:
    """Whether this process prints the mistake that it ends with. The first does; another one waits first, because
    the launcher ends all once one has ended: where all make one mistake, the first one says it meanwhile. What only
    another one knows is said after that."""
    if is_first():
        return True
    time.sleep(PATIENCE)
    return not all_know
