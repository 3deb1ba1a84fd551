"""The signals of a run: tokens for them, and in words which ones its prompts show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..data.records import RankingList
from ..data.signal_table import OF_CANDIDATES
from ..errors import AlroFastError
from ..prompts import PromptBuilder, SignalVocabulary
from .config import Config


def signal_vocabulary(config: Config, train: Sequence[RankingList]) -> SignalVocabulary:
    """What the tokens of `--identifiers signals` stand for; AlroFastError where that does not go with other options."""
    objective, answer = config.description, config.data.answer
    if objective.prompts is not PromptBuilder or answer != "ratings":
        raise AlroFastError(
            f"--identifiers signals is for grades; --objective {objective.title} is to learn another answer: give "
            "--objective alro or sft, and --answer ratings"
        )
    return SignalVocabulary.of(train)


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
