"""A study file -> the runs that it asks for, each of them checked before the first begins."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from ..errors import AlroFastError
from ..ranking.options import TASK_METHODS
from ..texts import from_yaml, is_file, read_text
from ..training.config import RECIPES, RECORDED, Config, as_flags, parse
from ..training.kinds import kind_of, stages

READY = RECIPES / "studies"
KEYS = (
    "name", "needs", "base", "variants", "grid", "search", "seeds", "metric", "ranker", "measured_on", "baseline",
    "evaluate",
)  # fmt: skip
OURS = {  # options that a study sets for each of its runs -> where they are said instead
    "seed": "give seeds:, or --seeds",
    "output_dir": "give the study's --output_dir",
    "resume_from_checkpoint": "an unfinished run is gone on with by itself",
    "overwrite_output_dir": "remove the run's folder to have it run again",
    "dry_run": "give --dry_run to the study",
    "hub_token": "log in, or set $HF_TOKEN: a study writes its options down",
}
EVALUATE = {"shuffles": 2, "limit": 1}  # options of `alro_fast.evaluate` a study may give, and their least value
MOST_SEEDS, MOST_VARIANTS = 1_000, 1_000
PREFERENCE_METRICS = ("pair_accuracy", "user_auc", "hit@1", "valid")  # means over records, pairs or users
RANKING_METRIC = re.compile(r"(ndcg|hr)@(1|3|5|10)|mrr")


@dataclass(frozen=True)
class PlannedRun:
    """One training run: a variant with a seed.

    words: of `alro_fast.train`'s command line. stages: folder -> the options that the run records in it, of each stage;
    the last one holds what is measured.
    """

    variant: str
    seed: int
    folder: Path
    words: tuple[str, ...]
    stages: dict[Path, dict[str, Any]]

    @property
    def title(self) -> str:
        """As progress and complaints name it."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def measured(self) -> Path:
        """The folder with the run's results."""
        return list(self.stages)[-1]

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Study:
    """Runs in the order they are begun: seed by seed, so that a broken-off study compares all variants on some seeds.

    measured_on: which of several preference files is measured; None: the first. evaluate: options of
    `alro_fast.evaluate` after every run; empty: none is made.
    """

    name: str
    folder: Path
    variants: dict[str, dict[str, Any]]  # the options in which they differ
    base: dict[str, Any]
    seeds: tuple[int, ...]
    metric: str
    ranker: str
    measured_on: str | None
    baseline: str
    evaluate: dict[str, int]
    ranks_lists: bool
    runs: tuple[PlannedRun, ...]

    def evaluation(self, run: PlannedRun) -> Path:
        """Where the evaluation of a run goes: named by its options, so that others never pass for it."""
        told = "-".join(f"{name}-{value}" for name, value in self.evaluate.items())
        return run.folder.with_name(f"{run.folder.name}-{told}")

    def described(self) -> dict[str, Any]:
        """For study.yaml: the study as it is run, ready files and changes of the command line resolved."""
        told = {"name": self.name, "base": self.base, "variants": self.variants, "seeds": list(self.seeds)}
        told |= {"metric": self.metric, "ranker": self.ranker, "baseline": self.baseline}
        told |= {"evaluate": self.evaluate} if self.evaluate else {}
        return told | ({"measured_on": self.measured_on} if self.measured_on else {})


