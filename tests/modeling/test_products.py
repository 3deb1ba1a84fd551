"""Products by either library against float64: strides, empty sides, bias, dtypes."""

import pytest
import torch

from alro_fast.modeling import products
from alro_fast.modeling.products import product


@pytest.fixture(params=[False, True], ids=["mm", "onednn"])
def _library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 5), (130, 64, 48), (3, 4, 0), (0, 4, 3)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "slices", "expanded"])
@pytest.mark.parametrize("bias", [False, True])
def test_any_layout_gives_the_product(shape, layout, bias):
    torch.manual_seed(0)
    rows, inner, columns = shape
    if layout == "plain":
        x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    elif layout == "transposed":
        x, weight = torch.randn(inner, rows).T, torch.randn(inner, columns).T
    elif layout == "slices":
        x, weight = torch.randn(2 * rows, 3 * inner)[::2, ::3], torch.randn(columns, inner + 4)[:, 2:-2]
    else:
        x, weight = torch.randn(1, inner).expand(rows, inner), torch.randn(columns, 1).expand(columns, inner)
    b = torch.randn(columns) if bias else None
    wanted = x.double() @ weight.double().T + (b.double() if bias else 0)
    got = product(x, weight, b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs_own(dtype):
    x, weight = torch.randn(9, 16).to(dtype), torch.randn(6, 16).to(dtype)
    assert torch.equal(product(x, weight), x @ weight.T)
    assert torch.equal(product(x, weight, weight[:, 0]), torch.addmm(weight[:, 0], x, weight.T))
