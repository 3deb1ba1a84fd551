"""What a process owes torchrun above it (accelerate launch starts processes by it, too); imports nothing large."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def end_with_launcher() -> None:
    """Have the kernel send this process SIGTERM when its launcher dies, even of SIGKILL: nobody else would end it.

    On Linux, and under torchrun; elsewhere nothing.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def tell_launcher(reason: str) -> None:
    """Leave the line of a mistake where torchrun looks for it: its report on failed processes then ends with it."""
    path = os.environ.get(ERROR_FILE)
    if path:
        with contextlib.suppress(OSError):
            said = {"message": f"error: {reason}", "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(path).write_text(json.dumps({"message": said}), encoding="utf-8")
