from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, HALF_ROUNDING, Head, head
from kernel_strategies import examples, heads
from list_tensors import own_labels, random_list_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from alro_fast.losses import alro as losses
from alro_fast.ops.backends import eager

backend = pytest.importorskip("alro_fast.ops.backends.triton")
from alro_fast.ops.backends.gemm_work import count_gemm_work  # noqa: E402 - both need Triton
from alro_fast.ops.backends.warmup import warmup  # noqa: E402


def run(case: Head, **options) -> eager.VocabPass | eager.PairedVocabPass:
    options = {"want_expected": True, "mass_bound": 0.0, **options}
    of_pairs = {"entropy": options.pop("entropy", True), "want_spread": options.pop("want_spread", False)}
    if case.first is None:
        return backend.vocab_pass(*case.arguments, **options)
    return backend.paired_vocab_pass(*case.arguments, case.first, case.second, **of_pairs, **options)


@examples(20)
@given(case=heads(), entropy=st.booleans(), engine=st.sampled_from(["tiled", "fused"]), want_spread=st.booleans())
def test_vocab_pass_equals_its_definition(case: Head, entropy: bool, engine: str, want_spread: bool) -> None:
    config = backend._config(case.hidden)._replace(columns=64)
    got = run(case, entropy=entropy, engine=engine, want_spread=want_spread, config=config)
    z, dtype = case.logits(), case.hidden.dtype
    assert torch.allclose(got.lse.double(), z.logsumexp(1), atol=1e-5, rtol=1e-5)
    assert ((got.expected - case.expected()).abs() <= case.expected_error(dtype)).all()
    if case.first is None:
        return
    size = float(z.abs().max())
    assert torch.allclose(got.cross.double(), case.cross(entropy), atol=2e-5 * size)
    mixed, spread = case.pair_sums(entropy)
    rounding = (HALF_ROUNDING[dtype] + 1e-5) * float(case.weight.abs().max())
    assert (got.mixed is not None) == (case.softcap is not None)
    if got.mixed is not None:
        assert torch.allclose(got.mixed.double(), mixed, atol=2 * rounding)
    assert (got.spread is not None) == want_spread
    if want_spread:
        assert torch.allclose(got.spread.double(), spread, atol=4 * size * rounding)


