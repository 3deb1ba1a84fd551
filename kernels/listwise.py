"""Listwise terms and their gradients, one program per list, one launch.

`ranking` form, z [slots k, candidates i]:
    y = log softmax_i(z_k) or z;  P_ki = softmax_k(gamma y_ki);  s_i = sum_k k P_ki
    loss = sum_{r_i > r_j} delta_ij |G_i - G_j| log2(1 + exp(sigma (s_i - s_j)))
    dloss/dy_ki = dloss/ds_i gamma P_ki (k - s_i);  dloss/dz = dloss/dy - softmax(z) sum_i dloss/dy
`ratings` form, z [candidates i, grades c]:
    e_i = sum_c v_c softmax_c(z_i), the same loss with -sigma;  dloss/dz_ic = dloss/de_i softmax_c (v_c - e_i)
    G_i = (2^r_i - 1) / maxDCG,  delta_ij = 1/log2(1 + d) - 1/log2(2 + d),  d = |rank_i - rank_j|
Permutation divergence against list twin[l], teacher P from the twin, student Q from the list: mean over slots (all but
the last; `ratings`: over candidates) of D(P, Q), and d/dz of both sides.

Three passes, CHUNK rows of z or CHUNK candidates at a time: lists of 128 need no more registers than short ones.
Scores (softmax over slots online), pairs, gradients. FLOPs: ~80 R C + 40 M^2 per list. Bytes: 4 R C read three times
(twice from cache), 8 R C written.
"""

import torch
import triton
import triton.language as tl

from .head_tile import register_limit

MAX_SIZE = 128
REGISTERS = 128  # a thread may take: a list of 128 has 16 warps
CHUNK = 8  # rows of logits, and candidates compared with all others, at a time
DIVERGENCES = {"none": 0, "kl": 1, "ce": 2, "symmetric": 3}
_LOWEST = tl.constexpr(-3.0e38)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log_softmax(z, cell):
    z = tl.where(cell, z, _LOWEST)
    z -= tl.max(z, axis=1)[:, None]
    return z - tl.log(tl.sum(tl.where(cell, tl.exp(z), 0.0), axis=1))[:, None]


@triton.jit
def _log2_1p_exp(x):
    """log2(1 + exp(x)) without overflow, and without losing exp(x) where it is small."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return (tl.maximum(x, 0.0) + log1p) / _LN2


@triton.jit
def _scores(
    logits, value, expected, c, size, width, size_c, gamma,
    BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, RANKING: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Pass 1. Stores s (softmax over slots online) or e; returns column_max, column_sum and s by column [BLOCK_C].

    In the `ratings` form a row is finished once it is read, and the three returned are not used.
    """
    column_max = tl.full((BLOCK_C,), _LOWEST, tl.float32)
    column_sum = tl.zeros((BLOCK_C,), tl.float32)
    column_rank = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, size, CHUNK):
        r = start + tl.arange(0, CHUNK)
        cell = (r < size)[:, None] & (c < width)[None, :]
        z = tl.load(logits + r[:, None] * size_c + c[None, :], mask=cell, other=0.0)
        if RANKING:
            y = tl.where(cell, gamma * (_log_softmax(z, cell) if NORMALISE else z), _LOWEST)
            new_max = tl.maximum(column_max, tl.max(y, axis=0))
            over = tl.where(cell, tl.exp(y - new_max[None, :]), 0.0)
            decay = tl.exp(column_max - new_max)
            column_sum = column_sum * decay + tl.sum(over, axis=0)
            column_rank = column_rank * decay + tl.sum(over * (r + 1).to(tl.float32)[:, None], axis=0)
            column_max = new_max
        else:
            p = tl.where(cell, tl.exp(_log_softmax(z, cell)), 0.0)
            tl.store(expected + r, tl.sum(p * value[None, :], axis=1), mask=r < size)
    if RANKING:
        column_sum = tl.where(c < size, column_sum, 1.0)
        column_rank = column_rank / column_sum
        tl.store(expected + c, column_rank, mask=c < size)
    return column_max, column_sum, column_rank


