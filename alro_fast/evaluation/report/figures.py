"""Figures that need no library: lines and columns as SVG that stretches with the page, text beside them as HTML.

Text thus keeps its size on a small screen; only what is drawn becomes narrower. Places are in percent of the frame,
from its lower left corner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...objectives.base import descriptions
from .. import metrics
from .numbers import mean_by_position, order_taus
from .tables import Table

COLOURS = {
    "random": "#8c959f", "popularity": "#b7791f", "mean_rating": "#7a5195", "shrunk_mean": "#9467bd",
    "biased_mf": "#5254a3", "lambdamart": "#2c3e8f", "sasrec": "#a55194", "retriever": "#8c564b",
    "generate": "#d45087", "untuned": "#3b7dd8", "tuned": "#15803d", "fused": "#0b5d33", "oracle": "#333333",
    "hints": "#a3a311", "pointwise": "#0e8a9c", "pairwise": "#9b5a94", "listwise": "#d35fb7",
}  # fmt: skip
SERIES = ("#15803d", "#3b7dd8", "#b7791f", "#9b5a94", "#0e8a9c", "#d45087", "#333333")
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # lines differ without their colours, too


class Span(NamedTuple):
    """The numbers along one axis of a frame, from end to end."""

    low: float
    high: float

    def at(self, value: float) -> str:
        """Its place in percent."""
        width = self.high - self.low
        return f"{100 * (value - self.low) / width:.2f}" if width > 0 else "50"

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers within the ends."""
        step = nice_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [(first + n) * step for n in range(math.floor(self.high / step + 1e-9) - first + 1)]


class Line(NamedTuple):
    """One series of a chart; low and high: the ends of a band around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str = ""


class Mark(NamedTuple):
    """A line, or columns, as drawn: SVG points, and dots where there are few."""

    label: str
    colour: str
    dash: str
    points: str = ""
    band: str = ""
    dots: str = ""
    columns: Sequence[tuple[str, str, str]] = ()  # left end, width, height


class Chart(NamedTuple):
    """A figure of the page, and its numbers."""

    name: str
    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[str, str]]  # place, text
    y_ticks: list[tuple[str, str]]
    marks: list[Mark]
    zero: str | None
    table: Table


def side(difference: float, p_value: float) -> str:
    """The colour of a difference: green above, red below, grey where p is not under .05."""
    return "#57606a" if not p_value < 0.05 else "#15803d" if difference > 0 else "#b42318"


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is not below `least`; 1 for nothing."""
    if not least > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def span_of(values: Sequence[float], *others: float) -> Span:
    """From the lowest to the highest, with a little air, of finite numbers; 0 to 1 without any."""
    finite = [value for value in (*values, *others) if math.isfinite(value)]
    if not finite:
        return Span(0.0, 1.0)
    low, high = min(finite), max(finite)
    air = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return Span(low - air, high + air)


def lines(name: str, title: str, x_label: str, y_label: str, given: Sequence[Line], zero: bool = False) -> Chart | None:
    """Lines over whole numbers; None where none has two points."""
    given = [line for line in given if len(line.x) > 1]
    if not given:
        return None
    x = Span(min(min(line.x) for line in given), max(max(line.x) for line in given))
    ends = [end for line in given for side in (line.low, line.high) if side is not None for end in side]
    y = span_of([value for line in given for value in line.y] + ends, *([0.0] if zero else []))
    marks = []
    for at, line in enumerate(given):
        places = [(x.at(a), y.at(b)) for a, b in zip(line.x, line.y, strict=True)]
        band = ""
        if line.low is not None and line.high is not None:
            around = [*zip(line.x, line.high), *reversed(list(zip(line.x, line.low)))]
            band = " ".join(f"{x.at(a)},{_down(y.at(b))}" for a, b in around)
        marks.append(
            Mark(
                line.label,
                line.colour or SERIES[at % len(SERIES)],
                DASHES[at % len(DASHES)],
                points=" ".join(f"{a},{_down(b)}" for a, b in places),
                band=band,
                dots=" ".join(f"M{a} {_down(b)}h0" for a, b in places) if len(places) < 40 else "",
            )
        )
    whole = [tick for tick in x.ticks() if tick == round(tick)]
    columns = [(line.label, *point) for line in given for point in zip(line.x, line.y, strict=True)]
    return Chart(
        name, title, x_label, y_label,
        [(x.at(tick), f"{tick:g}") for tick in whole], [(y.at(tick), f"{tick:.6g}") for tick in y.ticks()],
        marks, y.at(0.0) if zero else None, Table(name, ("series", x_label, y_label), columns),
    )  # fmt: skip


