"""Preference metrics of a model: `python -m alro_fast.evaluate --adapter DIR --preferences FILE [FILE ...]`.

The files need not be those of the training data set: give another domain's for a cross-domain measurement.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..data.negatives import NUM_NEGATIVES, Negatives
from ..data.preferences import Preference, read_preferences
from ..data.records import RankingList
from ..errors import AlroFastError
from ..modeling.logprobs import answer_logprobs
from ..modeling.packing import Tree
from ..objectives.dmpo import branches_of
from ..processes.launch import is_first
from ..prompts import PromptBuilder
from ..prompts.preference import PreferencePrompts
from ..run_folder import OF_PREFERENCES, replacing, run_options
from .preference_metrics import Scored, accuracy_interval, preference_metrics

SCORES = "preference_predictions.jsonl"


def score_preferences(
    model: nn.Module,
    prompts: PreferencePrompts,
    sources: Sequence[Preference | RankingList],
    token_budget: int = 8192,
    backend: str = "auto",
    share: str = "batch",
) -> list[Scored]:
    """Summed log-probabilities of every record's answers under `model` as it stands.

    A ranking list is taken as a contest (`data.negatives`): its positive against the other candidates.
    """
    encoded = [prompts.encode(source) for source in sources]
    trees = [Tree(branches_of(ids), name=source.list_id) for source, ids in zip(sources, encoded)]
    scored = answer_logprobs(model, trees, token_budget, backend, share=share)
    return [
        Scored(source.user_id, sums[ids.chosen], sums[ids.rejected], ids.paired)
        for source, ids, sums in zip(sources, encoded, scored)
    ]


def measure(records: dict[str, list[Scored]], bootstrap: int = 1000) -> dict[str, dict[str, Any]]:
    """Ranker -> metrics, with the bootstrap interval of the users' mean accuracy; bootstrap: its resamples."""
    found = {}
    for name, scored in records.items():
        _, low, high = accuracy_interval(scored, bootstrap)
        found[name] = preference_metrics(scored) | {"interval": [low, high], "records": len(scored)}
    return found


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Data set -> ranker -> metrics, as lines to print, in 80 columns."""
    lines = [
        f"{'':<15}{'pair':>10}{'':>10}{'95 % over':>16}{'':>8}{'':>8}{'pooled':>10}",
        f"{'':<15}{'accuracy':>10}{'user_auc':>10}{'users':>16}{'hit@1':>8}{'valid':>8}{'coin_auc':>10}",
    ]
    for data, rows in results.items():
        lines.append(f"{data}, records: {max(row['records'] for row in rows.values()):,}")
        for name, row in rows.items():
            low, high = row["interval"]
            interval = "" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"
            lines.append(
                f"  {name:<13}{_cell(row['pair_accuracy'], 10)}{_cell(row['user_auc'], 10)}{interval:>16}"
                f"{_cell(row['hit@1'], 8)}{_cell(row['valid'], 8)}{_cell(row['pooled_coin_auc'], 10)}"
            )
    return "\n".join(lines)


def _cell(value: float, width: int) -> str:
    return f"{'-' if math.isnan(value) else f'{value:.4f}':>{width}}"


def evaluate_preferences(options: Any) -> None:
    """Score every file (or the lists) with and without the adapter, print the table, write preference_results.json."""
    from ..modeling.loading import load_for_inference

    config = run_options(options.adapter)
    sources: dict[str, Sequence[Preference | RankingList]]
    sources = {Path(file).stem: read_preferences(file)[: options.limit] for file in options.preferences or ()}
    if len(sources) < len(options.preferences or ()):
        raise AlroFastError("two --preferences files have one name; rename one, results are kept by it")
    if options.lists:
        name, contests = contests_of(options.lists, options.split, config)
        sources[name] = contests[: options.limit]
    model, tokenizer = load_for_inference(
        options.adapter,
        device=options.device,
        base_model=options.base_model,
        trust_remote_code=options.trust_remote_code,
    )
    builder = PromptBuilder.load(options.adapter, tokenizer) if options.lists else None
    form = config.get("preference_answer", "titles")
    prompts = PreferencePrompts(tokenizer, builder, form=form, max_length=config.get("max_length"))
    scores: dict[str, dict[str, list[Scored]]] = {}
    started, answers = time.perf_counter(), 0
    for name, people in sources.items():
        scored = {}
        for ranker in ("untuned", "tuned"):
            if ranker == "untuned" and not hasattr(model, "disable_adapter"):
                continue
            with cast(Any, model).disable_adapter() if ranker == "untuned" else contextlib.nullcontext():
                scored[ranker] = score_preferences(model, prompts, people, options.token_budget, share=options.share)
            answers += sum(len(one.chosen) + len(one.rejected) for one in scored[ranker])
        scores[name] = scored
    seconds = time.perf_counter() - started
    if not is_first():
        return
    results = {name: measure(scored, options.bootstrap) for name, scored in scores.items()}
    print(table(results))
    print(f"{answers:,} answers in {seconds:.1f} s")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, results, scores)
    print(f"preference_results.json and {SCORES} are in {folder}")


def contests_of(folder: str, split: str, config: dict[str, Any]) -> tuple[str, list[RankingList]]:
    """The data set's name, and a positive with its negatives out of every list of a split, drawn as in training.

    Negatives of a run on the hardest are drawn uniformly: no model has a say in what it is measured on.
    """
    from ..data.lists import open_prepared

    prepared = open_prepared(folder)
    by = config.get("negatives", "uniform")
    negatives = Negatives.of(
        prepared, count=config.get("num_negatives") or NUM_NEGATIVES, by="uniform" if by == "hardest" else by,
        source=config.get("negatives_from", "catalogue"), seed=config.get("seed", 42),
    )  # fmt: skip
    contests = [negatives.contest(one, 0) for one in prepared.lists(split) if negatives.usable(one)]
    if not contests:
        raise AlroFastError(f"{folder} holds no {split} lists with anything to prefer; choose another --split")
    return prepared.manifest.get("dataset", Path(folder).name), contests


def save(folder: Path, results: dict[str, Any], scores: Mapping[str, Mapping[str, Sequence[Scored]]]) -> None:
    """Write preference_predictions.jsonl, then preference_results.json; what is no number becomes null.

    A line of the former is a record: the data set it is of, its user, whether chosen and rejected answers stand in
    pairs, and every ranker's summed log-probabilities. scores: data set -> ranker -> records.
    """
    with replacing(folder, OF_PREFERENCES) as work:
        with (work / SCORES).open("w", encoding="utf-8") as file:
            for data, rankers in scores.items():
                for at, one in enumerate(next(iter(rankers.values()))):
                    told = {name: {"chosen": each[at].chosen.tolist(), "rejected": each[at].rejected.tolist()}
                            for name, each in rankers.items()}  # fmt: skip
                    line = {"data": data, "record": at, "user_id": one.user_id, "paired": one.paired, "rankings": told}
                    file.write(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n")
        text = json.dumps(_plain(results), indent=2, allow_nan=False)
        (work / "preference_results.json").write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