@triton.jit
def _gains(ratings, i, size, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """rating (0 where there is none), whether there is one, gain 2^r - 1 [BLOCK_M]; 1 / the list's ideal DCG."""
    rating = tl.load(ratings + i, mask=i < size, other=float("nan"))
    graded = rating == rating
    rating = tl.where(graded, rating, 0.0)
    gain = tl.where(graded, tl.exp2(rating) - 1.0, 0.0)
    # A candidate's ideal position is the number of candidates ahead of it: nothing is sorted.
    ahead = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, size, CHUNK):
        j = start + tl.arange(0, CHUNK)
        rating_j = tl.load(ratings + j, mask=j < size, other=float("nan"))
        tied = (rating_j[None, :] == rating[:, None]) & (j[None, :] < i[:, None])
        ahead += tl.sum(((rating_j[None, :] > rating[:, None]) | tied).to(tl.float32), axis=1)
    ideal = tl.sum(gain / tl.log2(2.0 + ahead), axis=0)
    return rating, graded, gain, 1.0 / tl.where(ideal > 0, ideal, 1.0)


@triton.jit
def _pairs(ratings, ranks, expected, i, size, direction, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """Pass 2. Each candidate's part of the loss, and dloss/ds or dloss/de [BLOCK_M], from pairs with different ratings.

    Candidate i is pulled where it is the better one and pushed where j is; the loss counts a pair once, at its better.
    """
    rating, graded, gain, norm = _gains(ratings, i, size, BLOCK_M, CHUNK)
    own_rank = tl.load(ranks + i, mask=i < size, other=0)
    own = tl.load(expected + i, mask=i < size, other=0.0)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    pull = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, size, CHUNK):
        j = start + tl.arange(0, CHUNK)
        rating_j = tl.load(ratings + j, mask=j < size, other=float("nan"))
        graded_pair = graded[:, None] & (rating_j == rating_j)[None, :]
        rating_j = tl.where(rating_j == rating_j, rating_j, 0.0)
        i_better = (graded_pair & (rating[:, None] > rating_j[None, :])).to(tl.float32)
        j_better = (graded_pair & (rating[:, None] < rating_j[None, :])).to(tl.float32)
        sign = i_better - j_better
        distance = tl.abs(own_rank[:, None] - tl.load(ranks + j, mask=j < size, other=0)[None, :])
        distance = tl.maximum(distance, 1).to(tl.float32)
        weight = (1.0 / tl.log2(1.0 + distance) - 1.0 / tl.log2(2.0 + distance)) * norm
        weight *= tl.abs((tl.exp2(rating_j) - 1.0)[None, :] - gain[:, None])
        other = tl.load(expected + j, mask=j < size, other=0.0)
        margin = sign * direction * (own[:, None] - other[None, :])
        loss += tl.sum(i_better * weight * _log2_1p_exp(margin), axis=1)
        pull += tl.sum(sign * weight * tl.sigmoid(margin), axis=1)
    return loss, pull * (direction / _LN2)


@triton.jit
def _divergence(log_p, log_q, both, DIVERGENCE: tl.constexpr):
    """D(P, Q) of each row, its gradients in the logits of Q (student) and of P (teacher); both: columns they share."""
    p = tl.where(both, tl.exp(log_p), 0.0)
    q = tl.where(both, tl.exp(log_q), 0.0)
    if DIVERGENCE == 2:
        surprise = tl.where(both, log_q, 0.0)
        distance = -tl.sum(p * surprise, axis=1)
        student = q - p
        teacher = -p * (surprise + distance[:, None])
    else:
        ratio = tl.where(both, log_p - log_q, 0.0)
        distance = tl.sum(p * ratio, axis=1)
        student = q - p
        teacher = p * (ratio - distance[:, None])
        if DIVERGENCE == 3:
            reverse = -tl.sum(q * ratio, axis=1)
            teacher = 0.5 * (teacher - student)
            student = 0.5 * (student - q * (ratio + reverse[:, None]))
            distance = 0.5 * (distance + reverse)
    return distance, student, teacher


