"""The attention kernels of csrc/ beside the dense definition in float64, under every instruction set at hand."""

from __future__ import annotations

import pytest
import torch

from alro_fast.modeling import cpp_attention
from alro_fast.modeling.attention_bodies import dense_attention
from alro_fast.modeling.packing import Branch, PackedBatch, Tree, collate

_cpp = pytest.importorskip("alro_fast._cpp", reason="this install has no C++ kernels")
WIDEST = _cpp.instruction_set()
SETS = [name for name in ("generic", "avx2", "avx512", "avx512_bf16") if _cpp.select_instruction_set(name)]
_cpp.select_instruction_set(WIDEST)
TREES = {  # (tokens of the prefix, tokens of each branch), ...
    "one list": [(200, [30])],
    "pair": [(150, [130, 130]), (1, [1, 1])],
    "many short branches": [(120, [3, 11, 1, 24, 7, 7, 7, 30]), (5, [40] * 6), (130, [2] * 12)],
    "longer than a tile": [(260, [150, 5])],
}


@pytest.fixture(params=SETS)
def instruction_set(request):
    assert _cpp.select_instruction_set(request.param)
    yield request.param
    _cpp.select_instruction_set(WIDEST)


def make_batch(name: str) -> PackedBatch:
    trees = []
    for prefix, lengths in TREES[name]:
        shared = [1] * prefix
        trees.append(Tree([Branch([*shared, *[2 + b] * length], prefix) for b, length in enumerate(lengths)]))
    return collate(trees, range(len(trees)))


def inputs(batch: PackedBatch, heads: int, kv_heads: int, width: int, answers: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    rows = len(batch.input_ids)
    counts = (len(batch.answer_rows) if answers else rows, heads), (rows, kv_heads), (rows, kv_heads)
    return [torch.randn(1, n, of, width).transpose(1, 2).requires_grad_() for n, of in counts]


def with_gradients(attend, tensors: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    out = attend(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 64), (3, 3, 20), (6, 1, 80)])
@pytest.mark.parametrize("answers", [False, True], ids=["all rows", "answer rows"])
def test_values_and_gradients(instruction_set, name, heads, kv_heads, width, answers):
    batch = make_batch(name)
    layout, scale = batch.segments, width**-0.5
    tensors = inputs(batch, heads, kv_heads, width, answers)
    upstream = torch.randn(1, tensors[0].shape[2], heads, width)
    got = with_gradients(lambda *qkv: cpp_attention.tree_attention(*qkv, layout, scale, answers), tensors, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = with_gradients(lambda *qkv: dense_attention(*qkv, layout, scale, None, None, answers), exact, upstream)
    for a, b in zip(got, wanted):
        assert a.dtype == torch.float32
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)
        assert error < 1e-5, error


def test_equal_bits_whatever_the_number_of_threads():
    batch = make_batch("many short branches")
    tensors = inputs(batch, 4, 2, 32)
    upstream = torch.randn(1, len(batch.input_ids), 4, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            results.append(
                with_gradients(lambda *qkv: cpp_attention.tree_attention(*qkv, batch.segments, 0.2), tensors, upstream)
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_branches_do_not_see_each_other():
    """Bit for bit: whatever one branch holds, NaN included, the others and the prefix stay as they are."""
    batch = make_batch("many short branches")
    layout = batch.segments
    query, key, value = (tensor.detach().clone() for tensor in inputs(batch, 2, 2, 16))
    span = layout.spans[0]
    start = span.start + span.prefix + span.lengths[0]
    branch = slice(start, start + span.lengths[1])
    before = cpp_attention.tree_attention(query, key, value, layout, 0.25)
    for tensor in (query, key, value):
        tensor[:, :, branch] = 1e4
    after = cpp_attention.tree_attention(query, key, value, layout, 0.25)
    rest = torch.ones(before.shape[1], dtype=torch.bool)
    rest[branch] = False
    assert torch.equal(before[:, rest], after[:, rest])
    assert not torch.equal(before[:, branch], after[:, branch])


def test_what_it_serves(monkeypatch):
    tensor = torch.zeros(1, 2, 3, 4)
    assert cpp_attention.serves(tensor, tensor)
    assert not cpp_attention.serves(tensor.double(), tensor.double())
    assert not cpp_attention.serves(tensor.bfloat16(), tensor.bfloat16())
    assert not cpp_attention.serves(tensor, tensor[..., :3])
    assert not cpp_attention.serves(tensor.to("meta"), tensor.to("meta"))
    monkeypatch.setattr(cpp_attention, "_cpp", None)
    assert not cpp_attention.serves(tensor, tensor)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"key": torch.zeros(5, 3, 8)}, "query, key"),
        ({"value": torch.zeros(5, 2, 7)}, "value"),
        ({"query": torch.zeros(4, 8, 4).transpose(1, 2)}, "query"),
        ({"query": torch.zeros(4, 4, 8, dtype=torch.float64)}, "query"),
        ({"trees": torch.tensor([[0, 2, 6, 0, 4]])}, "trees"),
        ({"trees": torch.tensor([[0, 3, 2, 0, 4]])}, "trees"),
        ({"trees": torch.tensor([[0, 2, 5, 0, 5]])}, "trees"),
        ({"trees": torch.tensor([[0, 2, 5, 0, 4], [4, 5, 5, 4, 4]])}, "trees"),
        ({"query_row": torch.tensor([0, 1, 2, 5], dtype=torch.int32)}, "query_row"),
        ({"query_row": torch.tensor([0, 1, 2, 3])}, "query_row"),
        ({"branch_row": torch.tensor([2, 2, 3, 2, 4], dtype=torch.int32)}, "branch_row"),
        ({"branch_row": torch.tensor([0, 2, 2, 2, 4], dtype=torch.int32)}, "branch_row"),
        ({"scale": float("nan")}, "scale"),
        ({"threads": 0}, "threads"),
        ({"grad": torch.zeros(4, 4, 8)}, "d_query, d_key, d_value"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {
        "query": torch.zeros(4, 4, 8), "key": torch.zeros(5, 2, 8), "value": torch.zeros(5, 2, 8),
        "trees": torch.tensor([[0, 2, 5, 0, 4]]), "query_row": torch.tensor([0, 1, 2, 4], dtype=torch.int32),
        "branch_row": torch.tensor([2, 2, 2, 2, 4], dtype=torch.int32), "scale": 1.0, "out": torch.zeros(4, 4, 8),
        "lse": torch.zeros(4, 4), "grad": None, "d_query": None, "d_key": None, "d_value": None, "threads": 1,
    }  # fmt: skip
    _cpp.tree_attention(**arguments)
    with pytest.raises(ValueError, match=f"^{named}:"):
        _cpp.tree_attention(**{**arguments, **change})
