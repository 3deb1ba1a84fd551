"""`python -m bench.kernel_report [--check] [--arch sm90 ...] [--sample]`: kernels compiled without a GPU.

Compiles every Triton kernel in every configuration that ships, for each architecture, and prints registers, shared
memory, spills and instruction mix as a Markdown table. `--check` exits with 1 on a register spill, on shared memory
over the limit and on a matrix kernel without tensor-core instructions. `--sample` takes one configuration per kernel.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from alro_fast.kernels import configs, expected, gather, listwise, row_kernel, trie_attention, vocab_stats

TARGETS = {
    **{f"sm{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {  # the architecture's own first; the others serve tiles of less than 64 rows
    **dict.fromkeys(("sm80", "sm86", "sm89", "sm120"), ("mma.sync",)),
    "sm90": ("wgmma.mma", "mma.sync"),
    "sm100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}
INSTRUCTIONS = {
    "cuda": ("wgmma.mma", "mma.sync", "tcgen05.mma", "cp.async", "ld.global", "st.global", "ex2", "bar.sync"),
    "hip": ("v_mfma", "buffer_load", "global_load", "global_store", "buffer_store", "v_exp", "s_barrier"),
}

# Types of arguments by name; integers not named here are i32, and 1 where they are the stride along a row.
_HALF = {
    "hidden", "weight", "bias", "p", "out", "p_out", "mixed_out", "spread_out", "grad_out", "source", "query", "key",
    "value", "query_grad", "key_grad", "value_grad",
}  # fmt: skip
_INT64 = {
    "rows_a", "rows_b", "pair_rows", "begins", "order", "bounds", "second", "first", "order_first", "bounds_first",
    "order_second", "bounds_second", "rows", "ids", "keys", "ends", "places", "ranks", "sizes", "twin",
}  # fmt: skip
_INT32 = {"live", "kept", "kept_count", "positions", "until", "blocks", "shared"}
_FLOAT = {"scale", "cap", "mass_bound", "gamma", "sigma"}
_DIVISIBLE = {"size_h", "width"}  # by 16, as sizes of heads and hidden states are
_ONE = {"stride_hk", "stride_wk", "stride_sk"}
_COUNTS = {
    "slots", "tiles", "tiles_per_split", "splits", "count", "all_tiles", "columns", "per_group", "first_column",
    "first_slot", "first_tile", "width", "groups", "window",
}  # fmt: skip
_INT32_OF_TRIES = {"rows", "tiles"}  # tensors of int32 there, other things elsewhere
_COUNT_ROWS = {"select_kernel", "probability_kernel", "accumulate_kernel"}  # `rows` is a tensor elsewhere


_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Case(NamedTuple):
    kernel: triton.JITFunction
    label: str
    constants: dict
    num_warps: int
    num_stages: int
    matrix: bool  # must use tensor cores
    element: str  # Triton's name of the element type
    registers: int | None = None  # that a thread may take


class Report(NamedTuple):
    architecture: str
    kernel: str
    label: str
    registers: int
    shared: int
    spills: int  # bytes: spill stores and loads (CUDA), scratch memory (AMD; scalars kept in vector lanes are none)
    instructions: dict[str, int]
    problems: list[str]


def cases(architecture: str) -> Iterator[Case]:
    """Every kernel in every distinct configuration shipped for an architecture."""
    seen = set()

    def distinct(case: Case) -> Iterator[Case]:
        key = (case.kernel.__name__, *case[3:], tuple(case.constants.items()))
        if key not in seen:
            seen.add(key)
            yield case

    for label, config, element_size in configs.shipped_configs(architecture):
        element = "bf16" if element_size == 2 else "fp32"
        for full in (False, True):
            for case in _head_cases(label, config, element, full):
                yield from distinct(case)
    for label, config, width, element_size in configs.shipped_trie_configs(architecture):
        for case in _trie_cases(label, config, width, "bf16" if element_size == 2 else "fp32"):
            yield from distinct(case)
    for case in _small_cases():
        yield from distinct(case)


def _head_cases(label: str, config: configs.HeadConfig, element: str, full: bool) -> Iterator[Case]:
    """The head's kernels, plain or with everything switched on. float32 products ("ieee") have no tensor cores."""
    label += " full" if full else ""
    matrix = element != "fp32"
    extras = {"HAS_BIAS": full, "HAS_CAP": full}
    for paired, stats in ((False, config.single), (True, config.paired)):
        constants = {
            "BLOCK_M": stats.block_m, "BLOCK_V": stats.block_v, "BLOCK_H": stats.block_h, "GROUP": stats.group,
            "EVEN_H": not full, "PAIRED": paired, "ENTROPY": True, "HAS_LIVE": not paired, **extras, "TILE_STATS": full,
        }  # fmt: skip
        name = f"{label} {'paired' if paired else 'single'}"
        yield Case(
            vocab_stats.vocab_stats_kernel, name, constants, stats.num_warps, stats.num_stages, matrix, element,
            stats.registers,
        )  # fmt: skip
    e = config.expected
    shape = {"BLOCK_M": e.block_m, "BLOCK_V": e.block_v}
    yield Case(
        expected.probability_kernel, label, {**shape, "BLOCK_H": e.block_h, "EVEN_H": not full, **extras},
        e.num_warps, e.num_stages, matrix, element, e.registers,
    )  # fmt: skip
    yield Case(
        expected.accumulate_kernel, label, {**shape, "BLOCK_U": e.block_u, "BLOCK_K": e.block_k, "PACKED": full},
        e.num_warps, e.num_stages, matrix, element, e.registers,
    )  # fmt: skip
    yield Case(
        expected.select_kernel, label,
        {"BLOCK_M": e.block_m, "WIDTH": expected.SELECT_WIDTH, "HAS_FLOOR": full}, 8, 3, False, element,
    )  # fmt: skip
    row_warps = row_kernel.num_warps(config.columns)
    flags = {"PAIRS": full, "ENTROPY": True, "MIXED": full, "SPREAD": full}
    yield Case(
        row_kernel.advance_kernel, label,
        {"BLOCK": config.columns, "BLOCK_U": 1024, "SUB": e.block_v, **extras, "EXPECTED": True, "TILE_STATS": full,
         **flags},
        row_warps, 3, False, element,
    )  # fmt: skip
    yield Case(
        row_kernel.differentiate_kernel, label,
        {"BLOCK": row_kernel.GRAD_COLUMNS, **extras, "PAIRS": full, "ENTROPY": True}, 8, 3, False, element,
    )  # fmt: skip


