"""The ALRO loss: every variant against the float64 reference, its denominators, its checks, its work."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from list_tensors import random_list_tensors

import alro_fast
from alro_fast import ops
from alro_fast.errors import AlroFastError
from alro_fast.losses import alro as losses
from alro_fast.losses import reference
from alro_fast.losses.alro import ALROLoss, alro_loss, alro_loss_from_logits
from alro_fast.losses.lists import ALROCounts, RankingLists, alro_counts
from alro_fast.ops import dispatch

ROWS, H, V = 34, 16, 61
SIZES, TWIN = [5, 5, 4, 4, 1, 1, 3, 0], [-1, 0, -1, 2, -1, 4, -1, -1]
WEIGHTS = {"alpha": 0.7, "beta": 1.3, "gamma": 1.7, "sigma": 0.9}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=ops.available_backends("cpu"))
def backend(request) -> str:
    return request.param


def batch(form: str = "ranking", **options):
    lists = random_list_tensors(SIZES, TWIN, rows=ROWS, vocab=V, form=form, **options)
    labels = torch.randint(0, V, (ROWS,))
    labels[3] = -100
    return torch.randn(ROWS, H), torch.randn(V, H) * 0.5, torch.randn(V), labels, lists


def run(function, tensors, labels, lists, **options):
    """The output tuple and the gradients of its loss."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves, labels, lists, **options)
    return out, torch.autograd.grad(out.loss, leaves)


def with_bias(module, **more):
    def loss(hidden, weight, bias, labels, lists, **options):
        return module.alro_loss(hidden, weight, labels, lists, bias=bias, scale=0.8, **more, **options)

    return loss


def variants(form: str) -> list[dict]:
    scores = list(itertools.product(losses.SCORES, losses.SPACES)) if form == "ranking" else [("logprob", "candidates")]
    pairs = itertools.product(scores, losses.DIVERGENCES, losses.SPACES, (True, False), (False, True))
    return [
        {"score": score, "score_space": space, "psl": psl, "psl_space": where, "psl_detach": detach,
         "psl_mask_emitted": masked}
        for (score, space), psl, where, detach, masked in pairs
        if not (masked and where == "vocab")
    ]  # fmt: skip


def assert_equal_to_reference(got, want, *, values, grads):
    for ours, exact in zip(got[0], want[0]):
        torch.testing.assert_close(ours.double(), exact, rtol=values, atol=values)
    for ours, exact in zip(got[1], want[1]):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=grads * exact.abs().max().item())


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("form", ["ranking", "ratings"])
def test_every_variant_equals_the_reference(form, softcap):
    """Values and gradients of hidden, weight and bias in float64; from logits too."""
    *tensors, labels, lists = batch(form)
    tensors = [tensor.double() for tensor in tensors]
    cases = variants(form)
    assert len(cases) == (108 if form == "ranking" else 18)
    for options in cases[:: 1 if softcap is None else 5]:
        options = {**WEIGHTS, **options}
        want = run(with_bias(reference, softcap=softcap), tensors, labels, lists, **options)
        got = run(with_bias(losses, softcap=softcap, backend="eager"), tensors, labels, lists, **options)
        assert_equal_to_reference(got, want, values=1e-11, grads=1e-11)
        logits = reference.head_logits(*tensors[:2], bias=tensors[2], softcap=softcap, scale=0.8)
        from_logits = run(alro_loss_from_logits, [logits], labels, lists, **options)
        exact = run(reference.alro_loss_from_logits, [logits], labels, lists, **options)
        assert_equal_to_reference(from_logits, exact, values=1e-11, grads=1e-11)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("ranking", {}),
        ("ranking", {"softcap": 4.0, "psl": "symmetric", "psl_detach": False, "psl_mask_emitted": True}),
        ("ranking", {"psl_space": "vocab"}),
        ("ranking", {"psl_space": "vocab", "psl": "symmetric", "psl_detach": False, "softcap": 4.0}),
        ("ranking", {"score": "prob", "score_space": "vocab", "psl": "ce"}),
        ("ratings", {}),
        ("ratings", {"psl_space": "vocab", "psl": "ce"}),
    ],
)
def test_backends_equal_the_reference(backend, form, options):
    *tensors, labels, lists = batch(form)
    options = {**WEIGHTS, **options}
    got = run(with_bias(losses, backend=backend), tensors, labels, lists, **options)
    want = run(with_bias(reference), [tensor.double() for tensor in tensors], labels, lists, **options)
    assert got[0].loss.dtype == got[0].expected_rank.dtype == torch.float32
    assert_equal_to_reference(got, want, values=1e-5, grads=1e-4)


