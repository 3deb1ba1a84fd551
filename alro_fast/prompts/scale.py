"""Which template suits the data: by the data set's name, and by the ratings that are in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AlroFastError
from .saved import SavedPrompts
from .template import outside

OF_DATASET = {  # by how names begin; the first that a kind of prompts has. The demo's model knows no other words
    "demo": ("demo", "movies"), "ml-": ("movies",), "amazon-": ("products",), "book-crossing": ("books",),
}  # fmt: skip
OF_ANYTHING, OF_CLICKS = "items", "clicks"


def default_template(manifest: Mapping[str, Any], prompts: type[SavedPrompts]) -> str:
    """The ready template for the lists that a manifest speaks of: of clicks where all ratings are one, else by the name
    of the data set; for what is not known, and where a kind of prompts has no such template, the one of any items."""
    values = manifest.get("rating_values")
    if isinstance(values, list) and len(values) == 1:
        wanted: tuple[str, ...] = (OF_CLICKS,)
    else:
        dataset = str(manifest.get("dataset"))
        wanted = next((names for start, names in OF_DATASET.items() if dataset.startswith(start)), ())
    ready = prompts.ready_templates()
    return next((name for name in wanted if name in ready), OF_ANYTHING)


def fitted_template(
    prompts: type[SavedPrompts],
    name: str | Path,
    shown: Sequence[float],
    graded: Sequence[float],
    *,
    by_grades: bool,
    origin: str,
) -> Any:
    """The template of that name, its scale filled in from the data.

    shown, graded: the different ratings of histories and of candidates; by_grades: whether answers are grades.
    `origin` says where the data are.
    Raises AlroFastError, naming the ready templates that fit, where its words speak of another scale than the data's,
    or a rating to be answered with is none of its grades.
    """
    template = prompts.find_template(name, {*shown, *graded})
    fault = _misfit(template, shown, graded if by_grades else ())
    if fault is None:
        return template
    ready = {other: prompts.find_template(other, {*shown, *graded}) for other in prompts.ready_templates()}
    asked = graded if by_grades else ()
    fit = [other for other, one in ready.items() if one.scale is not None and _misfit(one, shown, asked) is None]
    hint = (
        f"--template {' or '.join(fit)} fits" if fit else "write a template with these ratings, of ten values at most"
    )
    raise AlroFastError(f"{origin} {fault} of prompt template {template.name!r}; {hint}")


def _misfit(template: Any, shown: Sequence[float], graded: Sequence[float]) -> str | None:
    """What does not fit, up to "of prompt template"."""
    if template.scale is not None and shown:
        low, high = template.scale
        if any(outside(rating, template.scale) for rating in (min(shown), max(shown))):
            return f"has ratings from {min(shown):g} to {max(shown):g}, outside the scale {low:g} to {high:g}"
    for rating in graded:
        if all(abs(value - rating) >= 1e-6 for value in template.grades.values()):
            return f"has candidates rated {rating:g}, which is none of the grades {_words(template.grades.values())}"
    return None


def _words(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
