"""Options of `alro_fast.train`: a field is a command-line flag is a YAML key. The command line wins over the file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import yaml
from transformers import HfArgumentParser

from ..data.lists import read_manifest
from ..errors import AlroFastError
from ..objectives.base import Description, describe, descriptions, objective_arguments
from ..ops import DIVERGENCES
from ..options import DataArguments, ModelArguments, ObjectiveArguments, RankerTrainingArguments, Where
from ..prompts.scale import default_template
from ..run_folder import as_now_called
from ..texts import from_yaml, is_file, read_text
from .help import groups, help_text
from .unread import WITHOUT_MEANING, Unread, objectives_of, unread, without_meaning

_SECRETS = {"hub_token"}
RECORDED = ("alro_fast_version", "learned_answers")  # in the config.yaml of a run beside its options
RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass
class Config:
    """Everything a run is made of; `recipe` names its output folder. objective.objective: what is really trained, such
    as sft_chosen where `--objective sft` is trained on answers."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    training: RankerTrainingArguments
    recipe: str

    @property
    def description(self) -> Description:
        """Of the objective."""
        return describe(self.objective.objective)

    @property
    def budget(self) -> int:
        """Tokens of one forward pass that trains nothing."""
        return self.training.eval_tokens_per_batch or self.training.tokens_per_batch

    def to_dict(self) -> dict[str, Any]:
        """The options that the run reads, of transformers' those that differ from their defaults: for config.yaml."""
        resolved: dict[str, Any] = {}
        for part in (self.model, self.data, self.objective):
            resolved |= dataclasses.asdict(part)
        given: dict[str, Any] = self.training.to_dict()  # type: ignore[no-untyped-call]
        for entry in dataclasses.fields(RankerTrainingArguments):
            value = given.get(entry.name)
            changed = _plain(value) and value and value != _default(entry) and entry.name not in _SECRETS
            if entry.name in RankerTrainingArguments.__annotations__ or (entry.init and changed):
                resolved[entry.name] = value
        options = self.flat()
        return {name: value for name, value in resolved.items() if unread(name, options) is None}

    def flat(self) -> SimpleNamespace:
        """All options as attributes of one object, as `unread` takes them."""
        return SimpleNamespace(**vars(self.model), **vars(self.data), **vars(self.objective), **vars(self.training))


def parse(argv: Sequence[str], stage: Sequence[str] = ()) -> Config:
    """Flags and an optional `--config` (a YAML file, or the name of a ready recipe) -> Config.

    stage: flags of one stage of `--stages`, which nobody wrote; they win.

    Raises AlroFastError for an unknown flag or key, a value of the wrong type, a file that is no configuration, or an
    option that the run does not read. One of a file is left out where the command line decided that it is not read, or
    a run recorded it.
    """
    argv = list(argv)
    if any(word in ("-h", "--help") or word.startswith("--help=") for word in argv):
        print_help(argv)
    parser = _parser(_kinds())
    name = _config_name(argv)
    known = {entry.name: entry for part in _kinds() for entry in dataclasses.fields(part) if entry.init}
    for word, value in itertools.pairwise(argv):
        if value == "" and word.startswith("--") and "=" not in word and word != "--config":
            raise AlroFastError(f"{word} is given an empty value; give another, or leave it out")
    flags = {_flag(word, known) for word in argv}
    if name is None and not flags & {"model_name_or_path", "data_dir", "dataset", "preferences", "stage_preferences"}:
        name = "demo"
    values = read_recipe(name) if name is not None else {}
    of_a_run = not values.keys().isdisjoint(RECORDED)  # the version before recorded what a run did not read, too
    values = as_now_called(values) if of_a_run else values
    values = {key: value for key, value in values.items() if key not in RECORDED}
    for key, value in values.items():
        if key not in known:
            parser.error(f"{name}: unknown option {key!r}{_hint(key, known)}")
        if isinstance(value, list) and "list" not in str(known[key].type):
            parser.error(f"{name}: {key} is a list, {value!r:.60}; expected one value")
        if "\0" in str(value):
            parser.error(f"{name}: {key} holds a null character, which no name or value has")
    words = {key: as_flags(key, value) for key, value in values.items()}
    options, extra = parser.parse_known_args([*itertools.chain(*words.values()), *argv, *stage])
    if extra:
        parser.error(f"unknown option {extra[0]!r}{_hint(_flag(extra[0], known), known)}")
    objectives = objectives_of(options)
    found: dict[str, Unread] = {}
    for key in [key for key in known if key in flags or words.get(key)]:
        why = unread(key, options)
        if why is None or (key in WITHOUT_MEANING and not without_meaning(key, getattr(options, key))):
            continue
        if key in flags or not (of_a_run or why.decided_by & flags):
            found[key] = why
        else:
            del words[key]
    if found:  # first what others depend on
        causes = (key for key, why in found.items() if not (why.decided_by - {key}) & found.keys())
        raise AlroFastError(found[next(causes, next(iter(found)))].message)
    try:
        *parts, _ = parser.parse_args_into_dataclasses(
            [*itertools.chain(*words.values()), *argv, *stage], look_for_args_file=False
        )
    except AlroFastError:
        raise
    except (ValueError, TypeError, KeyError, ImportError) as error:  # raised by TrainingArguments' own checks
        raise AlroFastError(str(error).strip().splitlines()[0]) from error
    model, data, objective, training = parts[:4]
    config = Config(model, data, objective, training, Path(name).stem if name else "run")
    if config.objective.psl not in DIVERGENCES:  # which the ops know, and options.py lies below them
        parser.error(f"--psl {config.objective.psl!r}: expected one of {', '.join(DIVERGENCES)}")
    settle_template(config)
    chosen, stages = config.objective.objective, config.training.stages
    trained = {named: one.name for one in objectives for named in (one.name, one.stands_for)}
    if stages is not None and "objective" in flags and chosen not in trained:
        raise AlroFastError(f"--objective {chosen} is none of --stages {stages}; leave one of them out")
    config.objective.objective = trained.get(chosen, chosen)
    return config


