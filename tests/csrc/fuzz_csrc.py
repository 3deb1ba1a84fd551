"""Random shapes, strides, dtypes and indices for every function of `alro_fast._cpp`: a result or an exception, never a
crash. Outputs lie between guard zones that must stay as they were.

    python tests/csrc/fuzz_csrc.py --seconds 60 --seed 7
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter

import torch
from torch import Tensor

from alro_fast import _cpp

GUARD = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)


class Guarded:
    """Output tensors inside larger blocks; `check` finds writes outside."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Tensor, int]] = []

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = 1
        for length in shape:
            size *= length
        block = torch.full((size + 2 * GUARD,), 77, dtype=dtype)
        self.blocks.append((block, size))
        return block[GUARD : GUARD + size].view(shape)

    def check(self) -> None:
        for block, size in self.blocks:
            outside = torch.cat([block[:GUARD], block[GUARD + size :]])
            if not (outside == torch.full_like(outside, 77)).all():
                raise SystemExit("an output was written beyond its end")


def some_size(rng: random.Random, most: int = 40) -> int:
    return rng.choice((0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, rng.randint(0, most)))


def matrix(rng: random.Random, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Any strides: whole, transposed, stepped, expanded, offset."""
    layout = rng.randrange(5)
    if layout == 0:
        values = torch.randn(rows, columns)
    elif layout == 1:
        values = torch.randn(columns, rows).T
    elif layout == 2:
        values = torch.randn(2 * rows, 3 * columns)[::2, ::3]
    elif layout == 3:
        values = torch.randn(rows, 1).expand(rows, columns)
    else:
        values = torch.randn(rows + 1, columns + 3)[1:, 2 : 2 + columns]
    scale = rng.choice((0.0, 1.0, 1.0, 1.0, 30.0, 1e6, float("inf"), float("nan")))
    values = values * scale
    if layout in (1, 2) and dtype != torch.float32:  # keep odd strides through the cast
        return values.T.to(dtype).T
    return values.to(dtype)


def spoiled(rng: random.Random, arguments: dict) -> dict:
    """One argument replaced by something else of its kind, or of another."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, Tensor):
        change = rng.randrange(7)
        if change == 0:
            value = value.to(rng.choice(DTYPES))
        elif change == 1 and value.dim():
            value = value.narrow(0, 0, rng.randint(0, value.shape[0]))
        elif change == 2:
            value = value[..., None]
        elif change == 3 and value.dim() > 1:
            value = value.transpose(0, 1)
        elif change == 4 and not value.is_floating_point() and value.numel():
            value = value.clone()
            value.view(-1)[rng.randrange(value.numel())] = rng.choice((-(2**31), -2, -1, 0, 3, 10**6, 2**31 - 1))
        elif change == 5:
            value = torch.empty_like(value, device="meta")
        else:
            value = None
    elif isinstance(value, bool):
        value = rng.choice((None, 2, "yes"))
    elif isinstance(value, (int, float)):
        value = rng.choice((None, -1, 0, 1e300, float("nan"), float("inf"), "one", -5.5))
    else:
        value = rng.choice((None, "", "kl", 3, torch.zeros(2)))
    return {**arguments, name: value}


def head_arguments(rng: random.Random) -> tuple[dict, int, int, int]:
    n, h, v = some_size(rng, 120), max(some_size(rng, 300), rng.randint(0, 1)), some_size(rng, 300)
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16))
    arguments = {
        "hidden": matrix(rng, n, h, dtype),
        "weight": matrix(rng, v, h, dtype),
        "bias": rng.choice((None, torch.randn(v))),
        "softcap": rng.choice((0.0, 0.0, 5.0, 1e-30)),
        "scale": rng.choice((1.0, 0.5, -2.0, 0.0)),
    }
    return arguments, n, h, v


def pair_arguments(rng: random.Random, n: int) -> tuple[dict, int | None]:
    if n == 0 or rng.random() < 0.4:
        return {"first": None, "second": None}, None
    count = some_size(rng, 80)
    first, second = torch.randint(0, n, (count,)), torch.randint(0, n, (count,))
    empty = torch.rand(count) < 0.1
    first[empty] = second[empty] = -1
    return {"first": first, "second": second}, count


def vocab_pass(rng: random.Random, out: Guarded) -> dict:
    head, n, h, _ = head_arguments(rng)
    pairs, count = pair_arguments(rng, n)
    paired = count is not None
    return {
        **head,
        **pairs,
        "entropy": rng.random() < 0.5,
        "mass_bound": rng.choice((0.0, 1e-4, 0.3)),
        "lse": out.new(n),
        "expected": out.new(n, h) if rng.random() < 0.8 else None,
        "cross": out.new(count) if paired else None,
        "mixed": out.new(count, h) if paired and rng.random() < 0.5 else None,
        "spread": out.new(count, h) if paired and rng.random() < 0.5 else None,
        "threads": rng.randint(1, 5),
    }


