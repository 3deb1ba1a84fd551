"""The attention kernels of csrc/ beside a dense masked softmax in float64, under every instruction set at hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from alro_fast.modeling import cpp_attention

_cpp = pytest.importorskip("alro_fast._cpp", reason="this install has no C++ kernels")
WIDEST = _cpp.instruction_set()
SETS = [name for name in ("generic", "avx2", "avx512", "avx512_bf16") if _cpp.select_instruction_set(name)]
_cpp.select_instruction_set(WIDEST)


@dataclass
class Trie:
    """A layout by its nodes alone, and by brute force which row sees which."""

    node_start: torch.Tensor
    node_parent: torch.Tensor
    distinct_rows: torch.Tensor

    @classmethod
    def of(cls, lengths: list[int], parents: list[int], answers: float = 0.3) -> Trie:
        start = torch.tensor(np.cumsum([0, *lengths]))
        drawn = np.random.default_rng(len(lengths)).random(int(start[-1])) < answers
        drawn[-1] = True
        return cls(start, torch.tensor(parents, dtype=torch.int32), torch.from_numpy(np.flatnonzero(drawn)))

    @property
    def rows(self) -> int:
        return int(self.node_start[-1])

    def chain(self, row: int) -> list[int]:
        """The rows of its branch up to `row`, first to last."""
        node = int(torch.searchsorted(self.node_start, row, right=True)) - 1
        above, last = [], row + 1
        while node >= 0:
            above = [*range(int(self.node_start[node]), last), *above]
            node = int(self.node_parent[node])
            last = int(self.node_start[node + 1])
        return above

    def visible(self, window: int | None = None) -> torch.Tensor:
        """[T, T] bool: row, key."""
        seen = torch.zeros(self.rows, self.rows, dtype=torch.bool)
        for row in range(self.rows):
            chain = self.chain(row)
            seen[row, chain if window is None else chain[-window:]] = True
        return seen


def random_trie(seed: int, roots: int, depth: int, longest: int) -> Trie:
    """Nodes of 1 to `longest` rows, most of them short, with up to four children each."""
    draw = np.random.default_rng(seed)
    lengths: list[int] = []
    parents: list[int] = []

    def grow(parent: int, level: int) -> None:
        lengths.append(int(draw.choice([1, 2, 3, 7, 12, int(draw.integers(1, longest + 1))])))
        parents.append(parent)
        node = len(parents) - 1
        if level < depth:
            for _ in range(draw.integers(1, 5)):
                grow(node, level + 1)

    for _ in range(roots):
        grow(-1, 1)
    return Trie.of(lengths, parents)


TRIES = {
    "one node": lambda: Trie.of([230], [-1]),
    "one row": lambda: Trie.of([1], [-1]),
    "trees of one prefix": lambda: Trie.of([120, 3, 11, 1, 24, 7, 30, 5, 40, 40], [-1, 0, 0, 0, 0, 0, 0, -1, 7, 7]),
    "one root": lambda: Trie.of([30] + [150, 12, 12, 12, 12] * 2, [-1, 0, 1, 1, 1, 1, 0, 6, 6, 6, 6]),
    "longer than a tile": lambda: Trie.of([130, 260, 150, 5, 1], [-1, 0, 1, 1, 0]),
    "rows of their own": lambda: Trie.of([1] * 70, [-1] * 70),
    "a path": lambda: Trie.of([5] * 30, list(range(-1, 29))),
    "random, depth 2": lambda: random_trie(0, 3, 2, 90),
    "random, depth 3": lambda: random_trie(1, 2, 3, 60),
    "random, depth 5": lambda: random_trie(3, 1, 5, 40),
}


@pytest.fixture(params=SETS)
def instruction_set(request):
    assert _cpp.select_instruction_set(request.param)
    yield request.param
    _cpp.select_instruction_set(WIDEST)


def inputs(trie: Trie, heads: int, kv_heads: int, width: int, answers: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    counts = (len(trie.distinct_rows) if answers else trie.rows, heads), (trie.rows, kv_heads), (trie.rows, kv_heads)
    return [torch.randn(1, n, of, width).transpose(1, 2).requires_grad_() for n, of in counts]


def with_gradients(attend, tensors: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    out = attend(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def dense(query, key, value, visible, scale, softcap=None):
    """softmax(q k') v where visible [queries, T]."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def check(trie: Trie, heads: int, kv_heads: int, width: int, answers=False, window=None, softcap=None) -> None:
    tensors = inputs(trie, heads, kv_heads, width, answers)
    upstream, scale = torch.randn(1, tensors[0].shape[2], heads, width), width**-0.5
    visible = trie.visible(window)[trie.distinct_rows if answers else slice(None)]
    options = (trie, scale, window, softcap, answers)
    got = with_gradients(lambda *qkv: cpp_attention.tree_attention(*qkv, *options), tensors, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = with_gradients(lambda *qkv: dense(*qkv, visible, scale, softcap), exact, upstream)
    for a, b in zip(got, wanted):
        assert a.dtype == torch.float32
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=0.5)
        assert error < 1e-5, error


@pytest.mark.parametrize("name", TRIES)
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 64), (3, 3, 20), (7, 1, 80)])
@pytest.mark.parametrize("answers", [False, True], ids=["all rows", "answer rows"])
def test_values_and_gradients(instruction_set, name, heads, kv_heads, width, answers):
    check(TRIES[name](), heads, kv_heads, width, answers)