def study_names() -> list[str]:
    """Names of the ready studies."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def read_study(name: str) -> dict[str, Any]:
    """A study file, or a ready study by its name; AlroFastError for a file that is none, or an unknown key."""
    ready = READY / f"{name}.yaml"
    path = ready if ready.is_file() else Path(name)
    if not is_file(path):
        raise AlroFastError(f"{name}: no such file or study; ready studies: {', '.join(study_names())}")
    expected = f"expected YAML with the keys {', '.join(KEYS)}"
    try:
        document = from_yaml(read_text(path), "it")
    except AlroFastError as error:
        raise AlroFastError(f"{name} is no study: {error}; {expected}") from None
    if not isinstance(document, dict):
        raise AlroFastError(f"{name} is no study: {expected}")
    for key in document:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else f"; expected some of {', '.join(KEYS)}"
            hint = f", as YAML reads a bare `on` or `yes`{hint}" if key is True else hint
            raise AlroFastError(f"{name}: unknown key {key!r}{hint}")
    return {"name": path.stem} | document


def plan(
    document: Mapping[str, Any],
    *,
    changes: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    output_dir: str | Path | None = None,
) -> Study:
    """The study of a document as `read_study` gives it, every run parsed and its data looked at.

    changes: what the study needs, by name, and options that take the place of those of `base`. Raises AlroFastError,
    naming the variant, for what `alro_fast.train` would refuse.
    """
    name, document = document["name"], dict(document)
    document = _filled(document, changes or {})
    needed = _mapping(document, "needs")
    base = {"disable_tqdm": True} | _mapping(document, "base")
    base |= {key: value for key, value in (changes or {}).items() if key not in needed}
    variants = _variants(document)
    chosen = tuple(document.get("seeds", (0,)) if seeds is None else seeds)
    if not chosen or len(set(chosen)) < len(chosen) or not all(type(seed) is int and seed >= 0 for seed in chosen):
        raise AlroFastError(f"seeds: {list(chosen)!r}; expected different whole numbers, such as [0, 1, 2]")
    baseline = document.get("baseline", next(iter(variants)))
    if baseline not in variants:
        raise AlroFastError(f"baseline: {baseline!r} is no variant; expected one of {', '.join(variants)}")
    folder = Path(output_dir or Path("out") / name).absolute()
    for variant, options in (("base", base), *((f"variant {name}", each) for name, each in variants.items())):
        for key in options.keys() & OURS.keys():
            raise AlroFastError(f"{variant}: {key} is the study's own; {OURS[key]}")
    runs, ends = [], {}
    for seed, (variant, options) in itertools.product(chosen, variants.items()):
        run, ends[variant] = _planned(variant, seed, base | options, folder)
        runs.append(run)
    kinds = {name: last.description.ranks_lists for name, last in ends.items()}
    if len(set(kinds.values())) > 1:
        one, other = (next(name for name, kind in kinds.items() if kind is ranks) for ranks in (True, False))
        raise AlroFastError(f"{one} ranks lists, {other} is measured on preferences: no metric compares them")
    ranks_lists = next(iter(kinds.values()))
    metric = document.get("metric", "ndcg@3" if ranks_lists else "pair_accuracy")
    known = bool(RANKING_METRIC.fullmatch(str(metric))) if ranks_lists else metric in PREFERENCE_METRICS
    if not known:
        offered = "ndcg@ or hr@ 1, 3, 5 or 10, or mrr" if ranks_lists else f"one of {', '.join(PREFERENCE_METRICS)}"
        raise AlroFastError(f"metric: {metric!r} is unknown; expected {offered}")
    ranker, data = document.get("ranker", "tuned"), document.get("measured_on")
    evaluation = _evaluation(document, ranks_lists)
    for variant, last in ends.items():
        _check_compared(variant, last, ranker, data, bool(evaluation))
    return Study(
        name, folder, variants, base, chosen, metric, ranker, data, baseline, evaluation, ranks_lists, tuple(runs)
    )


def _check_compared(variant: str, last: Config, ranker: Any, data: Any, evaluates: bool) -> None:
    """AlroFastError where the predictions of a run, by its last stage, will not hold what is to be compared."""
    if last.description.ranks_lists:
        offered = ["untuned", "tuned", *(TASK_METHODS[:-1] if last.description.run == "tasks" else ())]
        if evaluates and not last.model.use_peft:
            offered.remove("untuned")
        if last.data.fuse and not evaluates:
            offered.append("fused")
        hint = " (fused: with the option fuse: true, and without evaluate:)" if ranker == "fused" else ""
    else:
        offered, hint = ["tuned", "untuned" if last.model.init_adapter is None else "earlier stage"], ""
    if ranker not in offered:
        raise AlroFastError(
            f"ranker: {ranker!r} is no row of variant {variant}; expected one of {', '.join(offered)}{hint}"
        )
    names = [Path(file).stem for file in last.data.eval_preferences]
    if not last.description.ranks_lists and last.data.preferences is not None and not names:
        raise AlroFastError(f"variant {variant} has nothing to measure: give eval_preferences: [FILE]")
    if data is None:
        return
    if not names:
        raise AlroFastError(f"measured_on: is for runs with eval_preferences; variant {variant} has none, leave it out")
    if data not in names:
        raise AlroFastError(
            f"measured_on: {data!r} is none of the eval_preferences of variant {variant}; expected one of "
            f"{', '.join(names)}"
        )


def _planned(variant: str, seed: int, options: Mapping[str, Any], folder: Path) -> tuple[PlannedRun, Config]:
    """A run, and the configuration of its last stage."""
    place = folder / "runs" / _folder_name(variant) / f"seed-{seed}"
    words = [*itertools.chain(*(as_flags(key, value) for key, value in options.items())), "--seed", str(seed)]
    with_folder = [*words, "--output_dir", str(place)]
    recorded: dict[Path, dict[str, Any]] = {}
    try:
        config = parse(with_folder)
        for stage in stages(config, with_folder):
            if config.training.stages is None:
                kind_of(stage).settle(stage)
                kind_of(stage).given(stage)
            recorded[Path(cast(str, stage.training.output_dir))] = told_apart(stage.to_dict())
    except AlroFastError as error:
        raise AlroFastError(f"variant {variant}: {error}") from error
    return PlannedRun(variant, seed, place, tuple(words), recorded), stage


def as_told(options: Mapping[str, Any]) -> str:
    """Options as words of a command line; those that are taken back are named."""
    return " ".join(" ".join(as_flags(key, value)) or f"(without --{key})" for key, value in options.items())


def told_apart(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make two runs different ones, as a run's config.yaml writes them."""
    kept = {key: value for key, value in options.items() if key not in OURS or key == "seed"}
    if kept.get("data_dir") is not None:
        kept["data_dir"] = str(Path(kept["data_dir"]).absolute())
    return {k: v for k, v in yaml.safe_load(yaml.safe_dump(kept)).items() if k not in RECORDED}


