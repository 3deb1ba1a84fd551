"""The words of RecRanker's three tasks (arXiv 2312.16018): a YAML file, read and checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import AlroFastError
from ...texts import is_file
from ..template import ONE_TO_FIVE, TEMPLATES, filled, parse_grades, parse_scale, parse_yaml, placeholders, read_text

TASK_TEMPLATES = TEMPLATES / "recranker"
TEXTS = {  # every text of a template file -> the placeholders it must hold, in this order
    "system": (),
    "introduction": (),
    "rated": (),
    "rated_line": ("title", "rating"),
    "liked": (),
    "disliked": (),
    "title_line": ("title",),
    "none": (),
    "rating_format": (),
    "hint_format": (),
    "unknown": (),
    "point.task": (),
    "point.question": ("title",),
    "point.hint": ("hint",),
    "point.answer": ("grade",),
    "pair.question": ("first", "second"),
    "pair.hint": ("hint",),
    "pair.answer": ("choice",),
    "pair.first": (),
    "pair.second": (),
    "list.question": (),
    "list.letters_line": ("identifier", "title"),
    "list.items_line": ("identifier",),
    "list.titles_line": ("title",),
    "list.letters_separator": (),
    "list.items_separator": (),
    "list.titles_separator": (),
    "list.hint": ("identifiers",),
    "list.answer": ("identifiers",),
}
NUMBERS = ("like", "dislike")
LAST = ("point.answer", "pair.answer", "list.answer", "list.hint")  # texts that end with their placeholder
MULTILINE = ("system", "introduction", "point.task", "list.question")


@dataclass(frozen=True)
class TaskTemplate:
    """One template: `texts` holds every key of TEXTS; `like`, `dislike` are ratings on the data's scale."""

    name: str
    source: str  # the file as written, its scale filled in
    texts: Mapping[str, str]
    grades: Mapping[str, float]  # text of a grade -> the rating it stands for
    like: float
    dislike: float
    scale: tuple[float, float] | None = None  # lowest and highest rating that its words speak of; None: it names none

    def __getitem__(self, key: str) -> str:
        return self.texts[key]


def ready_task_templates() -> list[str]:
    """Names of the templates of the three tasks shipped with the package."""
    return sorted(path.stem for path in TASK_TEMPLATES.glob("*.yaml"))


def load_task_template(template: str | Path, ratings: Iterable[float] = ONE_TO_FIVE) -> TaskTemplate:
    """Read a ready template by its name, or any YAML file by its path.

    ratings: those of the data, for a template that takes its scale from them (`template.filled`).
    """
    path = TASK_TEMPLATES / f"{template}.yaml"
    if str(template) not in ready_task_templates():
        path = Path(template)
    if not is_file(path):
        ready = ", ".join(ready_task_templates())
        raise AlroFastError(
            f"no prompt template {str(template)!r} for objective recranker: expected one of {ready}, or the path of a "
            "YAML file"
        )
    return parse_task_template(filled(read_text(path), ratings), name=path.stem, origin=str(path))


def parse_task_template(source: str, *, name: str, origin: str) -> TaskTemplate:
    """Check the text of a template file; `origin` says in errors where it came from."""
    content = parse_yaml(source, origin)
    if not isinstance(content, dict):
        raise AlroFastError(f"{origin} is not a prompt template of the three tasks: expected keys such as point, pair")
    scale = parse_scale(content.pop("scale", None), origin)
    flat: dict[str, Any] = {}
    for key, value in content.items():
        nested = value if key in ("point", "pair", "list") and isinstance(value, dict) else None
        flat |= {str(key): value} if nested is None else {f"{key}.{inner}": text for inner, text in nested.items()}
    known = {*TEXTS, *NUMBERS, "point.grades"}
    wrong = sorted(flat.keys() - known), sorted(known - flat.keys() - {"system"})
    for keys, problem in zip(wrong, ("unknown key", "missing key")):
        if keys:
            raise AlroFastError(
                f"{origin}: {problem} {keys[0]!r}; a prompt template of the three tasks has the keys "
                f"{', '.join(sorted(known))}"
            )
    texts = {key: flat.get(key, "") for key in TEXTS}
    for key, text in texts.items():
        _check(key, text, origin)
    for key in ("rating_format", "hint_format"):
        try:
            f"{4.5:{texts[key]}}"
        except ValueError:
            raise AlroFastError(
                f"{origin}: {key} {texts[key]!r} is no format of a number; expected one such as g or .1f"
            ) from None
    like, dislike = (flat[name] for name in NUMBERS)
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (like, dislike)):
        raise AlroFastError(
            f"{origin}: like and dislike are {like!r} and {dislike!r}; expected ratings such as 4 and 2"
        )
    grades = parse_grades(flat["point.grades"], origin, "point.grades")
    return TaskTemplate(name, source, texts, grades, float(like), float(dislike), scale)


def _check(key: str, text: Any, origin: str) -> None:
    if not isinstance(text, str):
        raise AlroFastError(f"{origin}: {key} must be a text in quotes, not {text!r}")
    try:
        found = [field for _, field in placeholders(text) if field is not None]
    except ValueError as error:
        raise AlroFastError(f"{origin}: {key} {text!r} cannot be read: {error}; write a literal brace twice") from None
    if found != list(TEXTS[key]):
        needed = " then ".join(f"{{{name}}}" for name in TEXTS[key]) or "no placeholder"
        raise AlroFastError(f"{origin}: {key} {text!r} must hold {needed}")
    if key in LAST and not text.endswith("}"):
        raise AlroFastError(f"{origin}: {key} {text!r} must end with {{{TEXTS[key][-1]}}}")
    if "\n" in text and key not in MULTILINE:
        raise AlroFastError(f"{origin}: {key} must be a single line")
