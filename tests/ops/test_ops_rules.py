"""What torch asks of ops: gradcheck in float64, compilation without a graph break, the rules of custom ops."""

from __future__ import annotations

import pytest
import torch
from head_runs import HEADS, listwise_case, logprobs_of, make_head, run

from alro_fast import ops
from alro_fast.ops.head import _head
from alro_fast.ops.listwise import _listwise


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_gradcheck_in_float64(options):
    hidden, weight, bias = (t.double().requires_grad_() for t in make_head(4, 5, 23, bias=True))
    targets = torch.tensor([0, 22, -100, 7])
    assert torch.autograd.gradcheck(logprobs_of(ops, targets, **options), (hidden, weight, bias))
    ids = torch.tensor([[0, 5, 9], [22, 4, 1]])

    def kl(hidden, weight, bias):
        pairs = (ids, ids[:, [1, 2, 0]])
        return ops.linear_kl(hidden[:2], hidden[2:], weight, bias=bias, relabel=pairs, detach_p=False, **options)

    assert torch.autograd.gradcheck(kl, (hidden, weight, bias))


def test_compiles_without_a_graph_break(backend):
    hidden, weight, bias = make_head(7, 32, 101, bias=True)
    targets = torch.tensor([1, 2, -100, 4, 5, 6, 100])
    scores, mask = torch.randn(2, 4, 4), torch.ones(2, 4, dtype=torch.bool)
    ratings = torch.randint(0, 5, (2, 4)).float()
    upstream = torch.randn(7), torch.randn(7), torch.randn(2), torch.randn(2, 4)

    def everything(hidden, weight, bias, scores):
        logprobs, lse = ops.linear_logprobs(hidden, weight, targets, bias=bias, softcap=5.0, backend=backend)
        kl = ops.linear_kl(hidden[:2], hidden[2:4], weight, detach_p=False, backend=backend)
        loss, _ = ops.soft_lambda(scores, ratings, mask, gamma=1.0, sigma=1.0, backend=backend)
        return logprobs, lse, kl + loss, ops.soft_argmax_ranks(scores, mask, gamma=1.0)

    tensors = hidden, weight, bias, scores
    want = run(everything, tensors, upstream)
    got = run(torch.compile(everything, fullgraph=True, backend="aot_eager"), tensors, upstream)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_custom_ops_obey_the_rules():
    """Schema, fake shapes and autograd registration, as torch itself checks them."""
    hidden, weight, bias = (t.requires_grad_() for t in make_head(4, 8, 23, bias=True))
    empty = torch.zeros(0, dtype=torch.long)
    rows, ids = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[3, 4, 5], [6, 7, -1]])
    first, second = torch.tensor([0, -1]), torch.tensor([2, -1])
    flags = torch.tensor([False, True])
    for arguments in (
        (hidden, weight, bias, torch.tensor([[1], [2], [-1], [22]]), rows, ids, first, second, flags, flags,
         4.0, 0.5, True, True, True, 0.0, "eager"),
        (hidden, weight, None, empty.view(0, 0), empty.view(0, 0), empty.view(0, 0), empty, empty, empty.bool(),
         empty.bool(), None, 1.0, False, True, False, 0.0, "eager"),
    ):  # fmt: skip
        torch.library.opcheck(_head, arguments)
    lists, logits = listwise_case("ranking", [3, 3], [-1, 0])
    sizes = torch.tensor([3, 3])
    arguments = (logits.requires_grad_(), lists.ratings, lists.ranks, sizes, lists.twin, None, 1.0, 1.0, True, "kl")
    torch.library.opcheck(_listwise, (*arguments, False, False, "eager"))
