"""Fetching the MovieLens archives: licence first, resumed when cut, never half a file under its final name."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ...errors import AlroFastError
from .readers import FOLDERS

BASE = "https://files.grouplens.org/datasets/movielens"
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Licence:
    """Terms in our words; `url` and the README of the data set have the binding ones."""

    name: str
    url: str
    terms: str


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip file at its publisher. checksums: hashlib name -> hex digest; all must match. members: files to unpack."""

    url: str
    size: int  # bytes
    checksums: Mapping[str, str]
    members: tuple[str, ...]


_CITE = "name the data set in publications (Harper and Konstan 2015, doi:10.1145/2827872) and imply no endorsement"
_SHARE = "share it under the same terms only"
_ASK = "no redistribution without separate permission"
_README = "redistribute it only as its README allows"

LICENCES = {
    **{
        name: Licence(
            "MovieLens terms of use (GroupLens, University of Minnesota)",
            f"{BASE}/{name}-README.{'html' if name in {'ml-latest-small', 'ml-20m', 'ml-25m', 'ml-32m'} else 'txt'}",
            f"research use; no commercial use without permission; {share}; {_CITE}; no warranty",
        )
        for name, share in {
            "ml-100k": _ASK,
            "ml-1m": _ASK,
            "ml-latest-small": _SHARE,
            "ml-20m": _README,
            "ml-25m": _README,
            "ml-32m": _README,
        }.items()
    },
    **{
        name: Licence("none stated by the publisher (McAuley Lab, UC San Diego)", url, "research use; cite the paper")
        for name, url in {
            "amazon-2014": "https://jmcauley.ucsd.edu/data/amazon/index_2014.html",
            "amazon-2018": "https://nijianmo.github.io/amazon/",
            "amazon-2023": "https://amazon-reviews-2023.github.io/",
        }.items()
    },
    "book-crossing": Licence(
        "none found (the site of its publisher, Cai-Nicolas Ziegler, is gone)",
        "https://doi.org/10.1145/1060745.1060754",
        "cite the paper (Ziegler et al. 2005)",
    ),
}


def _archive(name: str, size: int, **checksums: str) -> Archive:
    return Archive(f"{BASE}/{name}.zip", size, checksums, tuple(f"{name}/{f}" for f in FOLDERS[name][:2]))


ARCHIVES = {  # md5: published beside each archive; sha256: the checksums TensorFlow Datasets pins for the same archives
    "ml-100k": _archive(
        "ml-100k",
        4_924_029,
        md5="0e33842e24a9c977be4e0107933c0723",
        sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    ),
    "ml-1m": _archive(
        "ml-1m",
        5_917_549,
        md5="c4d9eecfca2ab87c1945afe126590906",
        sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    ),
    "ml-latest-small": _archive(
        "ml-latest-small", 978_202, sha256="696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436"
    ),
    "ml-20m": _archive(
        "ml-20m",
        198_702_078,
        md5="cd245b17a1ae2cc31bb14903e1204af3",
        sha256="96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
    ),
    "ml-25m": _archive(
        "ml-25m",
        261_978_986,
        md5="6b51fb2759a8657d3bfcbfc42b592ada",
        sha256="8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
    ),
    "ml-32m": _archive("ml-32m", 238_950_008, md5="d472be332d4daa821edc399621853b57"),
}


