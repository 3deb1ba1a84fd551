"""The devices of a test that a GPU runs (bench/device.sh) and the CPU proves."""

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
