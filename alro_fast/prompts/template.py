"""The words of a prompt: a YAML file, read and checked before anything runs."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import texts
from ..data.signal_table import SIGNALS, bucket
from ..errors import AlroFastError

TEMPLATES = Path(__file__).parents[1] / "templates"
TEMPLATE_FILE = "prompt_template.yaml"  # of a run
MAX_BYTES = 65536  # a template is a page of text; anything larger is some other file

COUNT_FORMATS = {"plus": "{1}+", "step": "{0}"}  # of a bucket: its number, the lowest count in it
OF_SIGNALS = {key: (name,) * (key == name) for name in SIGNALS for key in (name, f"{name}_format")}  # optional keys
FIELDS = {  # every key of a template file -> the placeholders its text may hold
    "system": (),
    "introduction": (),
    "history": (),
    "candidates": (),
    "category": ("category",),
    "rating": ("rating",),
    "rating_format": (),
    **OF_SIGNALS,
    "letters.history_line": ("title", "category", *SIGNALS, "rating"),
    "letters.candidate_line": ("identifier", "title", "category", *SIGNALS),
    "letters.separator": (),
    "items.history_line": ("identifier", "title", "category", *SIGNALS, "rating"),
    "items.candidate_line": ("identifier", "title", "category", *SIGNALS),
    "items.separator": (),
    "ranking.question": (),
    "ranking.answer": ("identifiers",),
    "ratings.question": (),
    "ratings.answer": ("identifier", "grade"),
    "ratings.grades": (),
}
REQUIRED = {  # placeholders without which the text makes no sense
    **{name: (name,) for name in SIGNALS},
    "category": ("category",),
    "rating": ("rating",),
    "letters.history_line": ("title",),
    "letters.candidate_line": ("identifier", "title"),
    "items.history_line": ("identifier",),
    "items.candidate_line": ("identifier",),
    "ranking.answer": ("identifiers",),
    "ratings.answer": ("identifier", "grade"),
}


@dataclass(frozen=True)
class PromptTemplate:
    """One template. `texts` holds the string of every key of FIELDS but `ratings.grades`, dots as above."""

    name: str
    source: str  # the file as written
    texts: Mapping[str, str]
    grades: Mapping[str, float]  # text of a grade -> the rating it stands for

    def __getitem__(self, key: str) -> str:
        return self.texts[key]


def ready_templates() -> list[str]:
    """Names of the templates shipped with the package."""
    return sorted(path.stem for path in TEMPLATES.glob("*.yaml"))


def load_template(template: str | Path) -> PromptTemplate:
    """Read a ready template by its name, or any YAML file by its path.

    Raises:
        AlroFastError: no such template, not a template (a data file, say), an unknown or missing key or placeholder.
    """
    path = Path(template)
    if str(template) in ready_templates():
        path = TEMPLATES / f"{template}.yaml"
    elif not texts.is_file(path):
        ready = ", ".join(ready_templates())
        raise AlroFastError(
            f"no prompt template {str(template)!r}: expected one of {ready}, or the path of a YAML file"
        )
    return parse_template(read_text(path), name=path.stem, origin=str(path))


def parse_template(source: str, *, name: str, origin: str) -> PromptTemplate:
    """Check the text of a template file; `origin` says in errors where it came from."""
    content = parse_yaml(source, origin)
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise AlroFastError(
            f"{origin} is not a prompt template: found {found}, "
            f"expected the keys {', '.join(_sections())}; was a data file given for the template?"
        )
    flat = _flatten(content, origin)
    grades = parse_grades(flat.pop("ratings.grades"), origin)
    for key, text in flat.items():
        if text or key not in OF_SIGNALS:
            _check_text(key, text, origin)
    try:
        f"{4.5:{flat['rating_format']}}"
    except ValueError:
        raise AlroFastError(
            f"{origin}: rating_format {flat['rating_format']!r} is no format of a number; expected one such as g or .1f"
        ) from None
    _check_signals(flat, origin)
    return PromptTemplate(name, source, flat, grades)


def signal_text(template: PromptTemplate, name: str, value: float) -> str:
    """The fragment that shows a signal's value; nothing where the value is unknown."""
    if math.isnan(value):
        return ""
    form = template[f"{name}_format"]
    if name == "count":
        shown = COUNT_FORMATS[form].format(*bucket(value)) if value >= 1 else "0"
    else:
        shown = str(round(10 * value)) if form == "tenths" else format(value, form)
    return template[name].format(**{name: shown})


def placeholders(text: str) -> list[tuple[str, str | None]]:
    """`text` as (literal, placeholder after it or None) pairs; doubled braces are literal ones."""
    return [(literal, field) for literal, field, _, _ in string.Formatter().parse(text)]


def read_text(path: Path) -> str:
    """The text of a template file; AlroFastError where it is none."""
    try:
        return texts.read_text(path, MAX_BYTES)
    except AlroFastError as error:
        raise AlroFastError(f"{error}; expected a prompt template: was a data file given for the template?") from None


