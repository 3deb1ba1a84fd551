"""A model's scores and the lists' own signals in one score: a weighted sum, its weights fitted on validation lists.

    f(c) = w_0 z(s)(c) + sum_k w_k z(x_k)(c),    z(x)(c) = (x(c) - mean of x in the list) / deviation of x in the list

s: the model's score of candidate c; x_k: the signals of FUSED that the lists carry; an unknown value, and one that all
candidates share, counts 0. The weights minimise, over lists that the model was not trained on,

    mean over lists, mean over pairs (i, j) of a list with rating_i > rating_j, of log(1 + exp(f(j) - f(i)))
    + RIDGE |w|^2 / 2

which is convex (a logistic regression on differences, as RankNet's loss is: Burges et al. 2005). Ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..errors import AlroFastError
from ..texts import read_json
from .documents import keys_of, parse_list, place_of
from .orders import Ranking

if TYPE_CHECKING:
    from ..data.lists import PreparedData
    from ..data.records import RankingList

FILE = "fusion.json"
FUSED = ("hint", "average", "near")  # signals in the unit of ratings
RIDGE = 1e-3
LEAST = 1e-4  # deviations below count as this: what is left there is rounding


@dataclass(frozen=True)
class Fusion:
    """signals: of FUSED. weights: of the model's score, then of each signal. lists, pairs: what they are fitted on."""

    signals: tuple[str, ...]
    weights: tuple[float, ...]
    lists: int
    pairs: int

    @classmethod
    def fit(cls, lists: Sequence[RankingList], scores: Sequence[np.ndarray], signals: Sequence[str]) -> Self:
        """Weights for lists with ratings (NaN: none) and the model's scores [m] of each.

        AlroFastError where no list has two candidates with different ratings.
        """
        import torch

        check_fittable(lists)
        rows = [_differences(one, own, signals) for one, own in zip(lists, scores, strict=True) if not one.all_equal]
        differences = torch.from_numpy(np.concatenate(rows))
        share = torch.from_numpy(np.concatenate([np.full(len(row), 1 / len(row) / len(rows)) for row in rows]))
        weights = torch.zeros(1 + len(signals), dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weights], max_iter=200, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            solver.zero_grad()
            value = share @ torch.nn.functional.softplus(-(differences @ weights)) + RIDGE / 2 * weights @ weights
            value.backward()
            return value

        solver.step(loss)
        return cls(tuple(signals), tuple(weights.tolist()), len(rows), len(differences))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What a run left in its folder; AlroFastError where there is none, or it is damaged."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise AlroFastError(
                f"{folder} holds no {FILE}, the weights of --fuse; train with --fuse true, or leave it out"
            )
        try:
            told = read_json(path)
            weights = told["weights"]
            made = cls(tuple(weights)[1:], tuple(map(float, weights.values())), told["lists"], told["pairs"])
        except (AlroFastError, ValueError, KeyError, TypeError, AttributeError):
            made = None
        if made is None or not made.sound or next(iter(weights)) != "model":
            raise AlroFastError(f"{path} is damaged: expected the weights that training fitted; restore the file")
        return made

    @property
    def sound(self) -> bool:
        """Whether it is one that `fit` could have made."""
        counted = all(isinstance(number, int) and number > 0 for number in (self.lists, self.pairs))
        return (
            counted and bool(self.weights) and set(self.signals) <= set(FUSED) and all(map(math.isfinite, self.weights))
        )

    def save(self, folder: str | Path) -> None:
        """Write fusion.json: the weights by name, and what they are fitted on."""
        (Path(folder) / FILE).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": dict(zip(("model", *self.signals), self.weights, strict=True)),
            "lists": self.lists,
            "pairs": self.pairs,
        }

    def described(self) -> str:
        """In words, for whoever reads the rankings."""
        weights = zip(("model", *self.signals), self.weights, strict=True)
        told = ", ".join(f"{name} {weight:+.3f}" for name, weight in weights)
        return (
            f"{told}, each standardised within the list; fitted on {self.pairs:,} pairs of {self.lists:,} validation "
            "lists"
        )

    def scores(self, entry: RankingList, scores: np.ndarray) -> np.ndarray:
        """float64 [m]: the fused scores of a list, from the model's."""
        return features(entry, scores, self.signals) @ np.array(self.weights)

    def parse_list(self, document: Any, number: int) -> RankingList:
        """As documents.parse_list; AlroFastError for a list without a signal that is weighed."""
        entry = parse_list(document, number)
        check_signals(self, keys_of(document), place_of(document, number))
        return entry

    def rank_all(self, lists: Sequence[RankingList], rankings: Iterable[Ranking]) -> list[Ranking]:
        """`rank` of every list."""
        return [self.rank(entry, ranking) for entry, ranking in zip(lists, rankings, strict=True)]

    def rank(self, entry: RankingList, ranking: Ranking) -> Ranking:
        """The list in the order of its fused scores; candidates that tie keep their stored order."""
        scores = self.scores(entry, ranking.scores)
        each = np.stack([self.scores(entry, row) for row in ranking.presentation_scores])
        order = np.argsort(-scores, kind="stable")
        return Ranking(ranking.list_id, tuple(order.tolist()), scores, ranking.presented, each)


