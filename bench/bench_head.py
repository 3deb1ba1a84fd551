"""Loss over the LM head, ours beside every peer: `pytest bench/bench_head.py --benchmark-json head.json`.

Groups: `ce` (cross-entropy of N rows) and `joint` (cross-entropy of both orders and KL(p || q) between them, p
detached), each forward and forward + backward to d hidden, `ce` with a frozen and a trainable head. `floor` is two bare
GEMMs with the vocabulary (three with dW), by the library, no softmax: what no method that forms both products can beat.
CPU sizes by default, those of real models on CUDA. Errors are of d hidden against float64, on 32 rows.
"""

from __future__ import annotations

import functools
import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alro_fast import linear_logprobs, ops
from bench.common import CUDA, DRY, Absent, Contestant, Head, compiled, interleave, realistic_head, record

if CUDA:
    SHAPES = [
        (896, 151936, 1024, 0.0), (896, 151936, 4096, 0.0), (2560, 151936, 1024, 0.0),
        (4096, 128256, 64, 0.0), (4096, 128256, 256, 0.0), (4096, 128256, 1024, 0.0), (4096, 128256, 1024, 0.9),
        (4096, 128256, 4096, 0.0), (4096, 128256, 4096, 0.5), (4096, 128256, 16384, 0.0),
    ]  # fmt: skip
    QUICK_SHAPES = [
        (4096, 128256, 1024, 0.0), (896, 151936, 4096, 0.0), (4096, 128256, 4096, 0.0), (4096, 128256, 256, 0.0),
        (2560, 151936, 1024, 0.0),
    ]  # fmt: skip
    ROUNDS, SECONDS = 20, 3.0
else:
    SHAPES = [(256, 32000, 64, 0.0), (256, 32000, 256, 0.0), (512, 32000, 256, 0.5)]
    QUICK_SHAPES = SHAPES[:1]
    ROUNDS, SECONDS = 7, 10.0
if DRY:
    QUICK_SHAPES = [(32, 256, 16, 0.0)]
CHECKED_ROWS = 32
FLOOR = "floor (bare GEMMs)"


def cases() -> list[dict]:
    """BENCH_QUICK=1 keeps what fits a few minutes on a device: forward + backward, five shapes."""
    quick = os.environ.get("BENCH_QUICK") == "1"
    made = []
    for hidden_size, vocab, rows, ignored in QUICK_SHAPES if quick else SHAPES:
        shape = {"hidden_size": hidden_size, "vocab": vocab, "rows": rows, "ignored": ignored}
        for group, trainable in (("ce", False), ("ce", True), ("joint", False)):
            if (group == "joint" and ignored) or (trainable and (quick or rows > 4096)):
                continue
            for mode in ("forward+backward",) if quick else ("forward", "forward+backward"):
                if not (trainable and mode == "forward"):
                    made.append({"group": group, "mode": mode, "trainable": trainable, **shape})
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Losses: hidden [N, H], weight [V, H], labels [N] -> scalar. `joint` takes rows of both orders, stacked.