def _flatten(content: dict, origin: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key in {"letters", "items", "ranking", "ratings"}:
            flat.update({f"{key}.{inner}": text for inner, text in value.items()})
        else:
            flat[str(key)] = value
    unknown = sorted(flat.keys() - FIELDS.keys())
    missing = sorted(FIELDS.keys() - flat.keys() - {"system"} - OF_SIGNALS.keys())
    if unknown:
        raise AlroFastError(f"{origin}: unknown key {unknown[0]!r}; a prompt template has the keys {', '.join(FIELDS)}")
    if missing:
        raise AlroFastError(f"{origin}: the key {missing[0]!r} is missing; a prompt template has {', '.join(FIELDS)}")
    return {key: flat.get(key, "") for key in FIELDS}


def _check_text(key: str, text: Any, origin: str) -> None:
    if not isinstance(text, str):
        raise AlroFastError(f"{origin}: {key} must be a text in quotes, not {text!r}")
    try:
        found = [field for _, field, spec, conversion in string.Formatter().parse(text) if field is not None]
        decorated = any(spec or conversion for _, _, spec, conversion in string.Formatter().parse(text))
    except ValueError as error:
        raise AlroFastError(f"{origin}: {key} {text!r} cannot be read: {error}; write a literal brace twice") from None
    allowed = FIELDS[key]
    expected = ", ".join(f"{{{name}}}" for name in allowed) or "none"
    for field in found:
        if field not in allowed or decorated:
            raise AlroFastError(f"{origin}: unknown placeholder {{{field}}} in {key} {text!r}; expected {expected}")
    required = REQUIRED.get(key, ())
    if len(found) != len(set(found)) or set(required) - set(found):
        needed = " and ".join(f"{{{name}}}" for name in required or allowed)
        raise AlroFastError(f"{origin}: {key} {text!r} must hold {needed}, and no placeholder twice")
    signals = [place for place, field in enumerate(found) if field in SIGNALS]
    if key.endswith("_line") and signals and {"title", "category", "identifier"} & set(found[signals[0] :]):
        raise AlroFastError(
            f"{origin}: in {key} {text!r} {{{found[signals[0]]}}} must come after the identifier, the title and "
            "the category"
        )
    if key.endswith("_line") and "rating" in found and found[-1] != "rating":
        raise AlroFastError(f"{origin}: in {key} {text!r} the {{rating}} must come after the other placeholders")
    if key.endswith("_line") and "identifier" in found and found[0] != "identifier":
        raise AlroFastError(f"{origin}: in {key} {text!r} the {{identifier}} must come before the other placeholders")
    if key.endswith(".answer") and (found[-1] not in {"identifiers", "grade"} or not text.endswith("}")):
        raise AlroFastError(f"{origin}: {key} {text!r} must end with {{{allowed[-1]}}}")
    if "\n" in text and (key.endswith(("_line", "separator")) or key in {"category", "rating", *SIGNALS}):
        raise AlroFastError(f"{origin}: {key} must be a single line")


def _check_signals(flat: Mapping[str, str], origin: str) -> None:
    """A signal that a line shows has a fragment, and a fragment a format."""
    for key, text in flat.items():
        for name in SIGNALS:
            if key.endswith("_line") and f"{{{name}}}" in text and not flat[name]:
                raise AlroFastError(
                    f"{origin}: {key} {text!r} shows {{{name}}}, but the template has no key {name} that says how; "
                    f'add one, such as {name}: " | {{{name}}}"'
                )
    for name in (name for name in SIGNALS if flat[name]):
        form, known = flat[f"{name}_format"], f"one of {', '.join(COUNT_FORMATS)}"
        fine = form in COUNT_FORMATS
        if name != "count":
            known = "tenths, or a format of a number such as .1f"
            try:
                fine = bool(form) and (form == "tenths" or bool(format(4.5, form)))
            except ValueError:
                fine = False
        if not fine:
            raise AlroFastError(f"{origin}: {name}_format is {form!r}; expected {known}")


def parse_grades(grades: Any, origin: str, key: str = "ratings.grades") -> dict[str, float]:
    """Text of a grade -> the rating it stands for; AlroFastError naming `key` when that is not what `grades` is."""
    fine = (
        isinstance(grades, dict)
        and len(grades) >= 2
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in grades.values())
        and all(math.isfinite(value) for value in grades.values())
        and len(set(grades.values())) == len(grades)
    )
    if not fine:
        raise AlroFastError(
            f'{origin}: {key} must map at least two texts to different numbers, such as {{"1": 1, "2": 2}}; '
            f"found {grades!r:.80}"
        )
    return {str(text): float(value) for text, value in grades.items()}


def _sections() -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in FIELDS))


def parse_yaml(source: str, origin: str) -> Any:
    """What the text of a template holds; AlroFastError, naming `origin`, where it is no YAML."""
    try:
        return texts.from_yaml(source, "it")
    except AlroFastError as error:
        raise AlroFastError(f"{origin} is not a prompt template: {error}") from None