def test_frozen_head_in_bfloat16(backend):
    """The usual case: a half-precision frozen head; the gradient of hidden is rounded once."""
    hidden, weight, _, labels, lists = batch()
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    out = alro_loss(hidden, weight, labels, lists, **WEIGHTS, backend=backend)
    out.loss.backward()
    wide = hidden.detach().double().requires_grad_()
    want = reference.alro_loss(wide, weight.double(), labels, lists, **WEIGHTS)
    want.loss.backward()
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=2**-8, atol=2e-3 * wide.grad.abs().max().item())
    assert weight.grad is None


def test_several_twins_of_one_list(backend):
    lists = random_list_tensors([4, 4, 4], [-1, 0, 0], rows=12, vocab=V)
    tensors = torch.randn(12, H), torch.randn(V, H) * 0.5, torch.randn(V)
    labels = torch.randint(0, V, (12,))
    for options in ({"psl_detach": False}, {"psl_detach": False, "psl_space": "vocab"}):
        got = run(with_bias(losses, backend=backend), tensors, labels, lists, **WEIGHTS, **options)
        want = run(with_bias(reference), [tensor.double() for tensor in tensors], labels, lists, **WEIGHTS, **options)
        assert_equal_to_reference(got, want, values=1e-5, grads=1e-4)


def test_loss_is_the_weighted_sum_and_parts_vanish_with_their_lists():
    hidden, weight, _, labels, lists = batch()
    out = alro_loss(hidden, weight, labels, lists, **WEIGHTS)
    torch.testing.assert_close(out.loss, out.sft + 0.7 * out.soft_lambda + 1.3 * out.permutation)
    alone = alro_loss(hidden, weight, labels, lists._replace(twin=torch.full((8,), -1)), **WEIGHTS)
    assert alone.permutation.item() == 0
    torch.testing.assert_close(alone.soft_lambda, out.soft_lambda)
    silent = alro_loss(hidden, weight, torch.full_like(labels, -100), lists, **WEIGHTS)
    assert silent.sft.item() == 0
    none = random_list_tensors([0], [-1], rows=ROWS, vocab=V, width=3)
    empty = alro_loss(hidden, weight, labels, none, **WEIGHTS)
    assert empty.soft_lambda.item() == empty.permutation.item() == 0
    torch.testing.assert_close(empty.sft, out.sft)