def _trie_cases(label: str, config: trie_attention.TrieConfig, width: int, element: str) -> Iterator[Case]:
    """Attention over tries, plain and with everything switched on."""
    kernels = (
        trie_attention.trie_forward_kernel,
        trie_attention.trie_query_grad_kernel,
        trie_attention.trie_key_grad_kernel,
    )
    for full in (False, True):
        for kernel, launch in zip(kernels, config):
            constants = trie_attention.constants(launch, width, full, full) | {"EVEN_D": not full}
            options = {key: constants.pop(key) for key in launch.options}
            yield Case(
                kernel, f"{label} full" if full else label, constants, options["num_warps"], options["num_stages"],
                element != "fp32", element, launch.registers,
            )  # fmt: skip
    shape = {"BLOCK_N": config.key_grad.block_n, "BLOCK_D": width, "ROWS": trie_attention.ADD_ROWS}
    yield Case(trie_attention.trie_add_up_kernel, label, shape, 4, 3, False, element)


def _small_cases() -> Iterator[Case]:
    for size in (16, 32, 64, 128):
        for form, columns in (("ranking", size), ("ratings", 16)):
            for divergence in (0, 1, 3):
                constants = {
                    "BLOCK_M": size, "BLOCK_C": columns, "CHUNK": listwise.CHUNK, "RANKING": form == "ranking",
                    "NORMALISE": True, "DIVERGENCE": divergence, "DETACH": divergence < 3,
                    "MASK_EMITTED": divergence > 0,
                }  # fmt: skip
                label = f"{form} M {size} divergence {divergence}"
                warps = listwise.num_warps(max(size, columns))
                yield Case(listwise.listwise_kernel, label, constants, warps, 3, False, "fp32", listwise.REGISTERS)
    for pairs in (False, True):
        constants = {"BLOCK_N": 4, "BLOCK_S": 256, "PAIRS": pairs}
        yield Case(vocab_stats.combine_kernel, "pairs" if pairs else "rows", constants, 4, 3, False, "bf16")
    for columns in (1, 16):
        constants = {"BLOCK_C": columns, "BLOCK_H": 256, "HAS_BIAS": True, "HAS_CAP": True}
        yield Case(gather.gather_logits_kernel, f"C {columns}", constants, 4, 3, False, "bf16")
    for parts in (True, False):
        constants = {"BLOCK_E": 4, "BLOCK_H": 256, "HAS_CAP": True, "SEGMENT": gather.SEGMENT, "PARTS": parts}
        label = "segments" if parts else "rows"
        yield Case(gather.scatter_kernel, label, constants, 4, 3, False, "bf16", gather.REGISTERS)


