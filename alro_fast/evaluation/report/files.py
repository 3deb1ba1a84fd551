"""What a report reads: results.json and predictions.jsonl, and where they are trainer_state.json and config.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import texts
from ...data.records import Item, RankingList
from ...errors import AlroFastError
from ...run_folder import settle
from ...texts import decoded, from_json
from .shapes import STATE, check, check_line, check_results, damage


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run or an evaluation; AlroFastError where there is none, or a damaged one."""
    settle(folder)
    results = read_json(folder / "results.json")
    if results is None and (folder / "preference_results.json").is_file():
        raise AlroFastError(f"{folder} is a preference run: its figures are in preference_results.json, without a page")
    if not isinstance(results, dict) or "about" not in results:
        raise AlroFastError(f"{folder} holds no results.json of alro_fast; run alro_fast.evaluate or alro_fast.train")
    check_results(results, folder / "results.json")
    return results


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl; none where there is no such file."""
    path = folder / "predictions.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:  # of bytes, for which a line ends at a line feed alone
        named = ((line, f"{path} is damaged: line {n}") for n, line in enumerate(file, start=1))
        lines = [from_json(decoded(line, name), name) for line, name in named if line.strip()]
    if not lines:
        raise AlroFastError(f"{path} is damaged: it is empty; restore it, or evaluate again")
    for number, line in enumerate(lines, start=1):
        check_line(line, path, number, lines[0])
    return lines


def read_history(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, of trainer_state.json; nothing where there is no such file."""
    state = read_json(folder / "trainer_state.json")
    if state is None:
        return []
    check(state, STATE, folder / "trainer_state.json")
    history: list[dict[str, Any]] = state.get("log_history", [])
    return history


def read_json(path: Path) -> Any:
    """None for a file that does not exist; AlroFastError for one that is not JSON."""
    return texts.read_json(path) if path.is_file() else None


def read_yaml(path: Path) -> dict[str, Any]:
    """{} for a file that does not exist."""
    if not path.is_file():
        return {}
    name = f"{path} is damaged: it"
    options = texts.from_yaml(decoded(texts.read_bytes(path), name), name) or {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise damage(path, "", "options by their names", options)
    return options


def list_of(line: Mapping[str, Any]) -> RankingList:
    """What metrics need of a line of predictions: names, candidates and ratings."""
    items = tuple(Item(i, one["id"], one["title"], "") for i, one in enumerate(line["candidates"]))
    ratings = tuple(math.nan if one["rating"] is None else float(one["rating"]) for one in line["candidates"])
    return RankingList(line["list_id"], line["user_id"], (), (), items, ratings)