def _variants(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    variants, grid = _mapping(document, "variants"), _mapping(document, "grid")
    if bool(variants) == bool(grid):
        raise AlroFastError("a study has variants: (name -> options) or grid: (option -> values), one of the two")
    if grid:
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise AlroFastError(f"grid: {key}: {values!r}; expected a list of values")
        if math.prod(map(len, grid.values())) > MOST_VARIANTS:
            raise AlroFastError(f"grid: it has more than {MOST_VARIANTS:,} variants; leave some values out")
        rows = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
        variants = {", ".join(f"{key}={value}" for key, value in row.items()): row for row in rows}
    for name, options in variants.items():
        if not isinstance(options, dict | None) or not all(isinstance(key, str) for key in options or ()):
            raise AlroFastError(f"variants: {name}: {options!r}; expected options, such as {{alpha: 0.5}}")
    named: dict[str, str] = {}
    for name in variants:
        other = named.setdefault(_folder_name(str(name)), str(name))
        if other != str(name):
            raise AlroFastError(f"variants {other} and {name} would share a folder; rename one of them")
    return {str(name): dict(options or {}) for name, options in variants.items()}


def _evaluation(document: Mapping[str, Any], ranks_lists: bool) -> dict[str, int]:
    options = _mapping(document, "evaluate")
    if options and not ranks_lists:
        raise AlroFastError("evaluate: is for rankings; runs on preferences are measured as they end")
    for key, value in options.items():
        if key not in EVALUATE:
            raise AlroFastError(f"evaluate: unknown option {key!r}; expected some of {', '.join(EVALUATE)}")
        if type(value) is not int or value < EVALUATE[key]:
            raise AlroFastError(f"evaluate: {key}: {value!r}; expected a whole number of at least {EVALUATE[key]}")
    if options and "shuffles" not in options:
        raise AlroFastError("evaluate: needs shuffles: in how many orders every list is shown, such as 4")
    return options


def _filled(document: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the values of what it needs in the place of their names in braces."""
    needs = _mapping(document, "needs")
    for name, what in needs.items():
        if name not in changes:
            raise AlroFastError(f"study {document['name']} needs {what}; give --set {name}=...")

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [fill(entry) for entry in value]
        for name in needs if isinstance(value, str) else ():
            value = value.replace(f"{{{name}}}", str(changes[name]))
        return value

    return document | {key: fill(document[key]) for key in ("base", "variants", "grid") if key in document}


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise AlroFastError(f"{key}: {value!r}; expected a mapping")
    return dict(value)


def _folder_name(variant: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", variant).strip("._") or "variant"


def parse_seeds(text: str) -> list[int]:
    """`0-4` or `0,2,5`."""
    found: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if span is None:
            raise AlroFastError(f"--seeds {text!r}; expected numbers such as 0-4 or 0,2,5")
        first, last = int(span[1][:12]), int((span[2] or span[1])[:12])  # twelve digits tell that it is too many
        if last >= 2**32 or last - first >= MOST_SEEDS:
            raise AlroFastError(f"--seeds {text!r:.60}; expected at most {MOST_SEEDS:,} numbers below {2**32:,}")
        found += range(first, last + 1)
    return found
