"""A search of options by Optuna (Akiba et al. 2019; its TPE sampler) on validation lists; then test lists for the best.

A trial is a run like any other, in runs/trial-<n>. Its figure is the metric on the validation lists as training ends,
which its trainer_state.json holds, averaged over seeds. What is left of a search is a study of two variants, the base
and the best trial's options, which is trained and measured on the test lists as every study is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ..errors import AlroFastError
from ..run_folder import held
from .figures import intact
from .plan import PlannedRun, Study, plan
from .runs import PLAN, check_folder, execute, last_line

JOURNAL, BEST = "search.journal", "best.yaml"
TRIAL = {"eval_strategy": "epoch", "max_test_lists": 1, "baselines": "none"}  # of a trial: nothing of its test is read


@dataclass(frozen=True)
class Space:
    """options: name -> choices, or {low, high, log}; trials: how many, those made before among them."""

    options: dict[str, Any]
    trials: int
    seed: int

    @classmethod
    def of(cls, told: Any) -> Space:
        """`search:` of a study file; AlroFastError for what it does not hold."""
        if not isinstance(told, dict) or not told.keys() <= {"options", "trials", "seed"}:
            raise AlroFastError(f"search: {told!r}; expected options:, trials: and, if you like, seed:")
        options, trials, seed = told.get("options"), told.get("trials"), told.get("seed", 0)
        if not isinstance(options, dict) or not options:
            raise AlroFastError("search: needs options: option -> a list of choices, or {low: 1.0e-4, high: 1.0e-2}")
        if type(trials) is not int or trials < 1:
            raise AlroFastError(f"search: trials: {trials!r}; expected a whole number of at least 1")
        if type(seed) is not int or seed < 0:
            raise AlroFastError(f"search: seed: {seed!r}; expected a whole number of at least 0")
        for name, values in options.items():
            if name in TRIAL:
                raise AlroFastError(f"search: {name} is {TRIAL[name]} in every trial; leave it out of options:")
            _check_values(name, values)
        return cls(options, trials, seed)

    def corners(self) -> dict[str, dict[str, Any]]:
        """Variants in which every choice, and either end of every range, stands once: what is checked beforehand."""
        ends = {name: v if isinstance(v, list) else [v["low"], v["high"]] for name, v in self.options.items()}
        first = {name: values[0] for name, values in ends.items()}
        return {f"{name}={value}": first | {name: value} for name, values in ends.items() for value in values}

    def suggest(self, trial: Any) -> dict[str, Any]:
        """The options of an Optuna trial."""
        return {name: _suggest(trial, name, values) for name, values in self.options.items()}


def search(document: dict[str, Any], given: Mapping[str, Any], processes: int, dry_run: bool) -> dict[str, Any] | None:
    """The study that is left of a document with `search:` once its trials have run; another document as it is.

    given: the other arguments of `plan`. None for a dry run, which ends with every choice checked. Writes best.yaml.
    """
    if "search" not in document:
        return document
    space = Space.of(document["search"])
    if "variants" in document or "grid" in document or "baseline" in document:
        raise AlroFastError("search: stands in place of variants:, grid: and baseline:; leave those out")
    optuna = _optuna()
    bare = {key: value for key, value in document.items() if key not in ("search", "evaluate")}
    corners = plan(bare | {"variants": _as_trials(space.corners())}, **given)
    if not corners.ranks_lists or not re.fullmatch(r"ndcg@(1|3|5|10)", corners.metric) or corners.ranker != "tuned":
        raise AlroFastError(
            f"search: goes by ndcg@1, 3, 5 or 10 of `tuned` on the validation lists; given {corners.metric} of "
            f"`{corners.ranker}`"
        )
    without = {key: value for key, value in document.items() if key != "search"}
    base = plan(without | {"variants": {"base": {}}}, **given)
    print(f"{corners.name}: {space.trials} trials x {len(corners.seeds)} seeds in {corners.folder}", flush=True)
    if dry_run:
        return None
    check_folder(base)
    with held(corners.folder):
        return _carried_out(optuna, space, corners, document, given, processes)


def _carried_out(
    optuna: Any, space: Space, corners: Study, document: dict[str, Any], given: Mapping[str, Any], processes: int
) -> dict[str, Any]:
    """The trials that are left, and the study of the best beside the base."""
    bare = {key: value for key, value in document.items() if key not in ("search", "evaluate")}
    without = {key: value for key, value in document.items() if key != "search"}
    (corners.folder / PLAN).write_text(yaml.safe_dump({"search": document["search"]}, sort_keys=False))
    found = _opened(optuna, space, corners)
    waiting = [optuna.Trial(found, one._trial_id) for one in found.get_trials(states=[optuna.trial.TrialState.RUNNING])]
    while True:
        missing = space.trials - sum(one.state.name in ("COMPLETE", "FAIL") for one in found.trials) - len(waiting)
        waiting += [found.ask() for _ in range(min(missing, processes - len(waiting)))]
        if not waiting:
            break
        variants = _as_trials({f"trial-{trial.number}": space.suggest(trial) for trial in waiting})
        study = plan(bare | {"variants": variants}, **given)
        check_folder(study)
        failed = {run.variant: run for run in execute(study, processes, lambda _run, _seconds, complaint: complaint)}
        for trial in waiting:
            _tell(optuna, found, trial, study, failed.get(f"trial-{trial.number}"), space)
        waiting = []
    if not any(one.state.name == "COMPLETE" for one in found.trials):
        raise AlroFastError(f"every trial of the search failed; the logs are in {corners.folder / 'runs'}")
    best = found.best_trial
    left = {"variants": {"base": {}, f"best-{best.number}": dict(best.params)}, "baseline": "base"}
    left = without | left
    (corners.folder / BEST).write_text(yaml.safe_dump(left, sort_keys=False), encoding="utf-8")
    print(f"best: trial {best.number}, {corners.metric} {best.value:.4f} on the validation lists")
    print(f"{yaml.safe_dump(left, sort_keys=False)}written to {corners.folder / BEST}", flush=True)
    return left


def validated(run: PlannedRun, metric: str) -> float:
    """The metric on the validation lists as training ended; AlroFastError where the run has none."""
    path = run.measured / "trainer_state.json"
    values = []
    if path.is_file():
        with intact(path):
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            values = [float(entry[f"eval_{metric}"]) for entry in history if f"eval_{metric}" in entry]
    if not values:
        raise AlroFastError(f"{run.title} has not been measured on validation lists; prepare some, for search: goes by")
    return values[-1]


def _tell(optuna: Any, found: Any, trial: Any, study: Study, failed: PlannedRun | None, space: Space) -> None:
    name = f"trial-{trial.number}"
    try:
        if failed is not None:
            raise AlroFastError(f"{last_line(failed.log)} ({failed.log})")
        values = [validated(run, study.metric) for run in study.runs if run.variant == name]
    except AlroFastError as error:
        found.tell(trial, state=optuna.trial.TrialState.FAIL)
        print(f"{name}: failed: {error}", flush=True)
        return
    found.tell(trial, sum(values) / len(values))
    options = ", ".join(f"{key} {trial.params[key]}" for key in space.options)
    print(f"{name}: {study.metric} {sum(values) / len(values):.4f} on the validation lists with {options}", flush=True)


def _opened(optuna: Any, space: Space, study: Study) -> Any:
    """Optuna's study in the folder, new or gone on with; the sampler draws anew from where it is."""
    path = study.folder / JOURNAL
    base = json.loads(json.dumps(study.base, default=str))
    told = {"options": space.options, "metric": study.metric, "seeds": list(study.seeds), "base": base}
    try:
        if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            raise ValueError("cut within a line")
        journal = optuna.storages.journal.JournalFileBackend(str(path))
        storage = optuna.storages.JournalStorage(journal)
        found = optuna.create_study(study_name="search", storage=storage, direction="maximize", load_if_exists=True)
        before = dict(found.user_attrs.get("search", told))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError):
        raise AlroFastError(
            f"{path} is damaged; restore it (where only its last line is cut, remove that line), or give another "
            "--output_dir"
        ) from None
    for key, now in told.items():
        if json.dumps(before.get(key), sort_keys=True) != json.dumps(now, sort_keys=True):
            was, now = _differing(before.get(key), now)
            raise AlroFastError(
                f"{study.folder} holds a search with {key} {was}, and now has {now}: give another --output_dir"
            )
    found.set_user_attr("search", told)
    found.sampler = optuna.samplers.TPESampler(seed=space.seed + len(found.trials))
    return found