def eager_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def eager_joint(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_p = F.linear(hidden, weight).float().log_softmax(1)
    p, q = log_p.chunk(2)
    divergence = (p.detach().exp() * (p.detach() - q)).sum(1).mean()
    return F.nll_loss(log_p, labels) + divergence


def our_ce(backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, mass_bound: float | None = None) -> Tensor:
    logprobs, _ = linear_logprobs(hidden, weight, labels, backend=backend, mass_bound=mass_bound)
    return -logprobs.sum() / (labels >= 0).sum()


def our_joint(backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, mass_bound: float | None = None) -> Tensor:
    half = len(hidden) // 2
    first = torch.arange(half, device=hidden.device)
    stats = ops.head(
        hidden, weight, targets=labels[:, None], first=first, second=first + half, detach_first=True,
        mass_bound=mass_bound, backend=backend,
    )  # fmt: skip
    divergence = stats.cross - stats.lse[:half].detach() + stats.lse[half:]
    return (stats.lse - stats.target_logits[:, 0]).mean() + divergence.mean()


def torch_linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def liger_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _peer("liger_kernel.transformers", "liger-kernel").LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def liger_joint(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    liger = _peer("liger_kernel.transformers", "liger-kernel")
    p, q = hidden.chunk(2)
    divergence = liger.LigerFusedLinearJSD(jsd_beta=0.0)(q, weight, p.detach(), weight)
    return liger.LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels) + divergence


def cut_ce(impl: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = {"filter_eps": None} if impl == "exact" else {}
    return _peer("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy(hidden, weight, labels, **options)


def quack_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _peer("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy(hidden, weight, labels)


def trl_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    module = _peer("trl.kernels.chunked_logprob", "trl")
    kept = labels >= 0
    logprobs = module.ChunkedLogProbFunction.apply(
        hidden[kept], weight, None, labels[kept], 1.0, 32768, None, 1.0, ()
    )[0]  # fmt: skip
    return -logprobs.mean()


def trl_joint(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    module = _peer("trl.kernels.chunked_divergence", "trl")
    p, q = hidden.chunk(2)
    divergence, _ = module.ChunkedDivergenceFunction.apply(q, weight, None, p.detach(), weight, None, 0.0)
    return trl_ce(hidden, weight, labels) + divergence.mean()


LOSSES = {
    "ce": {
        "torch eager": eager_ce,
        "F.linear_cross_entropy": torch_linear_ce,
        "Liger": liger_ce,
        "CCE": functools.partial(cut_ce, "cce"),
        "CCE exact": functools.partial(cut_ce, "exact"),
        "QuACK": quack_ce,
        "TRL": trl_ce,
    },
    "joint": {"torch eager": eager_joint, "Liger composition": liger_joint, "TRL composition": trl_joint},
}
OURS = {"ce": our_ce, "joint": our_joint}


def contestants(case: dict, head: Head) -> list[Contestant]:
    losses = dict(LOSSES[case["group"]])
    for backend in ops.BACKENDS:
        losses[f"alro_fast {backend}"] = functools.partial(OURS[case["group"]], backend)
    losses["alro_fast triton, exact"] = functools.partial(OURS[case["group"]], "triton", mass_bound=0.0)
    available = ops.available_backends(head.hidden.device, head.hidden.dtype)
    made = []
    for name, loss in losses.items():
        backend = name.removeprefix("alro_fast ").split(",")[0]
        interpreted = backend == "triton" and not (CUDA or DRY)
        if name.startswith("alro_fast") and (backend not in available or interpreted):
            reason = "needs a GPU" if backend == "triton" else "serves the CPU only" if CUDA else "not built"
            made.append(Contestant(name, functools.partial(_absent, reason)))
        else:
            made.append(Contestant(name, functools.partial(_prepare, case, head, loss)))
    # Prepared before the peers: it forgets every compiled graph, and some of theirs are compiled.
    best = Contestant("torch.compile", lambda: _prepare(case, head, compiled(losses["torch eager"])))
    return [Contestant(FLOOR, functools.partial(_floor, case, head)), best, *made]


def _absent(reason: str):
    raise Absent(reason)


def _prepare(case: dict, head: Head, loss):
    hidden = head.hidden.detach().clone().requires_grad_()
    weight = head.weight.detach()
    if case["trainable"]:
        weight = weight.clone().requires_grad_()

    def run() -> Tensor | None:
        if case["mode"] == "forward":
            with torch.no_grad():
                return loss(hidden, weight, head.labels)
        hidden.grad = weight.grad = None
        loss(hidden, weight, head.labels).backward()
        return hidden.grad

    return run


def _floor(case: dict, head: Head):
    """The products alone, at most 4096 rows at a time."""
    chunks = head.hidden[head.labels >= 0].split(4096)
    z = torch.empty(len(chunks[0]), len(head.weight), dtype=head.hidden.dtype, device=head.hidden.device)

    def run() -> None:
        for chunk in chunks:
            part = z[: len(chunk)]
            torch.mm(chunk, head.weight.T, out=part)
            if case["mode"] != "forward":
                torch.mm(part, head.weight)
            if case["trainable"]:
                torch.mm(part.T, chunk)

    return run


def _peer(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{package} is not installed ({error})") from error


def exact_gradient(case: dict, head: Head) -> Tensor:
    """d hidden [<= 32 of the rows, H] in float64 of the mean loss over all rows (joint: the second order's)."""
    n = len(head.hidden)
    kept = (head.labels >= 0).sum()
    weight = head.weight.double()
    if case["group"] == "ce":
        z = head.hidden[:CHECKED_ROWS].double() @ weight.T
        labels = head.labels[:CHECKED_ROWS]
        grad = z.softmax(1)
        rows = torch.arange(len(labels), device=labels.device)
        grad[rows, labels.clamp(min=0)] -= 1
        return (grad * (labels >= 0)[:, None] / kept) @ weight
    half = n // 2
    p, q = ((part[:CHECKED_ROWS].double() @ weight.T).softmax(1) for part in head.hidden.split(half))
    grad = q / n + (q - p) / half
    labels = head.labels[half : half + CHECKED_ROWS]
    grad[torch.arange(len(labels), device=labels.device), labels] -= 1 / n
    return grad @ weight


@functools.cache
def measured(index: int) -> tuple[dict, dict, dict]:
    """The case, every contestant's outcome, and errors of d hidden relative to the exact one's largest entry."""
    case = cases()[index]
    head = realistic_head(case["rows"], case["hidden_size"], case["vocab"], ignored=case["ignored"])
    outcomes = interleave(contestants(case, head), rounds=ROUNDS, seconds=SECONDS)
    errors = {}
    if case["mode"] != "forward":
        exact = exact_gradient(case, head)
        start = 0 if case["group"] == "ce" else case["rows"] // 2
        for name, outcome in outcomes.items():
            if not isinstance(outcome, str) and outcome.result is not None:
                got = outcome.result[start : start + len(exact)].double()
                errors[name] = float((got - exact).abs().max() / exact.abs().max())
    for name, outcome in outcomes.items():
        if not isinstance(outcome, str):
            outcomes[name] = outcome._replace(result=None)
    return {**case, "entropy": head.entropy, "top1": head.top1}, outcomes, errors


NAMES = {
    group: [FLOOR, *losses, "torch.compile", *(f"alro_fast {backend}" for backend in ops.BACKENDS),
            "alro_fast triton, exact"]
    for group, losses in LOSSES.items()
}  # fmt: skip
ENTRIES = [(index, name) for index, case in enumerate(cases()) for name in NAMES[case["group"]]]


def _label(entry: tuple[int, str]) -> str:
    case = cases()[entry[0]]
    head = "trainable" if case["trainable"] else "frozen"
    shape = f"N{case['rows']}-H{case['hidden_size']}-V{case['vocab']}-ignored{case['ignored']}"
    return f"{case['group']}-{case['mode']}-{head}-{shape}-{entry[1]}"


@pytest.mark.parametrize("entry", ENTRIES, ids=_label)
def test_head(benchmark, entry: tuple[int, str]) -> None:
    case, outcomes, errors = measured(entry[0])
    outcome, floor = outcomes[entry[1]], outcomes[FLOOR]
    benchmark.group = _label((entry[0], ""))
    shares = {}
    if not isinstance(outcome, str) and not isinstance(floor, str):
        shares = {"times_floor": outcome.median / floor.median, "error": errors.get(entry[1])}
        if outcome.peak is not None:
            shares["peak_of_logits"] = outcome.peak / (4 * case["rows"] * case["vocab"])
    record(benchmark, case, entry[1], outcome, **shares)