@pytest.mark.parametrize("form", ["ranking", "ratings"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (2, 3)])
def test_no_lists_no_candidates_and_empty_lists_add_nothing(backend, form, shape):
    count, width = shape
    empty = random_list_tensors([0, 0], [-1, 0], rows=4, vocab=V, form=form, width=3)
    fields = [field[:count, :width] if field.dim() == 2 else field[:count] for field in empty[:5]]
    lists = RankingLists(*fields, empty.grades)
    hidden, weight, labels = torch.randn(4, H), torch.randn(V, H), torch.tensor([1, -100, 3, 4])
    for psl_space, psl in (("candidates", "kl"), ("vocab", "kl"), ("vocab", "symmetric")):
        options = {**WEIGHTS, "psl_space": psl_space, "psl": psl, "psl_detach": False}
        ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        out = alro_loss(ours, weight, labels, lists, backend=backend, **options)
        want = reference.alro_loss(exact, weight.double(), labels, lists, **options)
        for each in (out, want):
            assert each.soft_lambda.item() == each.permutation.item() == 0
            assert torch.equal(each.expected_rank, torch.zeros_like(each.expected_rank))
            assert each.expected_rank.shape == shape
            each.loss.backward()
        torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_counts_of_the_whole_batch_make_parts_add_up():
    """Two halves with the whole's denominators give the whole's loss and gradient."""
    hidden, weight, _, labels, _ = batch()
    halves = [
        random_list_tensors([5, 5], [-1, 0], rows=17, vocab=V, seed=1),
        random_list_tensors([4, 4, 2], [-1, 0, -1], rows=17, vocab=V, seed=2, width=5),
    ]
    shifted = halves[1]._replace(
        slot_rows=torch.where(halves[1].slot_rows >= 0, halves[1].slot_rows + 17, -1),
        twin=torch.where(halves[1].twin >= 0, halves[1].twin + 2, -1),
    )
    whole = RankingLists(*(torch.cat(pair) for pair in zip(halves[0][:5], shifted[:5])))
    counts = alro_counts(labels, whole)
    assert tuple(map(int, counts)) == (33, 5, 2)
    added = [sum(pair) for pair in zip(*(alro_counts(labels[i * 17 :][:17], half) for i, half in enumerate(halves)))]
    assert list(map(int, added)) == list(map(int, counts))

    leaf = hidden.clone().requires_grad_()
    expected = alro_loss(leaf, weight, labels, whole, **WEIGHTS)
    (want,) = torch.autograd.grad(expected.loss, leaf)
    total, parts = 0.0, []
    for index, half in enumerate(halves):
        leaf = hidden[index * 17 :][:17].clone().requires_grad_()
        out = alro_loss(leaf, weight, labels[index * 17 :][:17], half, counts=counts, **WEIGHTS)
        total = total + out.loss
        parts.append(torch.autograd.grad(out.loss, leaf)[0])
    torch.testing.assert_close(total, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(parts), want, rtol=1e-5, atol=1e-7)
    exact = reference.alro_loss(hidden, weight, labels, whole, counts=ALROCounts(10, 4, 3), **WEIGHTS)
    ours = alro_loss(hidden, weight, labels, whole, counts=ALROCounts(10, 4, 3), **WEIGHTS)
    torch.testing.assert_close(ours.loss, exact.loss)


def test_pads_do_not_matter():
    hidden, weight, _, labels, lists = batch()
    wide = random_list_tensors(SIZES, TWIN, rows=ROWS, vocab=V, width=9)
    a, b = (alro_loss(hidden, weight, labels, each, **WEIGHTS) for each in (lists, wide))
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.expected_rank, b.expected_rank[:, :5])


def test_module_holds_the_hyper_parameters_only():
    hidden, weight, bias, labels, lists = batch()
    module = ALROLoss(alpha=0.7, beta=1.3, gamma=1.7, sigma=0.9, psl="symmetric", softcap=4.0)
    assert list(module.state_dict()) == []
    want = alro_loss(hidden, weight, labels, lists, bias=bias, psl="symmetric", softcap=4.0, **WEIGHTS)
    torch.testing.assert_close(module(hidden, weight, labels, lists, bias=bias), want)
    assert "psl='symmetric'" in repr(module)
    assert alro_fast.ALROLoss is ALROLoss
    with pytest.raises(AlroFastError, match=r"ALROLoss got \['temperature'\]"):
        ALROLoss(temperature=1.0)
    with pytest.raises(AlroFastError, match="psl is 'js'; expected one of kl, ce, symmetric"):
        ALROLoss(psl="js")


def test_compiles_without_a_graph_break():
    hidden, weight, _, labels, lists = batch()

    def loss(hidden, weight):
        return alro_loss(hidden, weight, labels, lists, psl_space="vocab", score="prob", **WEIGHTS)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    out = compiled(*leaves)
    torch.testing.assert_close(out, loss(hidden, weight))
    grads = torch.autograd.grad(out.loss, leaves)
    again = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    torch.testing.assert_close(grads, torch.autograd.grad(loss(*again).loss, again))


def test_one_joint_pass_serves_both_orders(monkeypatch):
    """Every term, whole-vocabulary divergence included, in one call of a vocabulary pass over all rows."""
    from alro_fast.ops.backends import eager

    seen = []
    for name in ("vocab_pass", "paired_vocab_pass"):
        original = getattr(eager, name)
        monkeypatch.setattr(
            eager, name, lambda *a, _f=original, _n=name, **k: seen.append((_n, len(a[0]))) or _f(*a, **k)
        )
    hidden, weight, _, labels, lists = batch()
    for space in losses.SPACES:
        hidden = hidden.detach().requires_grad_()
        alro_loss(hidden, weight, labels, lists, psl_space=space, backend="eager", **WEIGHTS).loss.backward()
    assert seen == [("vocab_pass", ROWS), ("paired_vocab_pass", ROWS)]


