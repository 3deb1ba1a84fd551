"""Bytes and tables of files, whatever they are about: unpacked in pieces, errors in one line that names the file."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from ...errors import AlroFastError
from ...texts import packed_or_wide

BLOCK_BYTES = 1 << 25
LINE_BYTES = 1 << 24  # a longer line is no record of a rating
POLARS_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)  # panics: of damaged Parquet files
UNFOLDED_BYTES, UNFOLDED_TIMES = 1 << 28, 50  # an archive that holds more than both is no table of ratings


@contextmanager
def polars_errors(path: Path) -> Iterator[None]:
    """A file polars cannot read becomes one line that names it."""
    try:
        yield
    except POLARS_ERRORS as error:
        first = str(error).strip().splitlines()[0]
        if "utf-8" in first.lower() or "utf8" in first.lower():
            raise AlroFastError(
                f"{path.name} cannot be read (no UTF-8 text: Latin-1, or Windows-1252?); save it as UTF-8"
            ) from None
        raise AlroFastError(f"{path.name} cannot be read ({first}); is it whole and of the format asked for?") from None


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedIOBase]:
    """Bytes of a file, unpacked if it ends in .gz; a cut or altered archive is a one-line error."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except EOFError:
        raise AlroFastError(f"{path.name} is a truncated gzip file; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise AlroFastError(f"{path.name} is not an intact gzip file ({error}); fetch it again") from None


def unfolded(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked if it ends in .gz, BLOCK_BYTES at a time.

    AlroFastError for an archive of more than UNFOLDED_BYTES and UNFOLDED_TIMES its size: it might fill a disk.
    """
    most = max(UNFOLDED_BYTES, UNFOLDED_TIMES * path.stat().st_size) if path.suffix == ".gz" else math.inf
    done = 0
    with _open(path) as file:
        while chunk := file.read(BLOCK_BYTES):
            done += len(chunk)
            if done > most:
                raise AlroFastError(
                    f"{path.name} unfolds to more than {most:,} bytes, as no file of ratings of its size does; "
                    "unpack it yourself if it is one"
                )
            yield chunk


def blocks(path: Path) -> Iterator[bytes]:
    """The file in pieces of whole lines, about BLOCK_BYTES each; AlroFastError for a line of more than LINE_BYTES."""
    rest = b""
    for chunk in unfolded(path):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += chunk
        if len(rest) > LINE_BYTES:
            raise _too_long(path)
    if rest.strip():
        yield rest


def _too_long(path: Path) -> AlroFastError:
    return AlroFastError(f"{path.name} has a line of more than {LINE_BYTES:,} bytes; one record per line is expected")


def regular(path: Path, workdir: Path) -> Path:
    """The file itself; of a pipe, as a shell's <(...) and /dev/stdin are, a copy in `workdir`, to be read twice."""
    if path.is_file():
        return path
    copy = workdir / path.name
    with path.open("rb") as source, copy.open("xb") as target:
        shutil.copyfileobj(source, target)
    return copy


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a latin-1 file, where a title may hold characters that str.splitlines takes for line ends."""
    with path.open(encoding="latin-1") as file:
        yield from (line.rstrip("\n") for line in file)


def scan_csv(path: Path, separator: str = ",", names: list[str] | None = None) -> pl.LazyFrame:
    """Every cell as text, so that a bad number is reported with its row instead of guessed around.

    names: of the columns, for a file without a header, whose cells are not quoted. Of one with a header, spaces around
    a name and lines without a cell are left out.
    """
    with path.open("rb") as file:
        head = file.readline(LINE_BYTES + 1)
    if not head:
        raise AlroFastError(f"{path.name} is empty; a table is expected in it")
    if len(head) > LINE_BYTES:
        raise _too_long(path)
    if (other := packed_or_wide(head)) is not None:
        raise AlroFastError(f"{path.name} is {other}")
    how: dict[str, Any] = {
        "separator": separator,
        "has_header": names is None,
        "infer_schema": False,
        "quote_char": '"' if names is None else None,
    }
    with polars_errors(path):
        scan = pl.scan_csv(path, glob=False, **how)
        found = scan.collect_schema().names()
        if names is None:
            bare = [name.strip() for name in found]
            if len(set(bare)) == len(bare):
                scan = scan.rename(dict(zip(found, bare)))
            return scan.filter(~pl.all_horizontal(pl.all().is_null()))
        if len(found) != len(names):
            raise AlroFastError(
                f"{path.name} has {len(found)} fields per line when split at {separator!r}; "
                f"{len(names)} are expected: is it the file of another data set?"
            )
        return scan.rename(dict(zip(found, names)))


def scan_table(path: Path, separator: str | None, workdir: Path, names: list[str] | None = None) -> pl.LazyFrame:
    """A CSV (also .tsv, .gz, which is unpacked into `workdir`) or Parquet file; names: of a file without a header."""
    suffixes = path.suffixes
    if suffixes[-1:] == [".parquet"]:
        with polars_errors(path):
            scan = pl.scan_parquet(path, glob=False)
            scan.collect_schema()
        return scan
    separator = separator or ("\t" if ".tsv" in suffixes else ",")
    if suffixes[-1:] != [".gz"]:
        return scan_csv(path, separator, names)
    plain = workdir / f"{len(list(workdir.iterdir()))}-{path.stem}"  # parts of a table may be called the same
    with plain.open("wb") as out:
        out.writelines(blocks(path))
    return scan_csv(plain, separator, names)