def compile_case(case: Case, architecture: str) -> Report:
    """Compiles one case and reads what it uses."""
    target = TARGETS[architecture]
    signature, constants, attributes = {}, dict(case.constants), {}
    name = case.kernel.__name__
    for position, argument in enumerate(case.kernel.arg_names):
        signature[argument] = kind = _argument_type(argument, name, case)
        if kind == "constexpr" and argument not in constants:
            constants[argument] = 1
        if kind != "constexpr" and (kind.startswith("*") or argument.startswith("stride") or argument in _DIVISIBLE):
            attributes[(position,)] = [["tt.divisibility", 16]]
    limit = {"maxnreg": case.registers} if case.registers and target.backend == "cuda" else {}
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, attrs=attributes),
        target=target,
        options={"num_warps": case.num_warps, "num_stages": case.num_stages, **limit},
    )
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        registers, stack = _cuda_resources(compiled.asm["cubin"])
        spills = _spill_bytes(text, architecture) if stack else 0
    else:
        text = compiled.asm["amdgcn"]
        registers = _last_number(r"\.vgpr_count:\s*(\d+)", text)
        spills = _last_number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    instructions = {key: len(re.findall(rf"\b{re.escape(key)}", text)) for key in INSTRUCTIONS[target.backend]}
    instructions = {key: count for key, count in instructions.items() if count}
    problems = []
    if spills:
        problems.append(f"{spills} spilled")
    if compiled.metadata.shared > configs.SHARED_LIMIT[architecture]:
        problems.append(f"shared memory over {configs.SHARED_LIMIT[architecture]}")
    usable = TENSOR_CORES[architecture][: 1 if case.constants.get("BLOCK_M", 0) >= 64 else None]
    if case.matrix and not any(key in instructions for key in usable):
        problems.append("no tensor-core instructions")
    return Report(architecture, name, case.label, registers, compiled.metadata.shared, spills, instructions, problems)


def _argument_type(argument: str, kernel: str, case: Case) -> str:
    if argument in case.constants or argument in _ONE:
        return "constexpr"
    if argument in _FLOAT:
        return "fp32"
    if argument in _INT32_OF_TRIES and kernel.startswith("trie_"):
        return "*i32"
    if (
        argument in _COUNTS
        or argument.startswith(("stride", "size_"))
        or (argument == "rows" and kernel in _COUNT_ROWS)
    ):
        return "i32"
    if argument in _INT64:
        return "*i64"
    if argument in _INT32:
        return "*i32"
    return f"*{case.element}" if argument in _HALF else "*fp32"


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack and local memory, by cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text}")
    return int(found[1]), int(found[2]) + int(found[3])


def _spill_bytes(ptx: str, architecture: str) -> int:
    """Bytes of spill stores and loads, by ptxas: a stack frame alone (a division's subroutine) is no spill."""
    tool = get_ptxas(TARGETS[architecture].arch).path
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", text))


def _last_number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[-1])


def sample(every: list[Case]) -> list[Case]:
    """One case per kernel: the last, which has everything switched on; matrix kernels in half precision."""
    chosen = {}
    for case in every:
        held = chosen.get(case.kernel.__name__)
        if held is None or case.matrix or not held.matrix:
            chosen[case.kernel.__name__] = case
    return list(chosen.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_report", description=__doc__.split("\n\n")[1])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a kernel breaks a rule")
    parser.add_argument("--sample", action="store_true", help="one configuration per kernel")
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("error: TRITON_INTERPRET is set; kernels are compiled only without it", file=sys.stderr)
        return 2
    print(
        f"# Kernels, compiled offline by Triton {triton.__version__}\n\n`python -m bench.kernel_report`, without a GPU."
    )
    print("registers: of a thread; shared: bytes of a block; spills: bytes of a thread.\n")
    print("| arch | kernel | configuration | registers | shared | spills | instructions |")
    print("| --- | --- | --- | ---: | ---: | ---: | --- |")
    compiled = failures = 0
    for architecture in options.arch:
        every = list(cases(architecture))
        for case in sample(every) if options.sample else every:
            report = compile_case(case, architecture)
            compiled, failures = compiled + 1, failures + bool(report.problems)
            mix = " ".join(f"{key} {count}" for key, count in report.instructions.items())
            print(
                f"| {architecture} | {report.kernel} | {report.label} | {report.registers} | {report.shared} | "
                f"{report.spills} | {mix}{' **' + ', '.join(report.problems) + '**' if report.problems else ''} |",
                flush=True,
            )
    print(
        f"\nOf {compiled} kernels {failures or 'none'} break a rule: no spill, no more shared memory than a block may "
        "have, matrix products of half precision on tensor cores."
    )
    return 1 if options.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
