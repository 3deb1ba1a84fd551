"""Every test here starts from one seed; `backend` is each backend that can serve CPU tensors."""

from __future__ import annotations

import pytest
import torch

from alro_fast import ops


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=ops.available_backends("cpu"))
def backend(request) -> str:
    return request.param
