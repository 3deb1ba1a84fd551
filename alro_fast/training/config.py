"""Options of `alro_fast.train`: a field is a command-line flag is a YAML key. The command line wins over the file."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..errors import AlroFastError
from ..ops import DIVERGENCES
from ..options import DataArguments, ModelArguments, ObjectiveArguments, RankerTrainingArguments

_SECRETS = {"hub_token"}
_TOKENS = "batches are measured in tokens"
_EVERY_TREE = "every batch is a tree of another shape, to be compiled anew"
WITHOUT_MEANING = {  # options of transformers.TrainingArguments that packed batches or our losses leave nothing to do
    "per_device_train_batch_size": f"{_TOKENS}; give --tokens_per_batch",
    "per_device_eval_batch_size": f"{_TOKENS}; give --eval_tokens_per_batch",
    "auto_find_batch_size": f"{_TOKENS}; lower --tokens_per_batch where memory runs out",
    "train_sampling_strategy": f"{_TOKENS} and packed by length, in an order drawn by --seed; leave it out",
    "dataloader_drop_last": "no batch is left over; leave it out",
    "label_smoothing_factor": "the loss is that of --objective; leave it out",
    "neftune_noise_alpha": "its noise goes by the length of a sequence, and batches are packed into one; leave it out",
    "include_num_input_tokens_seen": "the log counts tokens already; leave it out",
    "use_liger_kernel": "the layers are fused already; leave it out",
    "torch_compile": f"{_EVERY_TREE}; leave it out",
    "torch_compile_backend": f"{_EVERY_TREE}; leave it out",
    "torch_compile_mode": f"{_EVERY_TREE}; leave it out",
}
RECIPES = Path(__file__).parents[1] / "recipes"


ARGUMENTS = (ModelArguments, DataArguments, ObjectiveArguments, RankerTrainingArguments)


@dataclass
class Config:
    """Everything a run is made of; `recipe` names its output folder."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    training: RankerTrainingArguments
    recipe: str

    def to_dict(self) -> dict[str, Any]:
        """Our own fields in full, and those of transformers that differ from their defaults: what config.yaml holds."""
        resolved: dict[str, Any] = {}
        for part in (self.model, self.data, self.objective):
            resolved |= dataclasses.asdict(part)
        given = self.training.to_dict()
        for entry in dataclasses.fields(RankerTrainingArguments):
            value = given.get(entry.name)
            changed = _plain(value) and value and value != _default(entry) and entry.name not in _SECRETS
            if entry.name in RankerTrainingArguments.__annotations__ or (entry.init and changed):
                resolved[entry.name] = value
        return resolved


def parse(argv: Sequence[str]) -> Config:
    """Flags and an optional `--config` (a YAML file, or the name of a ready recipe) -> Config.

    Raises AlroFastError for an unknown flag or key, a value of the wrong type, or a file that is no configuration.
    """
    argv = list(argv)
    parser = _Parser(ARGUMENTS, allow_abbrev=False, prog="python -m alro_fast.train", description=__doc__)
    parser._option_string_actions["--psl"].choices = list(DIVERGENCES)  # what the ops know
    parser.add_argument("--config", help=f"YAML file, or one of: {', '.join(recipe_names())}. Default: demo.")
    name = _config_name(argv)
    if name is None and not any(_flag(a) in {"model_name_or_path", "data_dir", "dataset", "preferences"} for a in argv):
        name = "demo"
    values = read_recipe(name) if name else {}
    known = {entry.name: entry for part in ARGUMENTS for entry in dataclasses.fields(part) if entry.init}
    for key in values:
        if key not in known:
            parser.error(f"{name}: unknown option {key!r}{_hint(key, known)}")
    from_file = [word for key, value in values.items() for word in _as_flags(key, value)]
    try:
        *parts, extra = parser.parse_args_into_dataclasses(
            from_file + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except AlroFastError:
        raise
    except (ValueError, TypeError, KeyError, ImportError) as error:  # raised by TrainingArguments' own checks
        raise AlroFastError(str(error).strip().splitlines()[0]) from error
    if extra:
        parser.error(f"unknown option {extra[0]!r}{_hint(_flag(extra[0]), known)}")
    given = {_flag(word) for word in from_file + argv}
    for key, reason in WITHOUT_MEANING.items():
        if key in given and getattr(parts[3], key) not in (None, 0, "no"):  # switched off explicitly is no mistake
            raise AlroFastError(f"--{key} has no meaning here: {reason}")
    return Config(*parts[:4], recipe=Path(name).stem if name else "run")


def recipe_names() -> list[str]:
    """Names that `--config` accepts besides a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Keys and values of a recipe file; AlroFastError when it is missing or not a flat YAML mapping."""
    ready = RECIPES / f"{name}.yaml"
    path = ready if ready.is_file() else Path(name)
    if not path.is_file():
        raise AlroFastError(f"--config {name}: no such file or recipe; ready recipes: {', '.join(recipe_names())}")
    problem = AlroFastError(
        f"--config {name} is not a configuration: expected YAML lines such as 'learning_rate: 2e-4'; "
        "prepared data goes to --data_dir"
    )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise problem from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise problem
    return values


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AlroFastError(f"{message}; python -m alro_fast.train --help lists the options")


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _flag(argument: str) -> str:
    return argument.lstrip("-").split("=")[0].replace("-", "_") if argument.startswith("--") else ""


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


def _as_flags(key: str, value: Any) -> list[str]:
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


def _default(entry: dataclasses.Field) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
