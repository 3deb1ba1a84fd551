"""Prompts without words: a token for every bin of every signal, for small models that learn what their tokens mean.

    <user> <rated_4> <rated_3.5> ...                                            ratings of the history, oldest first
        <average_17> <count_22> <hint_25> <average_gap_12> ... <rate> <grade_4.5>      a branch for every candidate

A candidate is named by what its signals say and by their gaps, the differences from the list's means; no title is
shown, so that the model cannot learn items by heart. Bins hold equally many values of the training lists each; a value
that is not known has a token of its own (docs/signals.md).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from ..data.records import RankingList, target_ranks
from ..data.signal_table import PREPARED, SIGNALS, signal_features
from ..errors import AlroFastError
from ..texts import read_json
from .builder import RatingBranch, RatingPrompt
from .encoding import Encoder

SETTINGS_FILE = "signal_tokens.json"  # of a run
BINS = 32
MOST_GRADES = 100
USER, RATE, UNKNOWN = "<user>", "<rate>", "?"


@dataclass(frozen=True)
class SignalVocabulary:
    """What the tokens stand for.

    names: of the signals; edges: of each signal and then of each gap, ascending, where one bin ends and the next
    begins; grades: the ratings, ascending.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[float, ...], ...]
    grades: tuple[float, ...]

    @classmethod
    def of(cls, lists: Sequence[RankingList], bins: int = BINS) -> Self:
        """That of training lists; AlroFastError where they carry no signals, or too many different ratings."""
        names = tuple(name for name in SIGNALS if any(one.signal(name).candidates for one in lists))
        if not names:
            raise AlroFastError(
                "--identifiers signals names candidates by their signals, and the lists carry none; "
                f"prepare them with --signals {','.join(PREPARED)}"
            )
        values = np.concatenate([signal_features(one, names) for one in lists])
        inner = np.linspace(0, 1, bins + 1)[1:-1]
        edges = tuple(
            tuple(np.unique(np.quantile(column[~np.isnan(column)], inner)).tolist())
            if np.isfinite(column).any()
            else ()
            for column in values.T
        )
        given = {rating for one in lists for rating in (*one.history_ratings, *one.ratings) if not math.isnan(rating)}
        if not 2 <= len(given) <= MOST_GRADES:
            raise AlroFastError(
                f"the training lists hold {len(given):,} different ratings; --identifiers signals has a token for each "
                f"and takes 2 to {MOST_GRADES}: round the ratings first"
            )
        return cls(names, edges, tuple(sorted(given)))

    @property
    def scales(self) -> list[list[str]]:
        """The tokens of each signal's bins and of each gap's, lowest first, without the one for an unknown value."""
        columns = [*self.names, *(f"{name}_gap" for name in self.names)]
        return [[f"<{name}_{bin}>" for bin in range(len(edges) + 1)] for name, edges in zip(columns, self.edges)]

    @property
    def tokens(self) -> list[str]:
        """All of them."""
        columns = [*self.names, *(f"{name}_gap" for name in self.names)]
        rated = [f"<rated_{grade:g}>" for grade in self.grades]
        grades = [f"<grade_{grade:g}>" for grade in self.grades]
        scales = [token for scale in self.scales for token in scale]
        unknown = [f"<{name}_{UNKNOWN}>" for name in (*columns, "rated")]
        return [USER, RATE, *rated, *grades, *scales, *unknown]


def add_signal_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: SignalVocabulary) -> list[list[int]]:
    """Add the tokens; returns the ids of every scale, lowest bin first.

    The model's embeddings must then have `len(tokenizer)` rows.
    """
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in vocabulary.tokens])
    return [cast(list[int], tokenizer.convert_tokens_to_ids(scale)) for scale in vocabulary.scales]