def jensen_shannon(p, q, log_p, log_q):
    """As an entry of eager's DIVERGENCES: the divergence per row, and its gradients in the logits of P and of Q."""
    log_m = ((p + q) / 2).clamp(min=1e-30).log()
    by_p, by_q = p * (log_p - log_m) / 2, q * (log_q - log_m) / 2
    share_p, share_q = by_p.sum(dim=2, keepdim=True), by_q.sum(dim=2, keepdim=True)
    return (share_p + share_q).squeeze(2), by_p - p * share_p, by_q - q * share_q


def test_a_new_divergence_takes_the_definition_and_the_eager_backend(monkeypatch, caplog):
    """Nothing else: `auto` brings it to eager and says so once, a backend that does not declare it refuses it."""

    def defined(log_p, log_q):
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2

    hidden, weight, _, labels, lists = batch()
    options = {"psl": "js", "psl_detach": False, **WEIGHTS}
    with pytest.raises(AlroFastError, match="psl is 'js'; expected one of kl, ce, symmetric"):
        alro_loss(hidden, weight, labels, lists, **options)
    monkeypatch.setitem(reference.DIVERGENCES, "js", defined)
    monkeypatch.setitem(ops.DIVERGENCES, "js", jensen_shannon)
    dispatch._say_once_declined.cache_clear()
    with caplog.at_level(logging.INFO, logger="alro_fast.ops"):
        for form in (lists, batch("ratings")[-1]):
            leaf, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
            out = alro_loss(leaf, weight, labels, form, **options)
            wanted = reference.alro_loss(exact, weight.double(), labels, form, **options)
            torch.testing.assert_close(out.permutation.double(), wanted.permutation, atol=1e-6, rtol=1e-5)
            out.permutation.backward()
            wanted.permutation.backward()
            torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)
    assert out.permutation > 1e-3
    fast = ops.available_backends("cpu")[0]
    said = [record.message for record in caplog.records if "'js'" in record.message]
    assert said == ([] if fast == "eager" else [f"backend eager serves divergence 'js', which {fast} does not"])
    for name in set(ops.available_backends("cpu")) - {"eager"}:
        with pytest.raises(AlroFastError, match=f"backend '{name}' does not serve divergence 'js': use 'auto'"):
            alro_loss(hidden, weight, labels, lists, backend=name, **options)
    with pytest.raises(AlroFastError, match="taken over the candidates alone; psl_space='vocab' takes one of kl, ce"):
        alro_loss(hidden, weight, labels, lists, psl_space="vocab", **options)


def test_training_on_the_loss_orders_the_list():
    """Plain gradient descent on the soft lambda loss alone sorts the expected ranks by rating."""
    lists = random_list_tensors([4], [-1], rows=4, vocab=V, seed=4)
    lists = lists._replace(ratings=torch.tensor([[3.0, 5.0, 2.0, 4.0]]))
    lists = lists._replace(ranks=ops.descending_ranks(lists.ratings, torch.ones(1, 4, dtype=torch.bool)))
    hidden, weight = torch.randn(4, H, requires_grad=True), torch.randn(V, H)
    optimiser = torch.optim.Adam([hidden], lr=0.1)
    labels = torch.full((4,), -100)
    for _ in range(100):
        out = alro_loss(hidden, weight, labels, lists, alpha=1.0, beta=0.0, gamma=1.0, sigma=1.0)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    assert out.expected_rank[0].argsort().argsort().tolist() == (lists.ranks[0] - 1).tolist()


# ---- bad input


