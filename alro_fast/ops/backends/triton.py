"""The backend for CUDA (and ROCm) devices: Triton kernels and library GEMMs; functions and contracts as in `eager`.

Two engines serve `vocab_pass`; `kernels/configs.py` says which, per architecture, hidden size and rows:

    tiled  a tile of 4k-8k vocabulary columns at a time: library GEMM -> row kernel -> GEMM into U, all in one buffer
           that stays in L2: of many rows without pairs 2k at a time. 2 products with the vocabulary per row with U, 1
           without. With mass_bound > 0 the second product takes only the sub-tiles of 128 columns that matter.
    fused  statistics in one kernel, no logits stored, then U from the tiles that matter, logits recomputed:
           1 + 2 f products for a kept share f. Serves statistics without U for few rows.

Skipping measures a tile's mass against the log-sum-exp seen so far, so tiles before the heavy ones look heavier than
they are. From 256 rows on, `_floor` first finds heavy columns from a few rows and bounds every row's log-sum-exp from
below; the logits of those rows are kept for the main pass, so they are computed once. Peaked rows (99.99 % of the mass
in 1 % of the tiles) then take at most 1.2 products each. Fewer rows are not worth a reading of the vocabulary more:
they take 1 to 2 products, the more the later the heavy tiles lie.

Nothing here synchronises with the device. With TRITON_INTERPRET=1 set before Triton is imported everything runs on the
CPU, which is how the tests check it. `count_gemm_work` counts products with the vocabulary.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import triton
from torch import Tensor

from ...kernels import configs, expected, gather, row_kernel, vocab_stats
from ...kernels import listwise as listwise_kernel
from . import gemm_work
from .eager import Listwise, PairedVocabPass, VocabPass
from .gemm_work import count_gemm_work as count_gemm_work
from .serves import Serves

log = logging.getLogger(__name__)

SERVES = Serves(
    devices=("cuda", "cpu"),  # the CPU through Triton's interpreter
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    divergences=tuple(listwise_kernel.DIVERGENCES),
    longest_list=listwise_kernel.MAX_SIZE,
)
HOT_COLUMNS = 512  # heavy columns that bound a row's log-sum-exp from below


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of this device and dtype here, in a few words; None: it can."""
    declined = SERVES.declines_tensors(device, dtype)
    if declined is not None:
        return declined
    if device.type == "cpu":
        return None if triton.knobs.runtime.interpret else "Triton runs on the CPU only with TRITON_INTERPRET=1"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    needs = "its kernels need compute capability 8.0 or later, and 99 KB of shared memory for a block"
    return None if architecture(device) is not None else needs


def vocab_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    *,
    want_expected: bool,
    mass_bound: float,
    engine: str | None = None,
    config: configs.HeadConfig | None = None,
) -> VocabPass:
    """`eager.vocab_pass`; `engine` ("tiled" or "fused") and `config` override the table, for tests and benchmarks."""
    config = config or _config(hidden)
    head = hidden, weight, bias, softcap, scale
    if (engine or ("tiled" if want_expected or len(hidden) > config.stats_rows else "fused")) == "fused":
        passed = _fused(*head, None, None, False, want_expected, mass_bound, config)
        return VocabPass(passed.lse, passed.expected)
    rows, size_h = hidden.shape
    lse = hidden.new_empty(rows, dtype=torch.float32)
    sums = hidden.new_zeros(rows, size_h, dtype=torch.float32) if want_expected else None
    for start, stop in _chunks(rows, config.chunk):
        passed = _tiled(
            hidden[start:stop], weight, bias, softcap, scale, None, None, False, want_expected, False, False,
            mass_bound, config, sums=None if sums is None else sums[start:stop],
        )  # fmt: skip
        lse[start:stop] = passed.lse
    return VocabPass(lse, sums)


def paired_vocab_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor,
    second: Tensor,
    *,
    entropy: bool,
    want_expected: bool,
    want_spread: bool,
    mass_bound: float,
    engine: str | None = None,
    config: configs.HeadConfig | None = None,
) -> PairedVocabPass:
    """`eager.paired_vocab_pass`; `engine` and `config` as in `vocab_pass`."""
    config = config or _config(hidden)
    head = hidden, weight, bias, softcap, scale
    want_mixed = want_expected and softcap is not None
    if engine is None:
        engine = "fused" if not want_expected and not want_spread and len(hidden) <= config.stats_rows else "tiled"
    if engine == "fused" and not want_mixed and not want_spread:
        return _fused(*head, first, second, entropy, want_expected, mass_bound, config)
    return _tiled(*head, first, second, entropy, want_expected, want_mixed, want_spread, mass_bound, config)


