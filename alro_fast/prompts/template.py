"""The words of a prompt: a YAML file, read and checked before anything runs."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterable, Mapping
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


ONE_TO_FIVE = (
    1.0,
    2.0,
    3.0,
    4.0,
    5.0,
)  # what a template that takes its scale from the data is told where none are at hand


@dataclass(frozen=True)
class PromptTemplate:
    """One template. `texts` holds the string of every key of FIELDS but `ratings.grades`, dots as above."""

    name: str
    source: str  # the file as written, its scale filled in
    texts: Mapping[str, str]
    grades: Mapping[str, float]  # text of a grade -> the rating it stands for
    scale: tuple[float, float] | None = None  # lowest and highest rating that its words speak of; None: it names none

    def __getitem__(self, key: str) -> str:
        return self.texts[key]


def ready_templates() -> list[str]:
    """Names of the templates shipped with the package."""
    return sorted(path.stem for path in TEMPLATES.glob("*.yaml"))


def load_template(template: str | Path, ratings: Iterable[float] = ONE_TO_FIVE) -> PromptTemplate:
    """Read a ready template by its name, or any YAML file by its path.

    ratings: those of the data, for a template that takes its scale from them (`filled`).

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
    return parse_template(filled(read_text(path), ratings), name=path.stem, origin=str(path))


SLACK = 1e-5  # of a scale's larger end: the rounding of ratings in float32 and of a scale's ends to six digits


def filled(source: str, ratings: Iterable[float]) -> str:
    """The text of a template file with the scale of the data in place of

    {lowest} {highest}               the lowest and the highest rating
    {lowest_grade} {highest_grade}   the texts that stand for them
    {grades}                         the whole mapping: the ratings themselves where all are digits, else digits in
                                     their order; the two ends alone where there are more than ten
    {liked} {disliked}               a quarter of the way from the highest, and from the lowest
    """
    values = sorted(set(ratings))
    if len(values) < 2:
        values = sorted({0.0, *values}) if values != [0.0] else [0.0, 1.0]
    values = values if len(values) <= 10 else [values[0], values[-1]]
    digits = all(value in range(10) for value in values)
    grades = {str(int(value) if digits else place): value for place, value in enumerate(values)}
    low, high = values[0], values[-1]
    words = {
        "lowest": f"{low:g}", "highest": f"{high:g}", "lowest_grade": next(iter(grades)),
        "highest_grade": list(grades)[-1], "grades": json.dumps(grades),
        "liked": f"{high - (high - low) / 4:g}", "disliked": f"{low + (high - low) / 4:g}",
    }  # fmt: skip
    for name, text in words.items():
        source = source.replace(f"{{{name}}}", text)
    return source


def parse_template(source: str, *, name: str, origin: str) -> PromptTemplate:
    """Check the text of a template file; `origin` says in errors where it came from."""
    content = parse_yaml(source, origin)
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise AlroFastError(
            f"{origin} is not a prompt template: found {found}, "
            f"expected the keys {', '.join(_sections())}; was a data file given for the template?"
        )
    scale = parse_scale(content.pop("scale", None), origin)
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
    return PromptTemplate(name, source, flat, grades, scale)


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


def parse_scale(scale: Any, origin: str) -> tuple[float, float] | None:
    """The lowest and the highest rating that a template's words speak of; AlroFastError where it says no such thing."""
    if scale is None:
        return None
    numbers = isinstance(scale, list) and all(type(end) in (int, float) and math.isfinite(end) for end in scale)
    if not numbers or len(scale) != 2 or not scale[0] < scale[1]:
        raise AlroFastError(f"{origin}: scale is {scale!r:.80}; expected the lowest and the highest rating, [1, 5]")
    return float(scale[0]), float(scale[1])


def outside(rating: float, scale: tuple[float, float]) -> bool:
    """Whether a rating is beyond either end; not by less than words of six digits, as a scale is written, tell."""
    low, high = scale
    slack = SLACK * max(abs(low), abs(high))
    return rating < low - slack or rating > high + slack


def check_shown(template: Any, list_id: str, ratings: Iterable[float]) -> None:
    """AlroFastError for a list whose history holds ratings that the template's words leave no room for; NaN is none."""
    if template.scale is None:
        return
    low, high = template.scale
    for rating in ratings:
        if outside(rating, template.scale):
            raise AlroFastError(
                f"list {list_id!r}: its history has a rating of {rating:g}, and prompt template {template.name!r} "
                f"speaks of ratings from {low:g} to {high:g}; bring them to that scale, or tune with another --template"
            )


def _sections() -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in FIELDS))


def parse_yaml(source: str, origin: str) -> Any:
    """What the text of a template holds; AlroFastError, naming `origin`, where it is no YAML."""
    try:
        return texts.from_yaml(source, "it")
    except AlroFastError as error:
        raise AlroFastError(f"{origin} is not a prompt template: {error}") from None