def changed(lists: RankingLists, field: str, place, value) -> RankingLists:
    tensor = getattr(lists, field).clone()
    tensor[place] = value
    return lists._replace(**{field: tensor})


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("slot_rows", (0, 1), ROWS, r"slot_rows holds 34 at \(0, 1\); expected values below the 34 rows of hidden"),
        ("slot_rows", (0, 1), -2, r"slot_rows holds -2 at \(0, 1\)"),
        ("slot_rows", (0, 1), -1, "slot_rows has a slot after a pad"),
        ("candidate_ids", (2, 0), V, r"candidate_ids holds 61 at \(2, 0\); expected values in 0 .. 60"),
        ("candidate_ids", (2, 3), -1, r"candidate_ids holds -1 at \(2, 3\); expected values on slots"),
        ("ratings", (0, 0), -1.0, r"ratings holds -1.0 at \(0, 0\); expected values in 0 .. 100"),
        ("ratings", (0, 0), 101.0, r"ratings holds 101.0 at \(0, 0\); expected values in 0 .. 100"),
        ("ratings", (0, 0), float("inf"), r"ratings holds inf at \(0, 0\)"),
        ("ratings", (0, 0), 17.0, r"twin\[1\] is 0, whose size or ratings differ"),
        ("ranks", (0, 0), 9, r"ranks of list 0 are .*; expected a permutation of 1 \.\. n"),
        ("twin", 2, 8, r"twin holds 8 at \(2,\); expected values in -1 .. 7"),
        ("twin", 6, 1, r"twin\[6\] is 1, itself a twin"),
        ("twin", 0, 0, r"twin\[0\] is 0, itself a twin"),
        ("twin", 6, 0, r"twin\[6\] is 0, whose size or ratings differ"),
    ],
)
def test_bad_lists_name_the_argument(field, place, value, message):
    hidden, weight, _, labels, lists = batch()
    with pytest.raises(AlroFastError, match=message):
        alro_loss(hidden, weight, labels, changed(lists, field, place, value), **WEIGHTS)
    logits = hidden @ weight.T
    with pytest.raises(AlroFastError, match=message):
        alro_loss_from_logits(logits, labels, changed(lists, field, place, value), **WEIGHTS)


def test_duplicate_candidates():
    hidden, weight, _, labels, lists = batch()
    twice = changed(lists, "candidate_ids", (3, 1), int(lists.candidate_ids[3, 0]))
    with pytest.raises(AlroFastError, match=r"candidate_ids holds token \d+ twice in list 3; expected distinct"):
        alro_loss(hidden, weight, labels, twice, **WEIGHTS)
    *_, lists = batch("ratings")
    grades = lists.grades._replace(token_ids=torch.tensor([1, 2, 3, 4, 1]))
    with pytest.raises(AlroFastError, match=r"grades\.token_ids holds token 1 twice"):
        alro_loss(hidden, weight, labels, lists._replace(grades=grades), **WEIGHTS)


@pytest.mark.parametrize(
    ("field", "tensor", "message"),
    [
        ("slot_rows", torch.zeros(8), r"slot_rows has shape \(8,\); expected \[L, M\]"),
        ("candidate_ids", torch.zeros(8, 4, dtype=torch.long), r"candidate_ids has shape \(8, 4\); expected \(8, 5\)"),
        ("ratings", torch.zeros(8, 5, dtype=torch.long), "ratings has dtype torch.int64; expected a floating dtype"),
        ("ranks", torch.zeros(8, 5), "ranks has dtype torch.float32; expected an integer dtype"),
        ("twin", torch.zeros(7, dtype=torch.long), r"twin has shape \(7,\); expected \(8,\)"),
        ("slot_rows", torch.zeros(8, 5), "slot_rows has dtype torch.float32; expected an integer dtype"),
        ("slot_rows", torch.zeros(8, 5, dtype=torch.long, device="meta"), "slot_rows is on meta and labels on cpu"),
        ("ratings", torch.zeros(8, 5, device="meta"), "ratings is on meta and labels on cpu"),
        ("twin", torch.zeros(8, dtype=torch.long, device="meta"), "twin is on meta and labels on cpu"),
    ],
)
def test_bad_shapes_dtypes_devices(field, tensor, message):
    hidden, weight, _, labels, lists = batch()
    with pytest.raises(AlroFastError, match=message):
        alro_loss(hidden, weight, labels, lists._replace(**{field: tensor}), **WEIGHTS)