@triton.jit(do_not_specialize=["size_m", "size_r", "size_c"])
def listwise_kernel(
    logits, ratings, ranks, sizes, twin, values, soft_lambda, permutation, expected, pull_out, d_soft_lambda, d_student,
    d_teacher, size_m, size_r, size_c, gamma, sigma,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, RANKING: tl.constexpr, NORMALISE: tl.constexpr,
    DIVERGENCE: tl.constexpr, DETACH: tl.constexpr, MASK_EMITTED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    size = tl.load(sizes + index)
    c = tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_M)
    width = size if RANKING else size_c  # columns this list uses
    offset = index * size_r * size_c
    ratings += index * size_m
    expected += index * size_m
    pull_out += index * size_m
    value = tl.zeros((BLOCK_C,), tl.float32) if RANKING else tl.load(values + c, mask=c < size_c, other=0.0)

    column_max, column_sum, column_rank = _scores(
        logits + offset, value, expected, c, size, width, size_c, gamma, BLOCK_C, CHUNK, RANKING, NORMALISE
    )
    tl.debug_barrier()  # `expected` is read back below
    tl.store(expected + i, 0.0, mask=(i >= size) & (i < size_m))

    # The loss grows where the better candidate's rank is the higher number, or its grade the lower one.
    direction = sigma if RANKING else -sigma
    loss, pull = _pairs(ratings, ranks + index * size_m, expected, i, size, direction, BLOCK_M, CHUNK)
    tl.store(soft_lambda + index, tl.sum(loss, axis=0))
    tl.store(pull_out + i, pull, mask=i < size_m)
    tl.debug_barrier()  # `pull_out` is read back below

    # Pass 3. Gradients of the logits, and the divergence from the twin.
    teacher = tl.load(twin + index)
    paired = (teacher >= 0).to(tl.float32)  # without a twin the list stands in for it, with weight 0
    teacher = tl.where(teacher >= 0, teacher, index)
    teacher_size = tl.load(sizes + teacher)
    if RANKING:
        pull_c = tl.load(pull_out + c, mask=c < size, other=0.0)
        rank = tl.load(ranks + index * size_m + c, mask=c < size, other=0)
        teacher_rank = tl.load(ranks + teacher * size_m + c, mask=c < teacher_size, other=0)
        compared_count = tl.maximum(size - 1, 1).to(tl.float32)
    else:
        compared_count = tl.maximum(size, 1).to(tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, size_r, CHUNK):
        r = start + tl.arange(0, CHUNK)
        inside = (r < size_r)[:, None] & (c < size_c)[None, :]
        cell = (r < size)[:, None] & (c < width)[None, :]
        at = r[:, None] * size_c + c[None, :]
        z = tl.load(logits + offset + at, mask=cell, other=0.0)
        log_q = _log_softmax(z, cell)
        if RANKING:
            y = tl.where(cell, gamma * (log_q if NORMALISE else z), _LOWEST)
            over = tl.where(cell, tl.exp(y - column_max[None, :]), 0.0) / column_sum[None, :]
            grad = pull_c[None, :] * gamma * over * ((r + 1).to(tl.float32)[:, None] - column_rank[None, :])
            if NORMALISE:
                grad -= tl.where(cell, tl.exp(log_q), 0.0) * tl.sum(grad, axis=1)[:, None]
        else:
            pull_r = tl.load(pull_out + r, mask=r < size, other=0.0)
            score = tl.load(expected + r, mask=r < size, other=0.0)
            p = tl.where(cell, tl.exp(log_q), 0.0)
            grad = pull_r[:, None] * p * (value[None, :] - score[:, None])
        tl.store(d_soft_lambda + offset + at, grad, mask=inside)

        if DIVERGENCE == 0:
            tl.store(d_student + offset + at, tl.zeros((CHUNK, BLOCK_C), tl.float32), mask=inside)
        else:
            other_cell = (r < teacher_size)[:, None] & (c < size_c)[None, :]
            if RANKING:
                other_cell = (r < teacher_size)[:, None] & (c < teacher_size)[None, :]
                if MASK_EMITTED:  # a slot compares what is left to name: candidates of this rank or later
                    cell = cell & (rank[None, :] > r[:, None])
                    other_cell = other_cell & (teacher_rank[None, :] > r[:, None])
                    log_q = _log_softmax(z, cell)
                mean = tl.where(r < size - 1, paired / compared_count, 0.0)  # the last slot has nothing to choose
            else:
                mean = tl.where(r < size, paired / compared_count, 0.0)
            z_p = tl.load(logits + teacher * size_r * size_c + at, mask=other_cell, other=0.0)
            distance, student, side = _divergence(_log_softmax(z_p, other_cell), log_q, cell & other_cell, DIVERGENCE)
            total += distance * mean
            tl.store(d_student + offset + at, student * mean[:, None], mask=inside)
            if not DETACH:
                tl.store(d_teacher + offset + at, side * mean[:, None], mask=inside)
    tl.store(permutation + index, tl.sum(total, axis=0))


