"""Shared settings: one thread per test process (workers run side by side); real data, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from places import SHARED

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
if not torch.cuda.is_available():  # must be set before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}; set ALRO_FAST_SHARED_DATA")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: bash bench/device.sh"))