def fused_signals(prepared: PreparedData) -> list[str]:
    """Those of FUSED that the validation lists carry, and the test lists, if there are any; AlroFastError for none."""
    splits = [prepared.lists("valid"), *([prepared.lists("test")] if len(prepared.lists("test")) else [])]
    found = [name for name in FUSED if all(name in lists.signals for lists in splits)]
    if not found:
        raise AlroFastError(
            f"{prepared.path} holds lists without {', '.join(FUSED[:-1])} or {FUSED[-1]}, which --fuse adds to the "
            "model's scores; prepare them with --signals, or leave --fuse out"
        )
    return found


def check_fittable(lists: Sequence[RankingList]) -> None:
    """AlroFastError where no list has two candidates with different ratings."""
    if all(one.all_equal for one in lists):
        raise AlroFastError(
            "no validation list has candidates with different ratings, which the weights of --fuse are fitted on; "
            "prepare more lists, or leave --fuse out"
        )


def check_signals(fusion: Fusion, carried: Collection[str], place: str | Path) -> None:
    """AlroFastError where lists do not carry a signal that the fusion weighs."""
    missing = [name for name in fusion.signals if name not in carried]
    if missing:
        raise AlroFastError(
            f"{place} has no {' and no '.join(missing)} beside its candidates, which --fuse of this run weighs; give "
            "lists that have, or leave --fuse out"
        )


def features(entry: RankingList, scores: np.ndarray, signals: Sequence[str]) -> np.ndarray:
    """float64 [m, 1 + signals]: z of the scores and of each signal."""
    unknown = np.full(len(entry.candidates), np.nan)
    columns = [np.asarray(entry.signal(name).candidates or unknown, dtype=np.float64) for name in signals]
    return np.stack([_standardised(column) for column in (np.asarray(scores, dtype=np.float64), *columns)], axis=1)


def _standardised(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    if not known.any():
        return np.zeros(len(values))
    centred = np.where(known, values - values[known].mean(), 0.0)
    return centred / max(float(np.sqrt(np.square(centred[known]).mean())), LEAST)


def _differences(entry: RankingList, scores: np.ndarray, signals: Sequence[str]) -> np.ndarray:
    """float64 [pairs, 1 + signals]: features of the better rated candidate minus those of the other."""
    ratings = np.asarray(entry.ratings, dtype=np.float64)
    better, worse = np.nonzero(ratings[:, None] > ratings[None, :])  # False beside NaN
    own = features(entry, scores, signals)
    return own[better] - own[worse]
