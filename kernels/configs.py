"""Launch configurations: one table, looked up by (architecture, hidden size, rows). Nothing is tuned at run time.

Architectures: "sm80" (A100), "sm90" (H100, H200), "sm100" (B200), "gfx942" (MI300), "interpreter" (CPU, tests).
`python -m bench.kernel_report --check` compiles every row of the table for its architecture and fails on register
spills, on shared memory over the limit and on a matrix kernel without tensor-core instructions.
"""

from typing import NamedTuple

from .expected import ExpectedConfig
from .vocab_stats import StatsConfig

ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}


class HeadConfig(NamedTuple):
    """Everything the head's kernels need to know for one call."""

    single: StatsConfig  # statistics of rows in no pair
    paired: StatsConfig  # statistics of pairs
    expected: ExpectedConfig  # U from kept tiles; its block_v is the width of a tile in both engines
    columns: int  # of a vocabulary tile of the tiled engine
    stats_rows: int  # up to this many rows, statistics without U come from the fused kernel
    probe_rows: int  # rows of which all logits are looked at first, to find heavy columns (only when tiles are skipped)


# Per architecture: tiles of half-precision inputs, tiles of float32 inputs.
_TILES = {
    "sm80": (
        (
            StatsConfig(128, 128, 32, 8, 3, 216),
            StatsConfig(64, 128, 32, 8, 3, 216),
            ExpectedConfig(128, 128, 32, 128, 32, 8, 3),
        ),
        (
            StatsConfig(64, 128, 32, 8, 2, 216),
            StatsConfig(32, 128, 32, 8, 2, 216),
            ExpectedConfig(64, 128, 32, 64, 32, 8, 2),
        ),
    ),
    "sm90": (
        (
            StatsConfig(128, 128, 64, 8, 3, 264),
            StatsConfig(64, 128, 64, 8, 3, 264),
            ExpectedConfig(128, 128, 64, 128, 64, 8, 3),
        ),
        (
            StatsConfig(64, 128, 32, 8, 2, 264),
            StatsConfig(32, 128, 32, 8, 2, 264),
            ExpectedConfig(64, 128, 32, 64, 32, 8, 2),
        ),
    ),
    "sm100": (
        (
            StatsConfig(128, 128, 64, 8, 3, 296),
            StatsConfig(64, 128, 64, 8, 3, 296),
            ExpectedConfig(128, 128, 64, 128, 64, 8, 3),
        ),
        (
            StatsConfig(64, 128, 32, 8, 2, 296),
            StatsConfig(32, 128, 16, 8, 2, 296),
            ExpectedConfig(64, 128, 32, 64, 32, 8, 2),
        ),
    ),
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
    "interpreter": (
        (
            StatsConfig(32, 32, 32, 1, 1, 4, 2),
            StatsConfig(16, 32, 32, 1, 1, 4, 2),
            ExpectedConfig(16, 32, 32, 32, 32, 1, 1, 8),
        ),
        (
            StatsConfig(32, 32, 32, 1, 1, 4, 2),
            StatsConfig(16, 32, 32, 1, 1, 4, 2),
            ExpectedConfig(16, 32, 32, 32, 32, 1, 1, 8),
        ),
    ),
}


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

    `columns`: wide tiles keep launches few, narrow ones keep the buffer small; 4 bytes x rows x columns stays near
    32 MB, which L2 holds, and below 2.5 % of the logits of a 128k vocabulary once rows are many.
    """
    if architecture not in _TILES:
        raise ValueError(f"no kernel configurations for {architecture!r}; expected one of {', '.join(_TILES)}")
    single, paired, expected = _TILES[architecture][element_size > 2]
    if architecture == "interpreter":
        return HeadConfig(single, paired, expected, 512, 1 << 30, rows // 64)
    columns = 8192 if rows <= 512 else 4096 if rows < 2048 or hidden_size <= 2560 else 2048
    # Reading the whole vocabulary for a few rows pays only where it is a small part of the work.
    config = HeadConfig(single, paired, expected, columns, 512, 16 if rows >= 256 else 0)
    return small_rows(config, 4 if architecture == "gfx942" else 8) if rows <= 64 else config


def shipped_configs(architecture: str) -> list[tuple[str, HeadConfig, int]]:
    """Every distinct (label, configuration, element size) that `head_config` can return for an architecture."""
    found: dict[HeadConfig, tuple[str, HeadConfig, int]] = {}
    for element_size in (2, 4):
        for hidden_size in (896, 4096):
            for rows in (64, 512, 2048, 16384):
                config = head_config(architecture, hidden_size, rows, element_size)
                found.setdefault(config, (f"{8 * element_size}-bit H {hidden_size} N {rows}", config, element_size))
    return list(found.values())