def weight_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    lse: Tensor,
    grad_lse: Tensor,
    *,
    want_weight: bool,
    want_bias: bool,
    config: configs.HeadConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`eager.weight_grad`: logits recomputed tile by tile, their gradients in the dtype of `hidden`."""
    return _weight_grad(
        hidden, weight, bias, softcap, scale, None, None, lse, None, grad_lse, None, None, False, want_weight,
        want_bias, config,
    )  # fmt: skip


def paired_weight_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor,
    second: Tensor,
    lse: Tensor,
    cross: Tensor,
    grad_lse: Tensor,
    grad_first: Tensor,
    grad_second: Tensor,
    *,
    entropy: bool,
    want_weight: bool,
    want_bias: bool,
    config: configs.HeadConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`eager.paired_weight_grad`, as `weight_grad`."""
    return _weight_grad(
        hidden, weight, bias, softcap, scale, first, second, lse, cross, grad_lse, grad_first, grad_second, entropy,
        want_weight, want_bias, config,
    )  # fmt: skip


def gather_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float, rows: Tensor, ids: Tensor
) -> Tensor:
    """`eager.gather_logits`."""
    logits: Tensor = gather.gather_logits(hidden, weight, bias, softcap, scale, rows, ids)
    return logits


def gather_backward(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None,
    scale: float,
    rows: Tensor,
    ids: Tensor,
    logits: Tensor,
    grad: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """`eager.gather_backward`."""
    gather.gather_backward(hidden, weight, softcap, scale, rows, ids, logits, grad, d_hidden, d_weight, d_bias)


def listwise(
    logits: Tensor,
    ratings: Tensor,
    ranks: Tensor,
    sizes: Tensor,
    twin: Tensor,
    values: Tensor | None,
    *,
    gamma: float,
    sigma: float,
    normalise: bool,
    divergence: str,
    detach: bool,
    mask_emitted: bool,
) -> Listwise:
    """`eager.listwise` in one launch; at most 128 candidates per list and 128 grades."""
    return Listwise(
        *listwise_kernel.listwise(
            logits, ratings, ranks, sizes, twin, values, gamma=gamma, sigma=sigma, normalise=normalise,
            divergence=divergence, detach=detach, mask_emitted=mask_emitted,
        )
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Engines.


def _fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor | None,
    second: Tensor | None,
    entropy: bool,
    want_expected: bool,
    mass_bound: float,
    config: configs.HeadConfig,
) -> PairedVocabPass:
    rows = len(hidden)
    stats = vocab_stats.vocab_stats(
        hidden, weight, bias, softcap, scale, first, second, entropy=entropy, tile_stats=want_expected,
        single=config.single, paired=config.paired,
    )  # fmt: skip
    multiplied = rows if first is None or second is None or not len(first) else (rows, first, second)
    gemm_work.count("logits", multiplied, weight.shape[0])
    embedding = None
    if want_expected:
        embedding, kept = expected.expected(
            hidden, weight, bias, softcap, scale, stats.lse, stats.row_max, stats.tile_lse, mass_bound, config.expected
        )
        for kind in ("logits again", "embedding"):
            gemm_work.count_kept(kind, kept, rows, weight.shape[0], config.expected)
    return PairedVocabPass(stats.lse, embedding, stats.cross, None, None)


def _tiled(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor | None,
    second: Tensor | None,
    entropy: bool,
    want_expected: bool,
    want_mixed: bool,
    want_spread: bool,
    mass_bound: float,
    config: configs.HeadConfig,
    *,
    sums: Tensor | None = None,
) -> PairedVocabPass:
    """The tiled engine: one buffer of [N, T] products that every tile of the vocabulary goes through in turn.

    A tile takes three steps: its products (GEMM); the row kernel, which turns them into p~ = exp(z - row maximum so
    far) and carries the statistics along; p~ @ W, added to the sums. What was summed under an older maximum is rescaled
    by the row kernel where the maximum moves; dividing by the final sum comes last.

    sums: zeros [N, H] float32, contiguous, to make `expected` in. Rows of pairs, which meet, come all in one call.
    """
    rows, size_h = hidden.shape
    size_v = weight.shape[0]
    pair_count = None if first is None else len(first)
    pairs = None if first is None or rows == 0 else row_kernel.pair_table(first, second, rows)
    skipping = want_expected and mass_bound > 0 and rows > 0
    running = row_kernel.new_running(
        rows, size_h, pair_count, hidden.device, expected=want_expected and sums is None, tile_stats=skipping,
        mixed=want_mixed, spread=want_spread,
    )  # fmt: skip
    running = running._replace(sums=running.sums if sums is None else sums)
    columns = min(config.columns, triton.next_power_of_2(size_v))
    # p~ takes the bytes of the products it came from, but for pairs: their first row reads the second's products, which
    # another program would have overwritten.
    products, p = _tile_buffers(hidden, columns, shared=pairs is None)
    mixed_out, spread_out = (
        hidden.new_zeros(len(first), columns) if wanted and first is not None else None
        for wanted in (want_mixed, want_spread)
    )
    sub = config.expected.block_v  # skipping drops columns by this many, the width of a tile of `expected`'s kernels
    probe: Tensor | None = None
    floor: Tensor | None = None
    tile_lse: Any = None
    selection: Any = None
    if skipping:
        tile_lse = running.row_max.new_empty(rows, triton.cdiv(columns, sub))
        selection = expected.new_selection(rows, tile_lse.shape[1], config.expected.block_m, hidden.device)
        if 0 < config.probe_rows < rows:
            probe, floor = _floor(hidden, weight, bias, softcap, scale, config.probe_rows, columns)

    known = 0 if probe is None else len(probe)
    for start, stop in _tiles(size_v, columns) if rows else ():
        width = stop - start
        tile, w = products[:, :width], weight[start:stop]
        if probe is not None:  # the products of the first rows are known from the search for heavy columns
            tile[:known] = probe[:, start:stop]
        _product(hidden[known:], w.T, tile[known:])
        gemm_work.count("logits", rows - known, width)
        parts = triton.cdiv(width, sub)
        row_kernel.advance(
            tile, p[:, :width] if want_expected else None, running, bias, softcap, scale, start, pairs=pairs,
            entropy=entropy, tile_lse=tile_lse[:, :parts] if skipping else None, sub=sub,
            mixed_out=mixed_out, spread_out=spread_out,
        )  # fmt: skip
        if skipping:
            expected.select(
                selection, tile_lse[:, :parts], running.row_lse, floor, mass_bound, block_m=config.expected.block_m,
                first_tile=start // sub, all_tiles=triton.cdiv(size_v, sub),
            )  # fmt: skip
            expected.accumulate(p[:, :width], w, selection, running.sums, config.expected, packed=False)
            gemm_work.count_kept("embedding", selection.kept_count, rows, width, config.expected)
        elif want_expected:
            _add_product(p[:, :width], w, running.sums)
            gemm_work.count("embedding", rows, width)
        for out, of_pairs in ((mixed_out, running.mixed), (spread_out, running.spread)):
            if out is not None and pair_count is not None:
                _add_product(out[:, :width], w, of_pairs)
                gemm_work.count("pairs", pair_count, width)

    # Sums are of p~ and unscaled columns: U = scale * sum / row_sum; a pair's by its first row, the teacher.
    factor = scale / running.row_sum
    if want_expected:
        running.sums.mul_(factor[:, None])
    if pairs is not None and first is not None:
        row = first.clamp(min=0)  # a pad's sums are zeros, whatever they are divided by
        running.cross.div_(running.row_sum[row])
        for of_pairs in (running.mixed, running.spread):
            if of_pairs is not None:
                of_pairs.mul_(factor[row][:, None])
    return PairedVocabPass(
        running.row_max + running.row_sum.log(), running.sums, running.cross, running.mixed, running.spread
    )


def _weight_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: Tensor | None,
    second: Tensor | None,
    lse: Tensor,
    cross: Tensor | None,
    grad_lse: Tensor,
    grad_first: Tensor | None,
    grad_second: Tensor | None,
    entropy: bool,
    want_weight: bool,
    want_bias: bool,
    config: configs.HeadConfig | None,
) -> tuple[Tensor | None, Tensor | None]:
    rows, size_h = hidden.shape
    size_v = weight.shape[0]
    config = config or _config(hidden)
    d_weight = hidden.new_zeros(size_v, size_h, dtype=torch.float32) if want_weight else None
    d_bias = hidden.new_zeros(size_v, dtype=torch.float32) if want_bias else None
    if rows == 0:
        return d_weight, d_bias
    grad_lse = grad_lse.contiguous()
    by_first = by_second = None
    if first is not None and grad_first is not None and grad_second is not None:
        by_first = row_kernel.pair_table(first, second, rows)
        by_second = row_kernel.pair_table(second, first, rows)
        grad_first, grad_second = grad_first.contiguous(), grad_second.contiguous()
    factor = _gradient_factor(hidden.dtype, scale, grad_lse, grad_first, grad_second)
    columns = min(config.columns, row_kernel.GRAD_COLUMNS)
    products, grad = _tile_buffers(hidden, columns, shared=first is None)
    for start, stop in _tiles(size_v, columns):
        width = stop - start
        _product(hidden, weight[start:stop].T, products[:, :width])
        row_kernel.differentiate(
            products[:, :width], grad[:, :width], bias, softcap, scale, start, lse, grad_lse, factor,
            by_first=by_first, by_second=by_second, cross=cross, grad_first=grad_first, grad_second=grad_second,
            entropy=entropy,
        )  # fmt: skip
        if d_weight is not None:
            _product(grad[:, :width].T, hidden, d_weight[start:stop])
        if d_bias is not None:
            torch.sum(grad[:, :width], dim=0, dtype=torch.float32, out=d_bias[start:stop])
    undo = scale / factor
    return None if d_weight is None else d_weight.mul_(undo), None if d_bias is None else d_bias.mul_(undo)


