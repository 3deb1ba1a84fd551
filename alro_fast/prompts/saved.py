"""The prompts of a run, in its folder: prompt_template.yaml as it was, and a JSON file with what else they depend on.

The name of the JSON file says which prompts they are. It also records the tokens they are made of, so that a folder
whose tokenizer or template was changed is refused rather than misread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import AlroFastError
from .builder import PromptBuilder
from .encoding import Encoder
from .recranker.prompts import RecRankerPrompts
from .recranker.task_template import parse_task_template
from .template import TEMPLATE_FILE, parse_template

Prompts = PromptBuilder | RecRankerPrompts


class Kind(NamedTuple):
    """One kind of prompts, its JSON file, and how both files are read."""

    prompts: type[Prompts]
    file: str
    parse: Callable[..., Any]
    options: Callable[[dict[str, Any]], dict[str, Any]]


KINDS = (
    Kind(
        PromptBuilder,
        "identifiers.json",
        parse_template,
        lambda record: {name: record[name] for name in ("identifiers", "max_length")},
    ),
    Kind(RecRankerPrompts, "recranker.json", parse_task_template, lambda record: dict(record["options"])),
)


def save(prompts: Prompts, folder: str | Path) -> None:
    """Write both files; `load` makes the same prompts of them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (kind,) = (kind for kind in KINDS if isinstance(prompts, kind.prompts))
    (folder / TEMPLATE_FILE).write_text(prompts.template.source, encoding="utf-8")
    content = json.dumps(prompts.record(), indent=1, ensure_ascii=False)
    (folder / kind.file).write_text(content + "\n", encoding="utf-8")


def load(folder: str | Path, tokenizer: PreTrainedTokenizerBase, wanted: type[Prompts] | None = None) -> Prompts:
    """The prompts saved in `folder`, of the kind found there.

    Raises AlroFastError: no prompts there, or damaged ones; prompts of another class than `wanted`; a tokenizer that is
    not the one they were saved with.
    """
    folder = Path(folder)
    kind = _kind_in(folder)
    if wanted is not None and kind.prompts is not wanted:
        others = ", ".join(other.file for other in KINDS if other.prompts is wanted)
        raise AlroFastError(f"{folder} holds the prompts of {kind.file}, and those of {others} are needed here")
    source = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    try:
        record = json.loads((folder / kind.file).read_text(encoding="utf-8"))
        options, name, known = kind.options(record), record["template"], record["tokenizer"]
    except (ValueError, KeyError, TypeError):
        raise AlroFastError(f"{folder / kind.file} is damaged: expected what training wrote; restore it") from None
    encoder = Encoder(tokenizer)
    if encoder.fingerprint() != (known.get("fingerprint") if isinstance(known, dict) else known):
        raise AlroFastError(
            f"tokenizer {encoder.name!r} is not the one {folder} was made with; load the tokenizer saved in that folder"
        )
    template = kind.parse(source, name=name, origin=str(folder / TEMPLATE_FILE))
    prompts = kind.prompts(tokenizer, template, **options)
    again = json.loads(json.dumps(prompts.record()))
    if again | {"tokenizer": known} != record:  # the tokenizer's folder may have moved
        raise AlroFastError(f"{folder / kind.file} does not fit {TEMPLATE_FILE} beside it; restore both")
    return prompts


def _kind_in(folder: Path) -> Kind:
    found = [kind for kind in KINDS if (folder / kind.file).is_file()]
    if len(found) > 1:
        raise AlroFastError(f"{folder} holds {' and '.join(kind.file for kind in found)}; expected one of them")
    if not found or not (folder / TEMPLATE_FILE).is_file():
        missing = TEMPLATE_FILE if found else f"{TEMPLATE_FILE} with {' or '.join(kind.file for kind in KINDS)}"
        raise AlroFastError(
            f"{folder} holds no prompt settings: expected {missing}, as in the output folder of a training run"
        )
    return found[0]
