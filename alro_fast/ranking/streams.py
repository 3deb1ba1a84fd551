"""Lists that come one after the other: checked, ranked and answered while later ones are still on their way.

Memory holds a chunk of lists, however many come. A chunk is full unless its input pauses, so that what is typed is
answered at once, and what stands in a file is ranked in the same company every time.
"""

from __future__ import annotations

import itertools
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import AlroFastError
from ..processes.dealing import dealt, place, told
from ..texts import json_line, printable
from .documents import answer, documents, numbered, parse_list

if TYPE_CHECKING:
    from ..data.records import Item, RankingList
    from .orders import Ranking

CHUNK = 64  # lists ranked together
PAUSE = 0.05  # seconds without a further list that end a chunk
ON_ERROR = ("stop", "skip")
T = TypeVar("T")
Parse = Callable[[Any, int], "RankingList"]  # a document and its number -> the list, or AlroFastError


class Asked(NamedTuple):
    """A list as it came, and as it is ranked."""

    document: Any
    entry: RankingList


class Complaints:
    """What becomes of a list that cannot be ranked: the end (`stop`), or a line on stderr (`skip`)."""

    def __init__(self, on_error: str) -> None:
        if on_error not in ON_ERROR:
            raise AlroFastError(f"--on_error {on_error!r}: expected one of {', '.join(ON_ERROR)}")
        self.skip, self.skipped = on_error == "skip", 0

    def __call__(self, error: AlroFastError) -> None:
        if not self.skip:
            raise error
        self.skipped += 1
        print(f"error: {printable(str(error))}; skipped", file=sys.stderr, flush=True)

    def settle(self) -> None:
        """Exit status 1 where lists were skipped."""
        if self.skipped:
            print(f"{self.skipped:,} lists were skipped", file=sys.stderr)
            raise SystemExit(1)


def read_lists(file: str, complaints: Complaints, parse: Parse = parse_list) -> Iterator[Asked]:
    """The lists of a file, or of standard input (`-`). Where one list that cannot be ranked is the end, a file is read
    through once before: nothing is answered of a file with a mistake in it."""
    if Path(file).is_file() and not complaints.skip:
        for _ in _parsed(file, complaints, parse):
            pass
    return _parsed(file, complaints, parse)


def _parsed(file: str, complaints: Complaints, parse: Parse) -> Iterator[Asked]:
    for number, document in enumerate(documents(file), start=1):
        try:
            if isinstance(document, AlroFastError):
                raise document
            asked = Asked(document, parse(document, number))
        except AlroFastError as error:
            complaints(error)
        else:
            yield asked


def begun(source: Iterable[Asked]) -> Iterator[Asked]:
    """The same lists, the first of them read already: a mistake in it costs no loading of a model."""
    source = iter(source)
    return itertools.chain([*itertools.islice(source, 1)], source)


def in_catalogue(source: Iterable[Asked], items: dict[str, Item], complaints: Complaints) -> Iterator[Asked]:
    """The lists with the catalogue's items, for a model that names items by tokens of their own."""
    for asked in source:
        try:
            yield Asked(asked.document, numbered(asked.entry, asked.document, items))
        except AlroFastError as error:
            complaints(error)


def announced(source: Iterable[Asked], most: int) -> Iterator[Asked]:
    """The same lists; the first of more candidates than there are identifiers is said to be ranked by windows."""
    said = False
    for asked in source:
        if not said and len(asked.entry.candidates) > most:
            name = asked.entry.list_id
            print(f"list {name} has more than {most} candidates: such lists are ranked by windows", file=sys.stderr)
            said = True
        yield asked


def answers(
    source: Iterable[Asked],
    rank: Callable[[Sequence[RankingList]], Iterable[Ranking]],
    complaints: Complaints,
    top_k: int | None = None,
) -> Iterator[str]:
    """A line of JSON for every list, in their order; `rank` gives the rankings of a chunk.

    Of several processes the first alone has a source: it deals out a chunk to each, and has all the answers.
    """
    index, count = place()
    windows = in_chunks(source, CHUNK * count, PAUSE) if index == 0 else itertools.repeat([])
    for window in itertools.chain(windows, [None]):
        entries = told(None if window is None else [asked.entry for asked in window])
        if entries is None:
            return
        chunks = [entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK)]
        ranked = dealt(chunks, [len(chunk) for chunk in chunks], lambda chunk: _ranked(chunk, rank, complaints.skip))
        for asked, ranking in zip(window or (), itertools.chain.from_iterable(ranked), strict=index == 0):
            if isinstance(ranking, AlroFastError):
                complaints(ranking)
            else:
                yield json_line(answer(asked.document, ranking, top_k))


def _ranked(
    entries: list[RankingList], rank: Callable[[Sequence[RankingList]], Iterable[Ranking]], skip: bool
) -> list[Ranking | AlroFastError]:
    try:
        return list(rank(entries))
    except AlroFastError as error:
        if not skip:
            raise
        if len(entries) == 1:
            return [error]
    return list(itertools.chain.from_iterable(_ranked([entry], rank, skip) for entry in entries))


def in_chunks(source: Iterable[T], size: int, pause: float) -> Iterator[list[T]]:
    """Lists of `size`, shorter where nothing came for `pause` seconds. A thread reads ahead, two chunks at most."""
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(2 * size)

    def read() -> None:
        try:
            for one in source:
                waiting.put(("one", one))
            waiting.put(("end", None))
        except BaseException as error:  # raised again where the chunks are taken
            waiting.put(("error", error))

    threading.Thread(target=read, daemon=True).start()
    chunk: list[T] = []
    while True:
        try:
            what, value = waiting.get(timeout=pause if chunk else None)
        except queue.Empty:
            what, value = "pause", None
        if what == "one":
            chunk.append(value)
        if chunk and (what != "one" or len(chunk) == size):
            yield chunk
            chunk = []
        if what == "end":
            return
        if what == "error":
            raise value
