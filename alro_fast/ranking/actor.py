"""The ranker as a function of batches: what an actor pool of Ray Data, or any other, calls again and again.

    ray.data.read_text("lists.jsonl").map_batches(
        RankLines, fn_constructor_args=["out/demo"], compute=ray.data.ActorPoolStrategy(size=2), batch_size=64
    ).write_json("ranked")

It knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AlroFastError
from ..texts import from_json, json_line
from .documents import answer, catalogue, check_top_k, numbered, parse_list
from .streams import ON_ERROR, Asked

if TYPE_CHECKING:
    from ..data.records import RankingList
    from .orders import Ranking


class RankLines:
    """A tuned model that ranks lists of JSON, one a line, as `alro_fast.rank` reads and answers them.

    adapter: a run's folder. on_error: `stop`, a list that cannot be ranked is an AlroFastError; `skip`, its answer is
    {"list_id": ..., "error": "..."}. top_k: answer with the best K alone. options: fields of RankingOptions.
    load: arguments of `Ranker.load`, such as device. A list without a list_id is told apart by its text, so that its
    presentations under `shuffles` are the same in whatever batch it comes.
    Raises AlroFastError for a folder that cannot be loaded, and for options that it cannot be asked with.
    """

    def __init__(
        self,
        adapter: str,
        *,
        on_error: str = "stop",
        top_k: int | None = None,
        options: Mapping[str, Any] | None = None,
        load: Mapping[str, Any] | None = None,
    ) -> None:
        if on_error not in ON_ERROR:
            raise AlroFastError(f"on_error {on_error!r}: expected one of {', '.join(ON_ERROR)}")
        check_top_k(top_k)
        from .ranker import Ranker  # torch, on the machine that ranks

        self.adapter, self.skip, self.top_k = adapter, on_error == "skip", top_k
        self.ranker = Ranker.load(adapter, **(load or {}))
        self.options = dict(options or {})
        self.ranker.described(**self.options)  # refuses what it cannot be asked with, now

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """batch: a column `text`, a JSON list each; so is the answer, in the same order, a ranking each."""
        found = [self._parsed(str(text), number) for number, text in enumerate(batch["text"], start=1)]
        rankings = iter(self._ranked([one.entry for one in found if isinstance(one, Asked)]))
        lines = [self._line(one.document, next(rankings)) if isinstance(one, Asked) else one for one in found]
        return {"text": np.array(lines, dtype=object)}

    def _parsed(self, text: str, number: int) -> Asked | str:
        """The list of a line; where it is none, the answer that says so."""
        document = None
        try:
            document = from_json(text, f"list {number}")
            entry = parse_list(document, number)
            if "list_id" not in document:
                entry = replace(entry, list_id=blake2b(text.encode(), digest_size=8).hexdigest())
            if self.ranker.prompts.identifiers == "items":
                entry = numbered(entry, document, catalogue(self.adapter))
            return Asked(document, entry)
        except AlroFastError as error:
            return self._line(document, error)

    def _ranked(self, entries: list[RankingList]) -> list[Ranking | AlroFastError]:
        try:
            return list(self.ranker.stream(entries, **self.options))
        except AlroFastError as error:
            if len(entries) == 1 or not self.skip:
                return [error] * len(entries)
        return [outcome for entry in entries for outcome in self._ranked([entry])]

    def _line(self, document: Any, outcome: Ranking | AlroFastError) -> str:
        if not isinstance(outcome, AlroFastError):
            return json_line(answer(document, outcome, self.top_k))
        if not self.skip:
            raise outcome
        name = document.get("list_id") if isinstance(document, dict) else None
        return json_line({"list_id": name if isinstance(name, str | int) else None, "error": str(outcome)})