def settle_template(config: Config) -> None:
    """The template that suits the data, where none is given; AlroFastError for one that the objective has no use for.

    A folder that is no prepared one is named when it is opened.
    """
    data, prompts = config.data, config.description.prompts
    if unread("template", config.flat()) is not None:
        return
    if data.template is None:
        manifest = {"dataset": data.dataset} if data.data_dir is None else read_manifest(Path(data.data_dir))
        if manifest is None:
            return
        data.template = default_template(manifest, prompts)
    try:
        prompts.find_template(data.template)
    except AlroFastError:
        for other in (one for one in descriptions().values() if one.prompts is not prompts):
            if _is_template(other.prompts, data.template):
                raise AlroFastError(
                    f"--template {data.template} is for --objective {other.title}, not {config.description.title}; "
                    f"give one of {', '.join(prompts.ready_templates())}, or a YAML file of the same keys"
                ) from None
        raise


def _is_template(prompts: Any, name: str) -> bool:
    try:
        prompts.find_template(name)
    except AlroFastError:
        return False
    return True


def defaults() -> dict[str, Any]:
    """Of every option, by name."""
    return {entry.name: _default(entry) for part in _kinds() for entry in dataclasses.fields(part) if entry.init}


def print_help(argv: Sequence[str]) -> NoReturn:
    """What `--help`, or `--help GROUP`, asks for; ends the command."""
    argv = list(itertools.chain(*(word.split("=", 1) if word.startswith("--help=") else [word] for word in argv)))
    at = next(place for place, word in enumerate(argv) if word in ("-h", "--help"))
    group = argv[at + 1] if at + 1 < len(argv) and not argv[at + 1].startswith("-") else None
    if group is not None and group not in (*groups(), "all"):
        raise AlroFastError(f"--help {group!r} is no group of options; expected one of {', '.join(groups())}, or all")
    print(help_text(group, recipe_names()))
    raise SystemExit(0)


def recipe_names() -> list[str]:
    """Names that `--config` accepts besides a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Keys and values of a recipe file; AlroFastError when it is missing or not a flat YAML mapping."""
    if not name:
        raise AlroFastError(f"--config is empty; expected a YAML file, or one of {', '.join(recipe_names())}")
    ready = RECIPES / f"{name}.yaml"
    path = ready if ready.is_file() else Path(name)
    if not is_file(path):
        raise AlroFastError(f"--config {name}: no such file or recipe; ready recipes: {', '.join(recipe_names())}")
    expected = "expected YAML lines such as 'learning_rate: 2e-4'; prepared data goes to --data_dir"
    try:
        values = from_yaml(read_text(path), "it")
    except AlroFastError as error:
        raise AlroFastError(f"--config {name} is not a configuration: {error}; {expected}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise AlroFastError(f"--config {name} is not a configuration: {expected}")
    return values


def _kinds() -> tuple[type, ...]:
    return ModelArguments, DataArguments, objective_arguments(), RankerTrainingArguments


@functools.lru_cache(maxsize=1)
def _parser(kinds: tuple[type, ...]) -> _Parser:
    parser = _Parser(cast(Any, kinds), allow_abbrev=False, prog="python -m alro_fast.train", add_help=False)
    parser.add_argument("--config")
    return parser


class _Parser(HfArgumentParser):
    def add_argument(self, *names: str, read: Where | None = None, **how: Any) -> argparse.Action:
        """Metadata of fields come as keywords; where an option is read is no matter of argparse."""
        return super().add_argument(*names, **how)

    def error(self, message: str) -> NoReturn:
        raise AlroFastError(f"{message}; python -m alro_fast.train --help lists the options")


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _flag(argument: str, known: Iterable[str]) -> str:
    """The option that a word of the command line names; "" for a value. --no_x, which argparse knows, names x."""
    name = argument.lstrip("-").split("=")[0].replace("-", "_") if argument.startswith("--") else ""
    switched = name.removeprefix("no_")
    return switched if switched in known and name not in known else name


def _config_name(argv: Sequence[str]) -> str | None:
    names = []
    for i, argument in enumerate(argv):
        if argument == "--config":
            if i + 1 == len(argv):
                raise AlroFastError("--config needs a YAML file or the name of a recipe")
            names.append(argv[i + 1])
        if argument.startswith("--config="):
            names.append(argument.split("=", 1)[1])
    if len(names) > 1:
        raise AlroFastError(f"--config is given {len(names)} times ({', '.join(names)}); give one, and flags beside it")
    return names[0] if names else None


def as_flags(key: str, value: Any) -> list[str]:
    """A YAML entry as command-line words, so that both go through the same checks. None: the option's default."""
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{key}", yaml.safe_dump(value, default_flow_style=True).strip()]
    return [f"--{key}", str(value)]


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
