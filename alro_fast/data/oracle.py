"""The best possible scores of made data, whose maker knows every user's taste."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from ..errors import AlroFastError


def read_oracle(path: str | Path) -> dict[str, np.ndarray]:
    """oracle.parquet (columns list_id, scores: per candidate in stored order) -> {list_id: scores}."""
    frame = pl.read_parquet(path, glob=False)
    if not {"list_id", "scores"} <= set(frame.columns):
        raise AlroFastError(f"{path}: expected the columns list_id and scores, found {', '.join(frame.columns)}")
    return {name: np.asarray(scores, dtype=np.float64) for name, scores in zip(frame["list_id"], frame["scores"])}