def cache_folder(dataset: str) -> Path:
    """Where a data set is kept between runs: $XDG_CACHE_HOME/alro_fast/<dataset>."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "alro_fast" / dataset


def download(
    dataset: str,
    folder: Path,
    *,
    accept_licence: bool,
    archives: Mapping[str, Archive] = ARCHIVES,
    report: Callable[[str], None] = print,
    attempts: int = 5,
    wait_s: float = 2.0,
) -> Path:
    """Put the files of a data set into `folder` (files already there are kept) and return it.

    Raises AlroFastError where there is no archive to fetch, the licence is not accepted, the server cannot be reached
    or what it sends is not the published archive.
    """
    if dataset not in archives:
        where = f"; get the files yourself (see {LICENCES[dataset].url})" if dataset in LICENCES else ""
        raise AlroFastError(f"{dataset} has no published checksum, so it is not downloaded{where} and pass --raw_dir")
    archive, licence = archives[dataset], LICENCES[dataset]
    if all((folder / Path(member).name).is_file() for member in archive.members):
        return folder
    report(f"{dataset}: {licence.name}: {licence.terms}; in full: {licence.url}")
    if not accept_licence:
        raise AlroFastError(f"{dataset} is downloaded under these terms; read them, then pass --accept_licence")
    folder.mkdir(parents=True, exist_ok=True)
    packed = folder / f"{dataset}.zip"
    fetch(archive.url, packed, archive.size, archive.checksums, report=report, attempts=attempts, wait_s=wait_s)
    unpack(packed, archive.members, folder)
    packed.unlink()
    return folder


def fetch(
    url: str,
    path: Path,
    size: int,
    checksums: Mapping[str, str],
    *,
    report: Callable[[str], None] = print,
    attempts: int = 5,
    wait_s: float = 2.0,
) -> None:
    """Download `url` to `path`: into `<path>.part`, continued where it broke off, renamed once every checksum matches.

    One that continues an earlier run's part and does not match is fetched once more from its beginning.
    """
    part = path.with_name(path.name + ".part")
    pieced = part.exists()
    _receive(url, part, size, report, attempts, wait_s)
    wrong = _mismatch(part, size, checksums)
    if wrong and pieced:
        report(f"{path.name}: {wrong}; fetching it again from its beginning")
        part.unlink()
        _receive(url, part, size, report, attempts, wait_s)
        wrong = _mismatch(part, size, checksums)
    if wrong:
        part.unlink()
        raise AlroFastError(
            f"{url} is not the published archive ({wrong}): nothing was kept; try again later, or get the files "
            "elsewhere and pass --raw_dir"
        )
    part.replace(path)


def unpack(packed: Path, members: tuple[str, ...], folder: Path) -> None:
    """Write the named members, flat, into `folder`; each appears under its name only when whole."""
    try:
        with zipfile.ZipFile(packed) as archive:
            for member in members:
                target = folder / Path(member).name
                part = target.with_name(target.name + ".part")
                with archive.open(member) as source, part.open("wb") as out:
                    shutil.copyfileobj(source, out, CHUNK)
                part.replace(target)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise AlroFastError(f"{packed.name} cannot be unpacked ({error}); delete {packed} and try again") from None


def _receive(url: str, part: Path, size: int, report: Callable[[str], None], attempts: int, wait_s: float) -> None:
    """Extend `part` to `size` bytes; an attempt that got further than any before renews the count of attempts."""
    failures = 0
    have = _size(part)
    if have > size:
        part.unlink()
        have = 0
    most = have
    while have < size:
        try:
            _append(url, part, have, size)
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code == 416:  # the server's file ends before our part does: not the archive we know
                part.unlink(missing_ok=True)
            elif error.code < 500:
                failures = attempts
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
        have = _size(part)
        if have >= size:
            return
        failures = 0 if have > most else failures + 1
        most = max(most, have)
        if failures >= attempts:
            kept = f"; {have:,} of {size:,} bytes are kept for the next try" if have else ""
            raise AlroFastError(
                f"{url} could not be downloaded ({reason}){kept}: "
                "run again, or get the files yourself and pass --raw_dir"
            )
        report(f"{part.stem}: {reason} at {have:,} of {size:,} bytes; trying to go on from there")
        time.sleep(wait_s)


def _append(url: str, part: Path, have: int, size: int) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "alro_fast", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=60) as answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with part.open("ab" if resumed else "wb") as out, bar:
            while have <= size and (chunk := answer.read(CHUNK)):
                out.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _mismatch(part: Path, size: int, checksums: Mapping[str, str]) -> str | None:
    found = _size(part)
    if found != size:
        return f"{found:,} bytes instead of {size:,}"
    for name, expected in checksums.items():
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, name).hexdigest()
        if digest != expected:
            return f"its {name} is {digest}, not {expected}"
    return None