class SignalPrompts:
    """Writes the `ratings` form of lists in these tokens; the presented order of candidates makes no difference.

    Args:
        tokenizer: one that `add_signal_tokens` was called on.
        vocabulary: what its tokens stand for.
        max_length: longest prompt and answer of one candidate, in tokens; oldest ratings are dropped to keep to it.
    """

    identifiers = "signals"
    max_candidates = sys.maxsize  # each is asked about apart

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: SignalVocabulary, *, max_length: int | None = None
    ) -> None:
        self.tokenizer, self.vocabulary, self.max_length = tokenizer, vocabulary, max_length
        known = tokenizer.get_vocab()
        missing = [token for token in vocabulary.tokens if token not in known]
        if missing:
            raise AlroFastError(f"the tokenizer has no token {missing[0]}; call add_signal_tokens on it first")
        self._user, self._rate = known[USER], known[RATE]
        columns = [scale[0].rpartition("_")[0] for scale in vocabulary.scales]
        self._bins = [  # the unknown value's last
            np.array([known[token] for token in (*scale, f"{column}_{UNKNOWN}>")])
            for column, scale in zip(columns, vocabulary.scales)
        ]
        self._edges = [np.array(edges) for edges in vocabulary.edges]
        self._grades = np.array(vocabulary.grades)
        self._rated = [known[f"<rated_{grade:g}>"] for grade in vocabulary.grades]
        self._unrated = known[f"<rated_{UNKNOWN}>"]
        self.grade_ids: list[int] = [known[f"<grade_{grade:g}>"] for grade in vocabulary.grades]
        self.grade_values: list[float] = list(vocabulary.grades)

    @property
    def signals(self) -> dict[str, tuple[str, ...]]:
        """Names of the signals that stand beside "history" and "candidates"."""
        return {"history": (), "candidates": self.vocabulary.names}

    def rates(
        self, lists: Sequence[RankingList], orders: Sequence[Sequence[int] | None] | None = None
    ) -> list[RatingPrompt]:
        """The prompts of many lists; `orders` is taken for the sake of other prompts, and makes no difference."""
        return [self.rate(one) for one in lists]

    def rate(self, one: RankingList) -> RatingPrompt:
        """The prompt of a list. A rating between two that have a token is taken for the nearer one."""
        past = [
            self._unrated if math.isnan(rating) else self._nearest(rating, self._rated)
            for rating in one.history_ratings
        ]
        asked = self.candidate_ids(one)
        dropped = 0
        if self.max_length is not None:
            room = self.max_length - asked.shape[1] - 3  # <user>, <rate> and the grade
            if room < 0:
                raise AlroFastError(f"--max_length {self.max_length} leaves no room for {asked.shape[1]} signal tokens")
            dropped = max(len(past) - room, 0)
        branches = [
            RatingBranch(
                [*signals, self._rate], [] if math.isnan(rating) else [self._nearest(rating, self.grade_ids)], 0
            )
            for signals, rating in zip(asked.tolist(), one.ratings, strict=True)
        ]
        ranks = target_ranks(one.ratings, [item.item_id for item in one.candidates])
        return RatingPrompt([self._user, *past[dropped:]], branches, self.grade_ids, self.grade_values, ranks, dropped)

    def candidate_ids(self, one: RankingList) -> np.ndarray:
        """int64 [candidates, 2 x signals]: tokens of the signals, then of their gaps."""
        values = signal_features(one, self.vocabulary.names)
        columns = [
            bins[np.where(np.isnan(column), len(edges) + 1, np.searchsorted(edges, column))]
            for column, edges, bins in zip(values.T, self._edges, self._bins)
        ]
        return np.stack(columns, axis=1)

    def _nearest(self, rating: float, tokens: list[int]) -> int:
        return tokens[int(np.abs(self._grades - rating).argmin())]

    def save(self, directory: str | Path) -> None:
        """Write signal_tokens.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(self.tokenizer)
        record = {
            **asdict(self.vocabulary),
            "max_length": self.max_length,
            "tokenizer": {"name": encoder.name, "fingerprint": encoder.fingerprint()},
        }
        (directory / SETTINGS_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> SignalPrompts:
        """Those saved there; AlroFastError if the tokenizer is not the one they were saved with."""
        path = Path(directory) / SETTINGS_FILE
        try:
            record: dict[str, Any] = read_json(path)
            edges = tuple(tuple(map(float, each)) for each in record["edges"])
            vocabulary = SignalVocabulary(tuple(record["names"]), edges, tuple(map(float, record["grades"])))
            known, max_length = record["tokenizer"], record["max_length"]
            fingerprint, name = known["fingerprint"], known["name"]
        except OSError:
            raise AlroFastError(
                f"{directory} holds no prompt settings: {path.name} cannot be read; expected the output folder of a "
                "training run"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise AlroFastError(f"{path} is damaged: expected what SignalPrompts.save wrote") from None
        encoder = Encoder(tokenizer)
        if encoder.fingerprint() != fingerprint:
            raise AlroFastError(
                f"tokenizer {encoder.name!r} is not the one {directory} was made with ({name!r}); load the tokenizer "
                "saved in that folder"
            )
        return cls(tokenizer, vocabulary, max_length=max_length)