def _differing(was: Any, now: Any) -> tuple[Any, Any]:
    """Of two mappings what they do not share, for a complaint; anything else as it is."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return was, now
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return {key: was[key] for key in changed if key in was}, {key: now[key] for key in changed if key in now}


def _as_trials(variants: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: options | TRIAL for name, options in variants.items()}


def _check_values(name: str, values: Any) -> None:
    wrong = AlroFastError(
        f"search: {name}: {values!r}; expected a list of different choices, or {{low: 1.0e-4, high: 1.0e-2, log: true}}"
    )
    if isinstance(values, list):
        plain = all(isinstance(value, (str, int, float)) for value in values)
        if not plain or not values or len({str(value) for value in values}) < len(values):
            raise wrong
    elif not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
        raise wrong
    else:
        low, high, log = values["low"], values["high"], values.get("log", False)
        numbers = all(type(end) in (int, float) for end in (low, high)) and type(log) is bool
        if not numbers or not low < high or (log and low <= 0):
            raise wrong


def _suggest(trial: Any, name: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    whole = type(values["low"]) is int and type(values["high"]) is int
    suggest = trial.suggest_int if whole else trial.suggest_float
    return suggest(name, values["low"], values["high"], log=values.get("log", False))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise AlroFastError("search: needs Optuna; install it with: pip install 'alro-fast[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
