"""Launch configurations: tables, looked up by architecture and sizes. Nothing is tuned at run time.

Architectures: "sm80" (A100), "sm86" (A10, RTX 3090), "sm89" (L4, L40S, RTX 4090), "sm90" (H100, H200), "sm100" (B200),
"sm120" (RTX 5090, RTX PRO 6000), "gfx942" (MI300), "interpreter" (CPU, tests).
`python -m bench.kernel_report --check` compiles every row of the table for its architecture and fails on register
spills, on shared memory over the limit and on a matrix kernel without tensor-core instructions.
"""

from typing import NamedTuple

from .expected import ExpectedConfig
from .trie_attention import Launch, TrieConfig
from .vocab_stats import StatsConfig

SHARED_LIMIT = {  # bytes a block may have; CUDA C++ Programming Guide, compute capabilities; CDNA 3 ISA (LDS)
    "sm80": 163 * 1024,
    "sm86": 99 * 1024,
    "sm89": 99 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "sm120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = tuple(SHARED_LIMIT)
CHUNK = 2048  # rows


class HeadConfig(NamedTuple):
    """Everything the head's kernels need to know for one call."""

    single: StatsConfig  # statistics of rows in no pair
    paired: StatsConfig  # statistics of pairs
    expected: ExpectedConfig  # U from kept tiles; its block_v is the width of a tile in both engines
    columns: int  # of a vocabulary tile of the tiled engine
    chunk: int  # rows that the tiled engine takes at a time, where none are in pairs
    stats_rows: int  # up to this many rows, statistics without U come from the fused kernel
    probe_rows: int  # rows of which all logits are looked at first, to find heavy columns (only when tiles are skipped)


Tiles = tuple[StatsConfig, StatsConfig, ExpectedConfig]


def _ampere(programs: int) -> tuple[Tiles, Tiles]:
    """Tiles of at most 48 KB for mma.sync: they leave room for a second block in 99 KB."""
    return (
        (
            StatsConfig(128, 128, 32, 8, 3, programs),
            StatsConfig(64, 128, 32, 8, 3, programs),
            ExpectedConfig(128, 128, 32, 128, 32, 8, 3),
        ),
        (
            StatsConfig(64, 128, 16, 8, 2, programs, registers=168),
            StatsConfig(32, 128, 16, 8, 2, programs, registers=192),
            ExpectedConfig(64, 128, 32, 64, 32, 8, 2, registers=192),
        ),
    )


# Per architecture: tiles of half-precision inputs, tiles of float32 inputs. programs: two for each multiprocessor of
# the largest device (gfx942: one); registers: by which neither Triton 3.6 nor 3.9 spills.
_TILES = {
    "sm80": _ampere(216),
    "sm86": _ampere(168),
    "sm89": _ampere(284),
    "sm90": (
        (
            StatsConfig(128, 128, 64, 8, 3, 264),
            StatsConfig(64, 128, 64, 8, 3, 264),
            ExpectedConfig(128, 128, 64, 128, 64, 8, 3),
        ),
        (
            StatsConfig(64, 128, 16, 8, 2, 264, registers=168),
            StatsConfig(32, 128, 16, 8, 2, 264, registers=192),
            ExpectedConfig(64, 128, 32, 64, 32, 8, 2, registers=192),
        ),
    ),
    "sm100": (
        (
            StatsConfig(128, 128, 64, 8, 3, 296),
            StatsConfig(64, 128, 64, 8, 3, 296),
            ExpectedConfig(128, 128, 64, 128, 64, 8, 3),
        ),
        (
            StatsConfig(64, 128, 16, 8, 2, 296, registers=168),
            StatsConfig(32, 128, 16, 8, 2, 296, registers=192),
            ExpectedConfig(64, 128, 32, 64, 32, 8, 2, registers=192),
        ),
    ),
    "sm120": _ampere(376),
    "gfx942": (
        (
            StatsConfig(128, 128, 64, 8, 2, 304),
            StatsConfig(64, 128, 64, 8, 2, 304),
            ExpectedConfig(128, 128, 64, 128, 64, 8, 2),
        ),
        (
            StatsConfig(64, 128, 32, 8, 2, 304),
            StatsConfig(32, 128, 32, 4, 2, 304),
            ExpectedConfig(64, 128, 32, 64, 32, 8, 2),
        ),
    ),
    "interpreter": 2
    * (
        (
            StatsConfig(32, 32, 32, 1, 1, 4, 2),
            StatsConfig(16, 32, 32, 1, 1, 4, 2),
            ExpectedConfig(16, 32, 32, 32, 32, 1, 1, 8),
        ),
    ),
}


def cuda_architecture(major: int, minor: int, shared: int | None = None) -> str | None:
    """The table's name for a compute capability where a block may have `shared` bytes of shared memory (None: unknown).

    A device with less than its generation's takes the rows that need least. None: before 8.0, or too little for any.
    """
    if major < 8:
        return None
    own, generation = f"sm{major}{minor}", {8: "sm80", 9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm120")
    name = own if own in SHARED_LIMIT else generation
    return next((fits for fits in (name, "sm86") if shared is None or SHARED_LIMIT[fits] <= shared), None)


def small_rows(config: HeadConfig, num_warps: int) -> HeadConfig:
    """The same for a few rows: blocks of 64 rows (32 pairs), more of them side by side."""
    single, paired, expected = config.single, config.paired, config.expected
    return config._replace(
        single=single._replace(block_m=min(single.block_m, 64), num_warps=num_warps),
        paired=paired._replace(block_m=min(paired.block_m, 32), num_warps=num_warps),
        expected=expected._replace(block_m=min(expected.block_m, 64), num_warps=num_warps),
    )


def head_config(architecture: str, hidden_size: int, rows: int, element_size: int) -> HeadConfig:
    """The configuration for `rows` rows of `hidden_size` elements of `element_size` bytes.

    `columns`, `chunk`: wide tiles keep launches few (a tile takes 5 to 10 operations, which the host must queue),
    narrow ones keep the buffer small: 4 bytes x chunk x columns is 32 MB, which L2 holds. Of such shapes 2048 x 4096
    moves the fewest bytes: sums and rows pass once per tile (10 H bytes a row), both uses of the weight once per chunk
    (4 H bytes a column), so R rows x T columns take N V H (10 / T + 4 / R) bytes. Where the hidden size leaves a device
    little to do per tile, up to 4096 rows are one chunk, of 64 MB.
    """
    if architecture not in _TILES:
        raise ValueError(f"no kernel configurations for {architecture!r}; expected one of {', '.join(_TILES)}")
    single, paired, expected = _TILES[architecture][element_size > 2]
    if architecture == "interpreter":
        return HeadConfig(single, paired, expected, 512, CHUNK, 1 << 30, rows // 64)
    columns = 8192 if rows <= 1024 else 4096
    chunk = 2 * CHUNK if rows <= 2 * CHUNK and hidden_size <= 2560 else CHUNK
    # Reading the whole vocabulary for a few rows pays only where it is a small part of the work.
    config = HeadConfig(single, paired, expected, columns, chunk, 512, 16 if rows >= 256 else 0)
    return small_rows(config, 4 if architecture == "gfx942" else 8) if rows <= 64 else config


def shipped_configs(architecture: str) -> list[tuple[str, HeadConfig, int]]:
    """Every distinct (label, configuration, element size) that `head_config` can return for an architecture."""
    found: dict[HeadConfig, tuple[str, HeadConfig, int]] = {}
    for element_size in (2, 4):
        for hidden_size in (896, 4096):
            for rows in (64, 512, 2048, 4096, 16384):
                config = head_config(architecture, hidden_size, rows, element_size)
                found.setdefault(config, (f"{8 * element_size}-bit H {hidden_size} N {rows}", config, element_size))
    return list(found.values())


def _trie(forward: tuple, query_grad: tuple, key_grad: tuple, block_k: int = 0) -> TrieConfig:
    """Each (queries, keys, warps, stages)."""
    return TrieConfig(*(Launch(*launch, block_k=block_k) for launch in (forward, query_grad, key_grad)))


_TRIE_AMPERE = (
    _trie((128, 32, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    _trie((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    _trie((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
)
_TRIE_HOPPER = (
    _trie((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
    _trie((128, 64, 8, 3), (128, 64, 8, 3), (32, 64, 8, 2)),
    _trie((128, 32, 8, 2), (128, 32, 8, 2), (32, 32, 8, 2)),
)
_TRIE_FLOAT32 = (
    _trie((64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), 32),
    _trie((64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), 32),
    _trie((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1), 32),
)
_TRIE_CDNA = (
    (
        _trie((64, 64, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
        _trie((64, 64, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
        _trie((64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    ),
    (
        _trie((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), 32),
        _trie((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), 32),
        _trie((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), 32),
    ),
)
_TRIE_WIDTHS = (64, 128, 256)  # of heads: the rows above serve up to these, padded to a power of two
# Per architecture: half precision, float32. Chosen as the largest tiles that compile without spills, for all that is
# switched on and for nothing, by Triton 3.6 and 3.9.
_TRIE = {
    **dict.fromkeys(("sm80", "sm86", "sm89", "sm120"), (_TRIE_AMPERE, _TRIE_FLOAT32)),
    **dict.fromkeys(("sm90", "sm100"), (_TRIE_HOPPER, _TRIE_FLOAT32)),
    **dict.fromkeys(("gfx942",), _TRIE_CDNA),
    "interpreter": 2 * (3 * (_trie((32, 32, 1, 1), (32, 32, 1, 1), (32, 32, 1, 1)),),),
}


def trie_config(architecture: str, width: int, element_size: int) -> TrieConfig:
    """How attention over tries is launched for heads of `width` elements of `element_size` bytes."""
    rows = _TRIE[architecture][element_size > 2]
    return next(row for row, widest in zip(rows, _TRIE_WIDTHS) if width <= widest)


def shipped_trie_configs(architecture: str) -> list[tuple[str, TrieConfig, int, int]]:
    """(label, configuration, width, element size) of every width that is compiled for an architecture."""
    return [
        (f"{8 * size}-bit D {width}", trie_config(architecture, width, size), width, size)
        for size in (2, 4)
        for width in (16, 32, 64, 128, 256)
    ]
