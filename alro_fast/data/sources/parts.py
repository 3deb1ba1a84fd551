"""A table that stands in several files: those of a folder, or of a pattern."""

from __future__ import annotations

import glob
from pathlib import Path

from ...errors import AlroFastError

ENDINGS = {"csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"), "parquet": (".parquet",)}
MOST_PARTS = 100_000


def is_several(path: Path) -> bool:
    """Whether a path is a folder, or a pattern such as part-*.parquet that no file is called by."""
    return path.is_dir() or (not path.exists() and any(mark in str(path) for mark in "*?["))


def parts_of(path: Path, dataset: str) -> tuple[Path, ...]:
    """The files of a folder, at any depth, or of a pattern (** for any depth), in the order of their names; of one
    file, that file.

    dataset: "csv" or "parquet", which says what files end in. Names that begin with . or _ are passed over, as writers
    of partitioned tables mean them. Raises AlroFastError where there is none.
    """
    if not is_several(path):
        return (path,)
    if path.is_dir():
        found = [(file.relative_to(path), file) for file in path.rglob("*")]
    else:
        found = [(Path(file), Path(file)) for file in glob.glob(str(path), recursive=True)]  # noqa: PTH207  # may begin with /
    wanted = ENDINGS[dataset]
    parts = sorted(
        file
        for name, file in found
        if file.name.endswith(wanted) and file.is_file() and not any(p.startswith(("_", ".")) for p in name.parts)
    )
    if not parts:
        kind = "folder" if path.is_dir() else "pattern"
        raise AlroFastError(
            f"the {kind} {path} has no file that ends in {' or '.join(wanted)}; expected a table's parts"
        )
    if len(parts) > MOST_PARTS:
        raise AlroFastError(
            f"{path} has {len(parts):,} files; at most {MOST_PARTS:,} are read: make fewer, larger ones"
        )
    return tuple(parts)