def weight_grad(rng: random.Random, out: Guarded) -> dict:
    head, n, h, v = head_arguments(rng)
    pairs, count = pair_arguments(rng, n)
    of_pairs = {name: None if count is None else torch.randn(count) for name in ("cross", "grad_first", "grad_second")}
    return {
        **head,
        **pairs,
        "entropy": rng.random() < 0.5,
        "lse": torch.randn(n),
        "grad_lse": torch.randn(n),
        **of_pairs,
        "d_weight": out.new(v, h) if rng.random() < 0.8 else None,
        "d_bias": out.new(v) if rng.random() < 0.5 else None,
        "threads": rng.randint(1, 5),
    }


def gather_indices(rng: random.Random, n: int, v: int) -> tuple[Tensor, Tensor]:
    groups, slots, columns = some_size(rng), some_size(rng), some_size(rng)
    return torch.randint(-1, max(n, 1), (groups, slots)), torch.randint(-1, max(v, 1), (groups, columns))


def gather_logits(rng: random.Random, out: Guarded) -> dict:
    head, n, _, v = head_arguments(rng)
    rows, ids = gather_indices(rng, n, v)
    logits = out.new(*rows.shape, ids.shape[1])
    return {**head, "rows": rows, "ids": ids, "logits": logits, "threads": rng.randint(1, 5)}


def gather_backward(rng: random.Random, out: Guarded) -> dict:
    head, n, h, v = head_arguments(rng)
    del head["bias"]
    rows, ids = gather_indices(rng, n, v)
    return {
        **head,
        "rows": rows,
        "ids": ids,
        "logits": torch.randn(*rows.shape, ids.shape[1]),
        "grad": torch.randn(*rows.shape, ids.shape[1]),
        "d_hidden": out.new(n, h) if rng.random() < 0.8 else None,
        "d_weight": out.new(v, h) if rng.random() < 0.5 else None,
        "d_bias": out.new(v) if rng.random() < 0.5 else None,
        "threads": rng.randint(1, 5),
    }


def listwise(rng: random.Random, out: Guarded) -> dict:
    lists, m = some_size(rng, 30), some_size(rng, 140)
    graded = rng.random() < 0.4
    columns = some_size(rng, 20) if graded else m
    twin = torch.randint(-1, lists, (lists,)) if lists else torch.zeros(0, dtype=torch.long)
    ratings = torch.randn(lists, m) * rng.choice((1.0, 1.0, 1e4))
    ratings[torch.rand(lists, m) < 0.1] = rng.choice((float("nan"), float("inf"), -float("inf")))
    return {
        "logits": matrix(rng, lists * m, columns, torch.float32).contiguous().view(lists, m, columns),
        "ratings": ratings,
        "ranks": torch.randint(1, max(m, 1) + 1, (lists, m)),
        "sizes": torch.randint(0, m + 1, (lists,)),
        "twin": twin,
        "values": torch.randn(columns) if graded else None,
        "gamma": rng.choice((1.0, 10.0, -1.0, 1e30)),
        "sigma": rng.choice((1.0, 0.0, 1e30)),
        "normalise": rng.random() < 0.5,
        "divergence": rng.choice(("none", "kl", "ce", "symmetric")),
        "mask_emitted": rng.random() < 0.5,
        "soft_lambda": out.new(lists),
        "permutation": out.new(lists),
        "expected": out.new(lists, m),
        "d_soft_lambda": out.new(lists, m, columns),
        "d_student": out.new(lists, m, columns),
        "d_teacher": out.new(lists, m, columns) if rng.random() < 0.5 else None,
        "threads": rng.randint(1, 5),
    }


def tree_attention(rng: random.Random, out: Guarded) -> dict:
    kv_heads, group, width = rng.randint(1, 3), rng.randint(1, 4), some_size(rng, 150)
    node_start, node_parent, path = [0], [], [-1]  # nodes in depth-first order, from the root to the last one
    for _ in range(rng.choice((0, 1, 5, rng.randint(0, 40)))):
        del path[rng.randint(1, len(path)) :]
        node_parent.append(path[-1])
        path.append(len(node_start) - 1)
        node_start.append(node_start[-1] + some_size(rng, rng.choice((3, 30, 150))))
    rows = node_start[-1]
    query_row = list(range(rows))
    if rng.random() < 0.5:
        query_row = sorted(rng.choice(query_row) for _ in range(some_size(rng, 60))) if rows else []
    queries = len(query_row)
    heads = kv_heads * group

    def new(count: int, of: int) -> Tensor:
        made = rng.choice((1.0, 1.0, 1e4, float("nan"))) * torch.randn(of, count, width)
        return made.transpose(0, 1) if rng.random() < 0.5 else made.transpose(0, 1).contiguous()

    grads = (new(queries, heads), out.new(queries, heads, width)) if rng.random() < 0.5 else (None, None)
    of_keys = [None if grads[0] is None else out.new(rows, kv_heads, width) for _ in range(2)]
    return {
        "query": new(queries, heads),
        "key": new(rows, kv_heads),
        "value": new(rows, kv_heads),
        "node_start": torch.tensor(node_start),
        "node_parent": torch.tensor(node_parent, dtype=torch.int32),
        "query_row": torch.tensor(query_row, dtype=torch.int32),
        "scale": rng.choice((0.1, 1.0, -1.0, 0.0)),
        "window": rng.choice((0, 0, 1, rng.randint(1, 300), 2**31 - 1)),
        "softcap": rng.choice((0.0, 0.0, 5.0, 1e-30)),
        "out": out.new(queries, heads, width),
        "lse": out.new(queries, heads),
        "grad": grads[0],
        "d_query": grads[1],
        "d_key": of_keys[0],
        "d_value": of_keys[1],
        "threads": rng.randint(1, 5),
    }