def listwise(
    logits: torch.Tensor,
    ratings: torch.Tensor,
    ranks: torch.Tensor,
    sizes: torch.Tensor,
    twin: torch.Tensor,
    values: torch.Tensor | None,
    *,
    gamma: float,
    sigma: float,
    normalise: bool,
    divergence: str,
    detach: bool,
    mask_emitted: bool,
) -> tuple[torch.Tensor, ...]:
    """soft_lambda, permutation [L], expected [L, M], d_soft_lambda, d_student, d_teacher [L, R, C] (None if detached).

    logits [L, R, C] float32; ratings [L, M] float32, NaN = ungraded; ranks [L, M], sizes [L], twin [L] int64; values
    [C] float32 for the `ratings` form, None for the `ranking` form. M, R, C <= 128.
    """
    length, size_r, size_c = logits.shape
    size_m = ratings.shape[1]
    if max(size_m, size_r, size_c) > MAX_SIZE:
        raise ValueError(f"lists of {size_m} candidates, {size_r} x {size_c} logits; expected at most {MAX_SIZE}")
    if logits.dtype != torch.float32:
        raise ValueError(f"logits are {logits.dtype}; expected float32")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; expected one of {', '.join(DIVERGENCES)}")
    logits, ratings, ranks = logits.contiguous(), ratings.contiguous(), ranks.contiguous()
    has_teacher = divergence != "none" and not detach
    soft_lambda, permutation = logits.new_empty(length), logits.new_empty(length)
    expected, pull = logits.new_empty(length, size_m), logits.new_empty(length, size_m)
    d_soft_lambda, d_student = torch.empty_like(logits), torch.empty_like(logits)
    d_teacher = torch.empty_like(logits) if has_teacher else None
    if length:
        block_m, block_c = (max(triton.next_power_of_2(size), 16) for size in (size_m, size_c))
        listwise_kernel[(length,)](
            logits, ratings, ranks, sizes, twin, logits if values is None else values, soft_lambda, permutation,
            expected, pull, d_soft_lambda, d_student, logits if d_teacher is None else d_teacher, size_m, size_r,
            size_c, gamma, sigma, BLOCK_M=block_m, BLOCK_C=block_c, CHUNK=CHUNK, RANKING=values is None,
            NORMALISE=normalise, DIVERGENCE=DIVERGENCES[divergence], DETACH=detach, MASK_EMITTED=mask_emitted,
            num_warps=num_warps(max(block_m, block_c)), **register_limit(REGISTERS),
        )  # fmt: skip
    return soft_lambda, permutation, expected, d_soft_lambda, d_student, d_teacher


def num_warps(block: int) -> int:
    """Warps for a list whose tiles are CHUNK x block."""
    return max(block // 8, 1)