@pytest.mark.parametrize("name", ["one node", "one root", "longer than a tile", "random, depth 5"])
@pytest.mark.parametrize("window, softcap", [(1, None), (40, None), (200, 2.0), (None, 0.5)])
@pytest.mark.parametrize("answers", [False, True], ids=["all rows", "answer rows"])
def test_windows_and_soft_caps(instruction_set, name, window, softcap, answers):
    check(TRIES[name](), 6, 2, 24, answers, window, softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("answers", [False, True], ids=["all rows", "answer rows"])
def test_half_precision_is_rounded_once(dtype, answers):
    """What comes out is float64's from the same inputs, rounded; gradients see the rounded output."""
    trie = TRIES["random, depth 5"]()
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs(trie, 4, 2, 32, answers)]
    upstream = torch.randn(1, tensors[0].shape[2], 4, 32).to(dtype)
    got = with_gradients(lambda *qkv: cpp_attention.tree_attention(*qkv, trie, 0.2, answers=answers), tensors, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    visible = trie.visible()[trie.distinct_rows if answers else slice(None)]
    wanted = with_gradients(lambda *qkv: dense(*qkv, visible, 0.2), exact, upstream)
    assert torch.allclose(got[0].double(), wanted[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
    for a, b in zip(got[1:], wanted[1:]):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("answers", [False, True], ids=["all rows", "answer rows"])
def test_equal_bits_whatever_the_number_of_threads(answers):
    trie = random_trie(5, 4, 5, 60)
    assert trie.rows > 1000  # several units
    tensors = inputs(trie, 4, 2, 32, answers)
    upstream = torch.randn(1, tensors[0].shape[2], 4, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(
                with_gradients(
                    lambda *qkv: cpp_attention.tree_attention(*qkv, trie, 0.2, answers=answers), tensors, upstream
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", ["trees of one prefix", "one root", "random, depth 5"])
@pytest.mark.parametrize("window", [None, 20])
def test_branches_do_not_see_each_other(instruction_set, name, window):
    """Bit for bit: whatever numbers a row holds, those that may not see it, nor it them, stay as they are."""
    trie = TRIES[name]()
    visible = trie.visible(window)
    tensors = [tensor.detach() for tensor in inputs(trie, 2, 1, 16)]
    upstream = torch.randn(1, trie.rows, 2, 16)

    def run(changed: list[int]) -> list[torch.Tensor]:
        leaves = [tensor.clone() for tensor in tensors]
        for leaf in leaves:
            leaf[:, :, changed] = 1e4
        attend = cpp_attention.tree_attention
        found = with_gradients(
            lambda *qkv: attend(*qkv, trie, 0.25, window), [leaf.requires_grad_() for leaf in leaves], upstream
        )
        return [found[0].transpose(1, 2), *found[1:]]

    before = run([])
    for node in range(0, len(trie.node_parent), 5):
        changed = list(range(int(trie.node_start[node]), int(trie.node_start[node + 1])))
        after = run(changed)
        below = visible[:, changed].any(1)
        meets = visible[changed].any(0) | below | visible[below].any(0)  # keys that a changed softmax gives a gradient
        assert torch.equal(before[0][:, :, ~below], after[0][:, :, ~below])
        assert torch.equal(before[1][:, :, ~below], after[1][:, :, ~below])
        assert all(torch.equal(a[:, :, ~meets], b[:, :, ~meets]) for a, b in zip(before[2:], after[2:]))
        assert not torch.equal(before[0][:, :, changed], after[0][:, :, changed])


@pytest.mark.parametrize("asked", [[], [0], [3], [2, 2, 6]])
def test_every_row_of_a_gradient_is_written(asked):
    """Rows that no query sees get 0, whatever the memory held before."""
    trie = Trie.of([2, 3, 4, 1], [-1, 0, 1, 0])
    draw = torch.Generator().manual_seed(0)
    query, grad = (torch.randn(len(asked), 2, 8, generator=draw) for _ in range(2))
    key, value = (torch.randn(10, 1, 8, generator=draw) for _ in range(2))
    how = trie.node_start, trie.node_parent, torch.tensor(asked, dtype=torch.int32), 0.3, 0, 0.0
    out, lse = torch.empty_like(query), torch.empty(len(asked), 2)
    _cpp.tree_attention(query, key, value, *how, out, lse, None, None, None, None, 1)
    grads = [torch.full_like(tensor, torch.nan) for tensor in (query, key, value)]
    _cpp.tree_attention(query, key, value, *how, out, lse, grad, *grads, 1)
    assert not any(tensor.isnan().any() for tensor in grads)
    seen = trie.visible()[asked].any(0)
    assert (grads[2][seen] != 0).all()
    assert all((tensor[~seen] == 0).all() for tensor in grads[1:])


def test_what_it_serves(monkeypatch):
    tensor = torch.zeros(1, 2, 3, 4)
    assert cpp_attention.serves(tensor, tensor)
    assert not cpp_attention.serves(tensor.double(), tensor.double())
    assert cpp_attention.serves(tensor.bfloat16(), tensor.bfloat16())
    assert cpp_attention.serves(tensor.half(), tensor.half())
    assert not cpp_attention.serves(tensor, tensor.half())
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
        ({"node_start": torch.tensor([0, 2, 3, 6])}, "node_start"),
        ({"node_start": torch.tensor([0, 3, 2, 5])}, "node_start"),
        ({"node_start": torch.tensor([1, 2, 3, 5])}, "node_start"),
        ({"node_start": torch.tensor([0, 2, 3, 4, 5])}, "node_start"),
        ({"node_start": torch.tensor([0, 2, 3, 5], dtype=torch.int32)}, "node_start"),
        ({"node_parent": torch.tensor([0, 0, 0], dtype=torch.int32)}, "node_parent"),
        ({"node_parent": torch.tensor([-1, 2, 0], dtype=torch.int32)}, "node_parent"),
        ({"node_parent": torch.tensor([-1, -1, 0], dtype=torch.int32)}, "node_parent"),
        ({"node_parent": torch.tensor([-1, 0, -2], dtype=torch.int32)}, "node_parent"),
        ({"query_row": torch.tensor([0, 1, 2, 5], dtype=torch.int32)}, "query_row"),
        ({"query_row": torch.tensor([0, 2, 1, 4], dtype=torch.int32)}, "query_row"),
        ({"query_row": torch.tensor([-1, 1, 2, 4], dtype=torch.int32)}, "query_row"),
        ({"query_row": torch.tensor([0, 1, 2, 3])}, "query_row"),
        ({"scale": float("nan")}, "scale"),
        ({"window": -1}, "window"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": float("inf")}, "softcap"),
        ({"threads": 0}, "threads"),
        ({"grad": torch.zeros(4, 4, 8)}, "d_query, d_key, d_value"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {
        "query": torch.zeros(4, 4, 8), "key": torch.zeros(5, 2, 8), "value": torch.zeros(5, 2, 8),
        "node_start": torch.tensor([0, 2, 3, 5]), "node_parent": torch.tensor([-1, 0, 0], dtype=torch.int32),
        "query_row": torch.tensor([0, 1, 2, 4], dtype=torch.int32), "scale": 1.0, "window": 0, "softcap": 0.0,
        "out": torch.zeros(4, 4, 8), "lse": torch.zeros(4, 4), "grad": None, "d_query": None, "d_key": None,
        "d_value": None, "threads": 1,
    }  # fmt: skip
    _cpp.tree_attention(**arguments)
    with pytest.raises(ValueError, match=f"^{named}:"):
        _cpp.tree_attention(**{**arguments, **change})