def position_chart(predictions: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart | None:
    """Score minus the list's mean score, averaged by the place a candidate was shown at: flat for a fair model."""
    given = []
    for name in names:
        means, errors = mean_by_position(predictions, name)
        mean, low, high = ((means + sign * 1.96 * errors).tolist() for sign in (0, -1, 1))
        given.append(Line(name, range(1, len(means) + 1), mean, low, high, COLOURS[name]))
    return lines(
        "position", "Mean score by place, with 95 % intervals", "place on the page, 1 = first candidate shown",
        "score - mean of its list", given, zero=True,
    )  # fmt: skip


def order_chart(predictions: Sequence[Mapping[str, Any]], bins: int = 20) -> Chart | None:
    """How often each list's order agrees with itself, from its presentations: shares of lists by Kendall tau."""
    taus = {name: order_taus(predictions, name) for name in ("untuned", "tuned")}
    taus = {name: values for name, values in taus.items() if len(values)}
    if not taus:
        return None
    edges = np.linspace(-1, 1, bins + 1)
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in taus.items()}
    x, y = Span(-1.0, 1.0), Span(0.0, max(share.max() for share in shares.values()) * 1.05)
    width = 100 / bins / (len(shares) + 0.5)
    marks = []
    for at, (name, share) in enumerate(shares.items()):
        left = [float(x.at(edge)) + (at + 0.25) * width for edge in edges[:-1]]
        drawn = [(f"{a:.2f}", f"{width:.2f}", y.at(height)) for a, height in zip(left, share) if height]
        marks.append(Mark(name, COLOURS[name], "", columns=drawn))
    rows = [
        (name, float(low), float(high), float(part))
        for name, share in shares.items()
        for low, high, part in zip(edges, edges[1:], share)
    ]
    return Chart(
        "order", "Kendall tau between presentations of one list", "1: the order of presentation never matters",
        "share of lists", [(x.at(tick), f"{tick:g}") for tick in (-1, -0.5, 0, 0.5, 1)],
        [(y.at(tick), f"{tick:.6g}") for tick in y.ticks()], marks, None,
        Table("order", ("ranker", "tau from", "to", "share of lists"), rows),
    )  # fmt: skip


def loss_chart(history: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The loss and its parts by optimiser step; nothing for a single point."""
    parts = {"loss": "loss"}
    for objective in descriptions().values():
        parts |= objective.logs
    return lines("loss", "Training loss and its parts", "optimiser step", "loss", curves(history, parts))


def validation_chart(history: Sequence[Mapping[str, Any]]) -> Chart | None:
    """NDCG on the validation lists by optimiser step; nothing for a single point."""
    keys = {f"eval_ndcg@{k}": f"NDCG@{k}" for k in metrics.CUTOFFS}
    return lines("validation", "NDCG on the validation lists", "optimiser step", "NDCG", curves(history, keys))


def curves(history: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> list[Line]:
    """A line for every key of the Trainer's log that has numbers; steps whose value is none (NaN) are left out."""
    found = []
    for key, label in keys.items():
        points = [(one["step"], one[key]) for one in history if "step" in one and math.isfinite(one.get(key, math.nan))]
        found.append(Line(label, [step for step, _ in points], [value for _, value in points]))
    return found


def _down(place: str) -> str:
    """SVG counts from the top."""
    return f"{100 - float(place):.2f}"
