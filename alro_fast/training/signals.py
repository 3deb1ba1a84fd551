"""Which signals the prompts of a run show, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..data.records import RankingList
from ..data.signal_table import OF_CANDIDATES


def signals_shown(places: Mapping[str, Sequence[str]], lists: Sequence[RankingList]) -> str:
    """For the plan; empty where the lists carry no signals.

    places: the names that prompts have a place for beside "history" and "candidates".
    """
    carried = getattr(lists, "signals", [])
    if not carried:
        return ""
    parts = []
    for part, shown in places.items():
        known = [name for name in carried if part == "candidates" or name not in OF_CANDIDATES]
        if names := [name for name in known if name in shown]:
            parts.append(f"{', '.join(names)} beside {part}")
    return "; ".join(parts) or f"none shown: the lists carry {', '.join(carried)}, the template has no place for them"