def _floor(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    probe_rows: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """All products of the first rows [R, V], and a lower bound of every row's log-sum-exp [N] from heavy columns."""
    size_v = weight.shape[0]
    # Rows 64 bytes apart or a multiple: libraries have no aligned kernel for a vocabulary that is odd.
    probe = hidden.new_empty(probe_rows, triton.cdiv(size_v, 16) * 16, dtype=torch.float32)[:, :size_v]
    for start, stop in _tiles(size_v, columns):
        _product(hidden[:probe_rows], weight[start:stop].T, probe[:, start:stop])
    gemm_work.count("logits", probe_rows, size_v)
    heavy = torch.softmax(_to_logits(probe, bias, softcap, scale), dim=1).amax(dim=0)
    hot = heavy.topk(min(HOT_COLUMNS, max(size_v // 256, 1))).indices
    few = hidden.new_empty(len(hidden), len(hot), dtype=torch.float32)
    _product(hidden, weight[hot].T, few)
    gemm_work.count("heavy columns", len(hidden), len(hot))
    few = _to_logits(few, None if bias is None else bias[hot], softcap, scale)
    return probe, torch.logsumexp(few, dim=1)


def _to_logits(products: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    z = products * scale if bias is None else (products + bias.float()) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _gradient_factor(dtype: torch.dtype, scale: float, first: Tensor, *others: Tensor | None) -> Tensor:
    """What to multiply a tile's gradients by before rounding: a power of two that makes the largest upstream one about
    1 in float16, whose range per-token means would leave; the scale of the logits alone in other dtypes."""
    if dtype != torch.float16:
        return torch.full((), scale, dtype=torch.float32, device=first.device)
    top = torch.stack([grad.abs().amax() for grad in (first, *others) if grad is not None and grad.numel()]).amax()
    return torch.exp2(-torch.floor(torch.log2(top.clamp(min=1e-30))))


def _tile_buffers(hidden: Tensor, columns: int, *, shared: bool) -> tuple[Tensor, Tensor]:
    """products [N, T] float32 and, in hidden's dtype, [N, T] over the same bytes (shared) or beside them."""
    products = hidden.new_empty(len(hidden), columns, dtype=torch.float32)
    if shared:
        return products, products.view(hidden.dtype)[:, :columns]
    return products, hidden.new_empty(len(hidden), columns)


def _chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """Ranges of at most `most` rows, all of one size but the last, so that none is a few rows alone."""
    size = triton.cdiv(triton.cdiv(rows, max(triton.cdiv(rows, most), 1)), 64) * 64
    return [(start, min(start + min(size, most), rows)) for start in range(0, rows, min(size, most) or 1)]


def _tiles(size_v: int, columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + columns, size_v)) for start in range(0, size_v, columns)]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in float32, whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _add_product(a: Tensor, b: Tensor, total: Tensor) -> None:
    """total += a @ b in float32, whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif _addmm_widens(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        product = torch.empty_like(total)
        _product(a, b, product)
        total.add_(product)


@functools.cache
def _addmm_widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether addmm adds products of half-precision matrices to a float32 one; older torch wants one dtype."""
    a, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError as reason:
        log.info("addmm of %s into float32 on %s: a product, then a sum (%s)", dtype, device, str(reason)[:120])
        return False
    return True


def _config(hidden: Tensor) -> configs.HeadConfig:
    return configs.head_config(architecture(hidden.device), hidden.shape[1], len(hidden), hidden.element_size())


@functools.cache
def architecture(device: torch.device) -> str | None:
    """The table's name for a device; None: too old."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    got: Any = torch.cuda.get_device_properties(device)
    shared = getattr(got, "shared_memory_per_block_optin", None)
    return configs.cuda_architecture(got.major, got.minor, shared)  # type: ignore[no-any-return]