def dense_rows(rng: random.Random, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return matrix(rng, rows, columns, dtype).contiguous()


def rms_norm(rng: random.Random, out: Guarded) -> dict:
    rows, columns, dtype = some_size(rng), some_size(rng, 300), rng.choice((torch.float32, torch.bfloat16))
    return {
        "x": matrix(rng, rows, columns, dtype),
        "weight": dense_rows(rng, 1, columns, dtype),
        "eps": rng.choice((1e-6, 0.0, -1.0)),
        "offset": rng.choice((0.0, 1.0)),
        "y": out.new(rows, columns, dtype=dtype),
        "scale": out.new(rows),
        "threads": rng.randint(1, 5),
    }


def rms_norm_backward(rng: random.Random, out: Guarded) -> dict:
    rows, columns, dtype = some_size(rng), some_size(rng, 300), rng.choice((torch.float32, torch.bfloat16))
    return {
        "x": matrix(rng, rows, columns, dtype),
        "weight": dense_rows(rng, 1, columns, dtype),
        "offset": rng.choice((0.0, 1.0)),
        "scale": torch.rand(rows),
        "d_y": dense_rows(rng, rows, columns, dtype),
        "d_x": out.new(rows, columns, dtype=dtype),
        "d_weight": out.new(columns) if rng.random() < 0.5 else None,
        "threads": rng.randint(1, 5),
    }


def gated(rng: random.Random, out: Guarded) -> dict:
    rows, columns, dtype = some_size(rng), some_size(rng, 300), rng.choice((torch.float32, torch.bfloat16))
    return {
        "gate": matrix(rng, rows, columns, dtype),
        "up": matrix(rng, rows, columns, dtype),
        "activation": rng.choice(("silu", "gelu_tanh")),
        "y": out.new(rows, columns, dtype=dtype),
        "threads": rng.randint(1, 5),
    }


def gated_backward(rng: random.Random, out: Guarded) -> dict:
    made = gated(rng, out)
    like, threads = made.pop("y"), made.pop("threads")
    rows, columns = like.shape
    made["d_y"] = dense_rows(rng, rows, columns, like.dtype)
    made["d_gate"] = out.new(rows, columns, dtype=like.dtype)
    made["d_up"] = out.new(rows, columns, dtype=like.dtype)
    return {**made, "threads": threads}


def rotary(rng: random.Random, out: Guarded) -> dict:
    batches, heads, rows, half = rng.randint(0, 3), rng.randint(0, 3), some_size(rng, 60), some_size(rng, 70)
    dtype = rng.choice((torch.float32, torch.bfloat16))
    x = rng.choice((1.0, 1e6, float("nan"))) * torch.randn(batches, rows, heads, 2 * half)
    return {
        "x": rng.choice((x.transpose(1, 2), x.transpose(1, 2).contiguous())).to(dtype),
        "cos": torch.randn(1, rows, 2 * half, dtype=dtype).expand(batches, -1, -1),
        "sin": torch.randn(batches, rows, 2 * half, dtype=dtype),
        "transpose": rng.random() < 0.5,
        "y": out.new(batches, rows, heads, 2 * half, dtype=dtype).transpose(1, 2),
        "threads": rng.randint(1, 5),
    }


FUNCTIONS = (
    vocab_pass,
    weight_grad,
    gather_logits,
    gather_backward,
    listwise,
    tree_attention,
    rms_norm,
    rms_norm_backward,
    gated,
    gated_backward,
    rotary,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    outcomes: Counter = Counter()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        make = rng.choice(FUNCTIONS)
        _cpp.select_instruction_set(rng.choice(("generic", "avx2", "avx512", "avx512_bf16")))
        out = Guarded()
        arguments = make(rng, out)
        if rng.random() < 0.5:
            arguments = spoiled(rng, arguments)
        try:
            getattr(_cpp, make.__name__)(**arguments)
            outcome = "result"
        except (ValueError, TypeError, BufferError, RuntimeError) as error:
            outcome = type(error).__name__
        out.check()
        outcomes[make.__name__, outcome] += 1
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{name:<16} {outcome:<12} {count}")
    unreached = {make.__name__ for make in FUNCTIONS} - {name for name, outcome in outcomes if outcome == "result"}
    if unreached:
        raise SystemExit(f"no call of {', '.join(sorted(unreached))} gave a result")
    results = sum(count for (_, outcome), count in outcomes.items() if outcome == "result")
    refusals = sum(outcomes.values()) - results
    if not (results and refusals):
        raise SystemExit("expected both results and refusals")


if __name__ == "__main__":
    main()