def test_labels_and_lists_left_behind_on_another_device():
    hidden, weight, _, labels, lists = batch()
    with pytest.raises(AlroFastError, match="labels is on cpu and hidden on meta"):
        alro_loss(hidden.to("meta"), weight.to("meta"), labels, lists, **WEIGHTS)
    with pytest.raises(AlroFastError, match="labels is on cpu and logits on meta"):
        alro_loss_from_logits((hidden @ weight.T).to("meta"), labels, lists, **WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.arange(3.0)}, r"grades has token_ids \(5,\) and values \(3,\); expected \[C\] both"),
        ({"token_ids": torch.ones(1, 5).long(), "values": torch.ones(1, 5)}, r"grades has token_ids \(1, 5\)"),
        ({"token_ids": torch.ones(0).long(), "values": torch.ones(0)}, r"grades has .* at least one token"),
        ({"token_ids": torch.ones(5)}, r"grades\.token_ids has dtype torch\.float32; expected an integer dtype"),
        ({"values": torch.ones(5).long()}, r"grades\.values has dtype torch\.int64; expected a floating dtype"),
        ({"token_ids": torch.ones(5, device="meta").long()}, r"grades\.token_ids is on meta and labels on cpu"),
        ({"values": torch.ones(5, device="meta")}, r"grades\.values is on meta and labels on cpu"),
    ],
)
def test_bad_grades_name_the_argument(change, message):
    hidden, weight, _, labels, lists = batch("ratings")
    with pytest.raises(AlroFastError, match=message):
        alro_loss(hidden, weight, labels, lists._replace(grades=lists.grades._replace(**change)), **WEIGHTS)


def test_bad_labels_options_and_combinations():
    hidden, weight, _, labels, lists = batch()
    *_, graded = batch("ratings")
    out_of_range = labels.clone()
    out_of_range[5] = V
    for expected, arguments, options in [
        (r"labels holds 61 at \(5,\)", (hidden, weight, out_of_range, lists), {}),
        (r"labels has shape \(33,\); expected \(34,\)", (hidden, weight, labels[1:], lists), {}),
        ("hidden has 15 columns and weight 16", (hidden[:, 1:], weight, labels, lists), {}),
        ("hidden has dtype torch.float64 and weight torch.float32", (hidden.double(), weight, labels, lists), {}),
        ("score is 'rank'; expected one of logprob, prob, logit", (hidden, weight, labels, lists), {"score": "rank"}),
        (r"score=.prob., score_space=.candidates. with grades", (hidden, weight, labels, graded), {"score": "prob"}),
        (
            "psl_mask_emitted needs psl_space='candidates'",
            (hidden, weight, labels, lists),
            {"psl_mask_emitted": True, "psl_space": "vocab"},
        ),
    ]:
        with pytest.raises(AlroFastError, match=expected):
            alro_loss(*arguments, **WEIGHTS, **options)
    with pytest.raises(AlroFastError, match="logits has shape"):
        alro_loss_from_logits(torch.zeros(3), labels, lists, **WEIGHTS)
    foreign = changed(lists, "candidate_ids", (1, 0), next(iter(set(range(V)) - set(lists.candidate_ids[1].tolist()))))
    with pytest.raises(AlroFastError, match=r"candidate_ids of list 1 .* psl_space='vocab'"):
        alro_loss(hidden, weight, labels, foreign, psl_space="vocab", **WEIGHTS)
    alro_loss(hidden, weight, labels, foreign, **WEIGHTS)  # over the candidates any identifiers will do


def test_lists_move_between_devices():
    *_, lists = batch("ratings")
    moved = lists.to("meta")
    assert all(tensor.device.type == "meta" for tensor in (*moved[:5], *moved.grades))
    assert batch()[-1].to("cpu").grades is None


def test_rows_that_predict_several_labels_count_each(backend):
    """[N, K] labels are those of the same rows repeated, with the gradients of the repeated rows added up."""
    hidden, weight, bias, labels, lists = batch()
    table = torch.stack([labels, torch.randint(0, V, (ROWS,)), torch.full((ROWS,), -100)], dim=1)
    table[5:9, 2] = 7
    several = run(with_bias(losses, backend=backend), (hidden, weight, bias), table, lists, **WEIGHTS)
    double = [tensor.double() for tensor in (hidden, weight, bias)]
    exact = run(with_bias(reference), double, table, lists, **WEIGHTS)
    for found, expected in zip((*several[0], *several[1]), (*exact[0], *exact[1])):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)
    logprobs = (0.8 * (double[0] @ double[1].T + double[2])).log_softmax(1)
    by_hand = -sum(logprobs[n, label] for n, row in enumerate(table.tolist()) for label in row if label >= 0)
    assert several[0].sft.item() == pytest.approx(by_hand.item() / int((table >= 0).sum()), rel=1e-5)