@examples(10)
@given(case=heads(), entropy=st.booleans(), want_weight=st.booleans(), want_bias=st.booleans())
def test_weight_grad_equals_float64(case: Head, entropy: bool, want_weight: bool, want_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = 0 if case.first is None else len(case.first)
    # Upstream gradients of a mean over many tokens: far below what float16 can hold.
    grad_lse, grad_first, grad_second = (
        torch.randn(size, generator=generator).to(DEVICE) * 1e-6 for size in (len(case.hidden), pairs, pairs)
    )
    exact = [None if x is None else x.double() for x in (case.hidden, case.weight, case.bias)]
    lse = case.logits().logsumexp(1)
    cross = case.cross(entropy) if pairs else None
    options = {"want_weight": want_weight, "want_bias": want_bias}
    exact = *exact, case.softcap, case.scale
    if pairs:
        upstream = grad_lse, grad_first, grad_second
        sides = case.first, case.second
        got = backend.paired_weight_grad(
            *case.arguments, *sides, lse.float(), cross.float(), *upstream, entropy=entropy, **options
        )
        upstream = (x.double() for x in upstream)
        wanted = eager.paired_weight_grad(*exact, *sides, lse, cross, *upstream, entropy=entropy, **options)
    else:
        got = backend.weight_grad(*case.arguments, lse.float(), grad_lse, **options)
        wanted = eager.weight_grad(*exact, lse, grad_lse.double(), **options)
    for mine, reference in zip(got, wanted):
        assert (mine is None) == (reference is None)
        if mine is not None:
            bound = (4 * HALF_ROUNDING[case.hidden.dtype] + 1e-4) * float(reference.abs().max()) + 1e-12
            assert torch.allclose(mine.double(), reference, atol=bound, rtol=0)


def test_gradients_of_a_mean_over_many_tokens_fit_float16() -> None:
    """Upstream gradients of 1e-6 times probabilities of 1e-2: below float16's smallest number."""
    case = head(16, 24, 200, torch.float16, spread=1.0)
    grad_lse = torch.full((16,), 1e-6, device=DEVICE)
    lse = case.logits().logsumexp(1)
    got, _ = backend.weight_grad(*case.arguments, lse.float(), grad_lse, want_weight=True, want_bias=False)
    wanted = 1e-6 * case.logits().softmax(1).T @ case.hidden.double()
    assert (got - wanted).abs().max() <= 2e-3 * wanted.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Work, memory, bits.


def peaked(rows: int, vocab: int, hot: list[int], dtype: torch.dtype = torch.bfloat16) -> Head:
    """Rows with 99.99 % of their mass in the columns `hot`, the rest spread out evenly."""
    case = head(rows, 32, vocab, dtype, bias=True, pairs=0, spread=1.0)
    lift = 9.2 + float(torch.tensor(vocab / len(hot)).log())
    case.bias[:] = 0
    case.bias[hot] = lift + 1.0
    z = case.logits()
    assert (z.softmax(1)[:, hot].sum(1) > 0.9999).all()
    return case


def joint(case: Head, **options) -> tuple[float, eager.VocabPass]:
    """Units of work (products with the whole vocabulary per row) of CE and KL together, and the result."""
    half = len(case.hidden) // 2
    case.first = torch.arange(half, device=DEVICE)
    case.second = case.first + half
    with count_gemm_work() as work:
        result = run(case, **options)
    return work.units(*case.logits().shape), result


@pytest.mark.parametrize("mass_bound", [0.0, 2.0**-12])
@pytest.mark.parametrize("spread", [0.01, 2.0, 8.0])
def test_joint_pass_takes_two_products_per_row_at_most(mass_bound: float, spread: float) -> None:
    case = head(64, 32, 3200, torch.bfloat16, spread=spread)
    units, _ = joint(case, mass_bound=mass_bound)
    assert units <= 2.0 + len(case.hidden) * 12 / 3200 / 64  # heavy columns looked up, V / 256 of them
    if mass_bound == 0:
        assert units == 2.0


@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("engine", ["tiled", "fused"])
def test_peaked_rows_take_little_more_than_one_product(place: float, engine: str) -> None:
    """99.99 % of each row's mass in 1 % of the tiles, wherever those are."""
    config = backend._config(torch.empty(64, 32, dtype=torch.bfloat16, device=DEVICE))._replace(probe_rows=1)
    width = config.expected.block_v
    vocab = 100 * width
    start = int(place * 100) * width
    case = peaked(64, vocab, list(range(start, start + width)))
    units, result = joint(case, mass_bound=2.0**-12, engine=engine, config=config)
    assert units <= 1.2
    lost = (result.expected - case.expected()).norm(dim=1)
    assert (lost <= (2.0**-12 + 2.0**-8) * case.weight.double().norm(dim=1).max()).all()


def advance_in_torch(products, p_out, running, bias, softcap, scale, first_column, *, tile_lse, sub, **_) -> None:
    """`row_kernel.advance` without pairs or soft-cap, all rows at once: the interpreter takes them one by one."""
    z = (products + bias[first_column : first_column + products.shape[1]].float()) * scale
    highest = torch.maximum(running.row_max, z.amax(dim=1))
    decay, p = (running.row_max - highest).exp(), (z - highest[:, None]).exp()
    running.row_max.copy_(highest)
    running.row_sum.mul_(decay).add_(p.sum(dim=1))
    running.row_lse.copy_(highest + running.row_sum.log())
    running.sums.mul_(decay[:, None])
    tile_lse.copy_(highest[:, None] + p.unflatten(1, (-1, sub)).sum(dim=2).log())
    p_out.copy_(p)


@pytest.mark.parametrize(("rows", "place"), [(256, 0.99), (512, 0.5), (512, 0.99), (1024, 0.99)])
def test_peaked_rows_take_little_more_than_one_product_as_shipped(
    rows: int, place: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many probed rows as the table says for so many rows."""
    probe_rows = backend.configs.head_config("sm90", 896, rows, 2).probe_rows
    small = backend._config(torch.empty(rows, 16, dtype=torch.bfloat16, device=DEVICE))
    config = small._replace(probe_rows=probe_rows, columns=512)
    width = config.expected.block_v
    start = int(place * 100) * width
    case = peaked(rows, 100 * width, list(range(start, start + width)))
    monkeypatch.setattr(backend.row_kernel, "advance", advance_in_torch)
    with count_gemm_work() as work:
        result = run(case, mass_bound=2.0**-12, engine="tiled", config=config)
    assert work.units(*case.logits().shape) <= 1.2
    lost = (result.expected - case.expected()).norm(dim=1)
    assert (lost <= (2.0**-12 + 2.0**-8) * case.weight.double().norm(dim=1).max()).all()


def test_statistics_alone_take_one_product() -> None:
    case = head(20, 32, 640)
    for engine in ("tiled", "fused"):
        with count_gemm_work() as work:
            run(case, want_expected=False, engine=engine)
        assert work.units(20, 640) == 1.0


@examples(8)
@given(mass_bound=st.sampled_from([1e-3, 0.1]), probe_rows=st.sampled_from([0, 3]), seed=st.integers(0, 99))
def test_tiled_engine_honours_the_mass_bound(mass_bound: float, probe_rows: int, seed: int) -> None:
    case = head(24, 32, 700, bias=True, softcap=8.0, scale=0.7, spread=6.0, seed=seed)
    config = backend._config(case.hidden)._replace(probe_rows=probe_rows, columns=256)
    result = run(case, mass_bound=mass_bound, engine="tiled", config=config)
    largest = (case.slope().abs().max() * case.weight.double().norm(dim=1)).max()
    lost = (result.expected - case.expected()).norm(dim=1)
    assert (lost <= mass_bound * largest * (1 + 1e-4) + 1e-5).all()
    assert torch.allclose(result.lse.double(), case.logits().logsumexp(1), atol=1e-5)


@pytest.mark.parametrize("engine", ["tiled", "fused"])
def test_equal_bits_on_rerun(engine: str) -> None:
    case = head(20, 32, 300, torch.bfloat16, pairs=7)
    for one, two in zip(run(case, engine=engine, mass_bound=1e-3), run(case, engine=engine, mass_bound=1e-3)):
        assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("takes", [True, False])
def test_sums_are_equal_whether_or_not_addmm_takes_half_precision_into_float32(
    takes: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, plain = [], torch.addmm

    def addmm(total, a, b, *, out_dtype=None, out=None):
        if out_dtype is not None:
            calls.append(a.shape)
            if not takes:
                raise RuntimeError("self and mat2 must have the same dtype")
            a, b = a.float(), b.float()
        return plain(total, a, b, out=out)

    monkeypatch.setattr(torch, "addmm", addmm)
    backend._addmm_widens.cache_clear()
    case = head(20, 32, 300, torch.bfloat16, pairs=7, softcap=4.0)
    with caplog.at_level("INFO"):
        got = run(case, engine="tiled", config=backend._config(case.hidden)._replace(columns=64))
    backend._addmm_widens.cache_clear()
    assert calls[0] == (16, 16)
    assert (len(calls) > 1) == takes
    assert caplog.text.count("a product, then a sum") == (0 if takes else 1)
    assert ((got.expected - case.expected()).abs() <= case.expected_error(case.hidden.dtype)).all()
    assert torch.allclose(got.mixed.double(), case.pair_sums(True)[0], atol=0.02 * float(case.weight.abs().max()))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operator returns, views and in-place results of inputs aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and not function.is_view and not _aliases(value, args):
                self.elements = max(self.elements, value.numel())
        return result


def _aliases(value: torch.Tensor, args: tuple) -> bool:
    held = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
    return value.untyped_storage().data_ptr() in held


@pytest.mark.parametrize(("engine", "mass_bound"), [("tiled", 0.0), ("tiled", 1e-3), ("fused", 1e-3)])
def test_nothing_of_the_size_of_the_logits_or_the_head_is_made(engine: str, mass_bound: float) -> None:
    rows, size_h, vocab = 24, 24, 4000
    case = head(rows, size_h, vocab, torch.float16, pairs=5)
    with LargestTensor() as spy:
        run(case, engine=engine, mass_bound=mass_bound)
    assert spy.elements <= min(rows, size_h) * vocab / 7


def test_no_rows_and_no_pairs() -> None:
    case = head(3, 16, 100)
    case.hidden = case.hidden[:0]
    for engine in ("tiled", "fused"):
        result = run(case, engine=engine)
        assert result.lse.shape == (0,)
        assert result.expected.shape == (0, 16)


def test_devices_and_dtypes_it_cannot_serve() -> None:
    assert "float64" in backend.unavailable(torch.device(DEVICE), torch.float64)
    assert backend.unavailable(torch.device(DEVICE), torch.bfloat16) is None
    assert "meta" in backend.unavailable(torch.device("meta"), torch.float32)


def test_warmup_runs_every_engine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert warmup(16, 150, dtype=torch.float32, rows=(4,), candidates=(3,), device=DEVICE) > 0
    assert "warmup 1/1" in caplog.text


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at interpreted launches")
def test_a_step_compiles_nothing_that_warmup_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton compiles apart: kernel, constants, and what it reads off the other arguments (1, multiples of 16)."""
    from triton.backends.compiler import BaseBackend
    from triton.runtime import interpreter
    from triton.runtime.jit import native_specialize_impl

    compiled = set()

    def launch(self, *args, **kwargs):  # and run nothing: what is launched next does not depend on results
        general = self.kwargs["do_not_specialize"] or ()
        plain = [
            native_specialize_impl(BaseBackend, arg, False, name not in general, True)
            for name, arg in zip(self.arg_names, args)
        ]
        constants = sorted((key, value) for key, value in kwargs.items() if key not in ("grid", "warmup"))
        compiled.add((self.__name__, str(plain), str(constants)))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
    options = {"rows": (32,), "candidates": (10,), "trainable": True, "bias": True}
    warmup(16, 70, dtype=torch.bfloat16, device=DEVICE, **options)
    warm = frozenset(compiled)
    lists = random_list_tensors([16, 16], [-1, 0], rows=33, vocab=70)
    case = head(33, 16, 70, torch.bfloat16, bias=True)
    for psl_space in ("candidates", "vocab"):
        for trainable in (False, True):
            leaves = [tensor.detach().requires_grad_(trainable) for tensor in case.arguments[:3]]
            out = losses.alro_loss(
                leaves[0].requires_grad_(), leaves[1], own_labels(lists, 33, 70), lists, bias=leaves[2], alpha=1.0,
                beta=1.0, gamma=1.0, sigma=1.0, psl_space=psl_space, backend="triton",
            )  # fmt: skip
            out.loss.backward()
    divergences = {key for key in compiled if key[0] == "listwise_kernel" and "('DIVERGENCE', 1)" not in key[2]}
    assert {name for name, *_ in compiled} == {name for name, *_ in warm}
    assert compiled - divergences <= warm


@pytest.mark.parametrize("architecture", backend.configs.ARCHITECTURES)
def test_tile_buffers_stay_small(architecture: str) -> None:
    """32 MB, or 64 where H is small and rows are few; at most 5 % of float32 logits with U, from 4096 rows on."""
    for size_h, vocab in ((896, 151936), (2560, 151936), (4096, 128256)):
        for rows in (1, 64, 700, 1024, 2048, 4096, 5000, 16384, 100_000):
            config = backend.configs.head_config(architecture, size_h, rows, 2)
            held = 4 * min(rows, config.chunk) * config.columns
            assert held <= 2**26 if size_h <= 2560 and 2048 < rows <= 4096 else held <= 2**25
            if rows >= 4096:
                assert held + 4 * rows * size_h <= 0.05 * 4 * rows * vocab
    with pytest.raises(ValueError, match="sm70"):
        backend.configs.head_config("sm70", 896, 64, 2)


def traffic(rows: int, size_h: int, vocab: int, monkeypatch: pytest.MonkeyPatch, architecture: str = "sm90") -> int:
    """Bytes that a pass with U moves to and from memory on a device of 40 MB of L2, by the shapes it multiplies.

    Weights and sums pass once per product; products and p~ (4 and 2 bytes, each written and read) where their buffer is
    larger than L2.
    """
    moved, l2 = [0], 40 * 2**20

    def product(a, b, out) -> None:
        moved[0] += 2 * b.numel() + 2 * a.numel() + (8 * out.numel() if out.numel() * 4 > l2 else 0)

    def add_product(a, b, total) -> None:
        moved[0] += 8 * total.numel() + 2 * b.numel() + (4 * a.numel() if a.numel() * 4 > l2 else 0)

    monkeypatch.setattr(backend, "_product", product)
    monkeypatch.setattr(backend, "_add_product", add_product)
    monkeypatch.setattr(backend.row_kernel, "advance", lambda *arguments, **options: None)
    hidden, weight = (torch.empty(n, size_h, dtype=torch.bfloat16, device="meta") for n in (rows, vocab))
    config = backend.configs.head_config(architecture, size_h, rows, 2)
    backend.vocab_pass(hidden, weight, None, None, 1.0, want_expected=True, mass_bound=0.0, config=config)
    return moved[0]


@pytest.mark.parametrize(("size_h", "vocab"), [(896, 151936), (4096, 128256)])
def test_products_of_many_rows_stay_in_the_cache(size_h: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 rows: what the table says, and no chunk of another size, nor all rows at once, moves less."""
    rows = 100_000
    moved = traffic(rows, size_h, vocab, monkeypatch)
    assert moved < 1.02 * rows * vocab * size_h * (10 / 4096 + 4 / 2048)
    for chunk, columns in ((rows, 4096), (rows, 2048), (4096, 2048), (1024, 8192)):
        other = backend.configs.head_config("sm90", size_h, rows, 2)._replace(chunk=chunk, columns=columns)
        monkeypatch.setattr(backend.configs, "head_config", lambda *_, other=other: other)
        assert traffic(rows, size_h, vocab, monkeypatch) > 1.04 * moved
        monkeypatch.undo()


@pytest.mark.parametrize("mass_bound", [0.0, 1e-3])
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_chunks_of_rows_give_what_all_rows_give(rows: int, mass_bound: float) -> None:
    case = head(rows, 24, 700, torch.bfloat16, bias=True, softcap=8.0, spread=3.0, seed=rows)
    config = backend._config(case.hidden)._replace(columns=128)
    whole = run(case, engine="tiled", config=config)
    parts = run(case, engine="tiled", config=config._replace(chunk=16), mass_bound=mass_bound)
    assert torch.allclose(parts.lse, whole.lse, atol=1e-6)
    lost = mass_bound * float(case.weight.norm(dim=1).max())
    assert ((parts.expected.double() - case.expected()).abs() <= case.expected_error(case.hidden.dtype) + lost).all()


@pytest.mark.parametrize(("rows", "most"), [(0, 4096), (1, 4096), (4096, 4096), (4097, 4096), (99_999, 4096), (70, 16)])
def test_chunks_are_of_one_size(rows: int, most: int) -> None:
    chunks = backend._chunks(rows, most)
    sizes = [stop - start for start, stop in chunks]
    assert sum(sizes) == rows
    assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks)][: len(chunks)]
    assert max(sizes, default=0) <= most
    assert most < 64 or min(sizes, default=most) >= min(rows, 0.4 * most)


def test_devices_take_the_rows_that_fit_them() -> None:
    named = backend.configs.cuda_architecture
    limit = backend.configs.SHARED_LIMIT
    for capability, name in {
        (7, 5): None, (8, 0): "sm80", (8, 6): "sm86", (8, 7): "sm80", (8, 9): "sm89", (9, 0): "sm90", (10, 3): "sm100",
    }.items():  # fmt: skip
        assert named(*capability) == name
    assert named(12, 0) == named(12, 1) == named(13, 0) == "sm120"
    assert named(9, 0, limit["sm90"]) == "sm90"
    assert named(9, 0, limit["sm90"] - 1) == "sm86"
    assert named(9, 0, limit["sm86"] - 1) is None
