"""From a tuned model to ordered lists. Orders come from identifier (or grade) logits, never from parsed text, so every
ranking is a full permutation of its candidates.

| method | reads | forwards |
| --- | --- | --- |
| first | log-probabilities of the identifiers at the first slot | 1, presentations share the history |
| expected | `ratings` answers: the expected grade of each candidate (docs/methods.md 1.5) | 1 |
| | `ranking` answers: the expected slot of each candidate along the greedy answer (soft-argmax) | m steps |
| greedy | the best identifier left, slot after slot | m steps, KV cache |
| beam | the likeliest order among `beams` partial ones | m steps, KV cache |
| pointwise, pairwise, listwise, hybrid | RecRanker's tasks (`ranking.tasks`, `ranking.hybrid`) | 1 |

Scores are float64, higher is better: log-probability, grade, minus the expected slot, (greedy, beam) minus the slot,
or (hybrid) utility.
Several presentations of a list (`shuffles`) are merged by the mean of their scores, or by Borda or Kemeny counts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from ..errors import AlroFastError
from ..modeling.packing import Branch, Tree
from ..objectives.alro import Scoring
from ..objectives.base import describe_run
from ..prompts import SignalPrompts
from ..run_folder import run_options
from .decoding import Decoded, decode
from .options import TASK_METHODS, RankingOptions, check_answer, check_token_budget, ranked_answers
from .orders import Ranking, check_finite, make_ranking, presentations, slide, unlabelled
from .reading import BranchReader, memory_errors
from .tasks import read_tasks

if TYPE_CHECKING:
    from ..data.records import RankingList
    from ..prompts import PromptBuilder
    from ..prompts.recranker import RecRankerPrompts

Reader = Callable[[list["RankingList"], list[np.ndarray]], list[np.ndarray]]
SLOTS: dict[str, Callable[[Decoded, float], np.ndarray]] = {  # decoded answer, gamma -> a score for each candidate
    "expected": lambda answer, gamma: -expected_slots(answer.slots, gamma),
    "greedy": lambda answer, gamma: -np.argsort(answer.order) - 1.0,
    "beam": lambda answer, gamma: -np.argsort(answer.order) - 1.0,
}
CHUNK = 256  # lists whose prompts are held and packed together; rankings come out after each


class Ranker:
    """A causal LM, its tokenizer and its prompt format, ranking lists.

    token_budget: tokens of one forward pass (a longer list still gets one of its own). 0: every list alone, so that a
    ranking is bitwise the same whatever lists come with it; otherwise the company changes scores by rounding only.
    share: whose branches share rows, as packing.collate takes it; the choice changes scores by rounding only.
    scoring: what the soft-argmax of `expected` reads, as trained.
    answer: ranking, ratings, or tasks: the three of RecRanker, whose `prompts` are RecRankerPrompts. hybrid: which
    constants combine them, as hybrid.constants_of takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: PromptBuilder | SignalPrompts | RecRankerPrompts,
        *,
        answer: str = "ranking",
        scoring: Scoring | None = None,
        hybrid: str = "code",
        token_budget: int = 8192,
        share: str = "batch",
    ) -> None:
        check_answer(answer)
        check_token_budget(token_budget)
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.answer, self.scoring, self.hybrid = answer, scoring or Scoring(), hybrid
        self.reader = BranchReader(model, token_budget, share)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        base_model: str | None = None,
        trust_remote_code: bool = False,
        token_budget: int = 8192,
        share: str = "batch",
    ) -> Ranker:
        """The ranker that a training run left in `folder`; `base_model` replaces the base recorded there."""
        from ..modeling.loading import load_for_inference
        from ..modeling.quiet import loading_quietly

        if device is not None:
            check_device(device, "device")
        folder = Path(folder)
        config = run_options(folder)
        with loading_quietly():
            model, tokenizer = load_for_inference(
                folder, device=device, dtype=dtype, base_model=base_model, trust_remote_code=trust_remote_code
            )
        if not config:
            raise AlroFastError(
                f"{folder}: no config.yaml, which says what answers the model was tuned to give; "
                "copy it from the run's folder"
            )
        answer = ranked_answers(folder, config)
        signals = config.get("identifiers") == SignalPrompts.identifiers
        prompts = SignalPrompts if signals else describe_run(config).prompts
        return cls(
            model,
            tokenizer,
            prompts.load(folder, tokenizer),
            answer=answer,
            hybrid=config.get("hybrid") or "code",
            scoring=Scoring.of(config),
            token_budget=token_budget,
            share=share,
        )

    @property
    def device(self) -> torch.device:
        return self.reader.device

    @property
    def token_budget(self) -> int:
        return self.reader.token_budget

    def described(self, **options: Any) -> str:
        """What `stream` does with these options, for whoever reads its rankings."""
        return self._settled(options).described()

    def rank(self, lists: Sequence[RankingList], **options: Any) -> list[Ranking]:
        """All of `stream(lists, ...)`."""
        return list(self.stream(lists, **options))

    def scores(self, lists: Sequence[RankingList], **options: Any) -> list[np.ndarray]:
        """Per list, float64 [m]: a score per candidate in the list's own order, higher is better."""
        return [ranking.scores for ranking in self.stream(lists, **options)]

    def stream(self, lists: Iterable[RankingList], **options: Any) -> Iterator[Ranking]:
        """Rankings in the order of `lists`, as they come.

        options: fields of RankingOptions; what is left out is as the model was tuned. More candidates than identifiers
        are ranked by windows that slide from the end of the list to its start (RecRanker's grades and pairs need none).
        Raises AlroFastError for an unknown method, what is no RankingList, an empty list or one that names a candidate
        twice.
        """
        how = self._settled(options)
        source = _ranking_lists(lists)
        while chunk := list(islice(source, CHUNK)):
            with self._inference():
                rankings = self._rank([unlabelled(entry) for entry in chunk], how)
            yield from rankings

    @contextlib.contextmanager
    def untuned(self) -> Iterator[Ranker]:
        """The same ranker with its adapter off; AlroFastError when the weights themselves were tuned."""
        if not hasattr(self.model, "disable_adapter"):
            raise AlroFastError("the model has no adapter to switch off; load its base model to rank untuned")
        with cast(Any, self.model).disable_adapter():
            yield self

    # ---- one chunk of lists

    def _settled(self, options: dict[str, Any]) -> RankingOptions:
        known = [field.name for field in fields(RankingOptions)]
        if unknown := sorted(set(options) - set(known)):
            raise AlroFastError(f"unknown options {', '.join(unknown)}; expected some of {', '.join(known)}")
        how = RankingOptions(**options).settled(self.answer, self.hybrid)
        if how.beams != RankingOptions().beams and how.method != "beam":
            raise AlroFastError(f"beams is no option of method {how.method} (it is read by method beam); leave it out")
        return how

    def _rank(self, lists: list[RankingList], how: RankingOptions) -> list[Ranking]:
        read = self._reader(how)
        capacity = self.prompts.max_candidates
        fits = [self.answer == "tasks" or len(entry.candidates) <= capacity for entry in lists]  # tasks: read_tasks

        def direct(entries: list[RankingList]) -> list[Ranking]:
            presented = [presentations(entry, how.shuffles, how.seed) for entry in entries]
            return [
                make_ranking(entry, shown, scores, how.merge_by)
                for entry, shown, scores in zip(entries, presented, read(entries, presented), strict=True)
            ]

        short = iter(direct([entry for entry, fit in zip(lists, fits, strict=True) if fit]))
        long = iter(slide([entry for entry, fit in zip(lists, fits, strict=True) if not fit], capacity, direct))
        return [next(short if fit else long) for fit in fits]

    def _reader(self, how: RankingOptions) -> Reader:
        """How the scores of a method are read: lists, and orders [B, m] of each -> scores [B, m] of each."""
        if how.method in TASK_METHODS:
            return functools.partial(self._read_tasks, how=how)
        if how.method in SLOTS and self.answer == "ranking":
            return functools.partial(self._read_slots, method=how.method, beams=how.beams)
        return self._read_rows

    def _read_tasks(
        self, lists: list[RankingList], presented: list[np.ndarray], how: RankingOptions
    ) -> list[np.ndarray]:
        method, hybrid, prompts = cast(str, how.method), cast(str, how.hybrid), cast("RecRankerPrompts", self.prompts)
        readings = read_tasks(
            self.reader, prompts, lists, presented, method, pairing=how.pairing, pair_orders=how.pair_orders,
            seed=how.seed,
        )  # fmt: skip
        for entry, reading in zip(lists, readings, strict=True):
            for values in reading:
                if values is not None:
                    check_finite(entry, values)
        return [
            np.broadcast_to(reading.scores(method, hybrid), shown.shape)
            for reading, shown in zip(readings, presented, strict=True)
        ]

    def _read_rows(self, lists: list[RankingList], presented: list[np.ndarray]) -> list[np.ndarray]:
        """`first`, and `expected` for grades: one forward per packed batch of trees.

        A tree per list, of all its presentations: `first` has a branch for each, grades a branch for each candidate.
        """
        flat = [entry for entry, orders in zip(lists, presented, strict=True) for _ in orders]
        orders = [order.tolist() for shown in presented for order in shown]
        builder = cast("PromptBuilder", self.prompts)
        make: Callable[..., Any] = builder.rankings if self.answer == "ranking" else builder.rates
        prompts = iter(make(flat, orders))
        trees, tokens = [], []
        for entry, shown in zip(lists, presented, strict=True):
            branches = []
            for prompt in islice(prompts, len(shown)):
                if self.answer == "ranking":
                    start = prompt.prompt_ids + prompt.answer_ids[: prompt.slot_offsets[0]]
                    branches.append(_predicting(start, prompt.candidate_ids))
                    tokens.append(prompt.candidate_ids)
                else:
                    starts = [prompt.prompt_ids + question.question_ids for question in prompt.branches]
                    branches += [_predicting(start, prompt.grade_ids) for start in starts]
                    tokens += [prompt.grade_ids] * len(starts)
            trees.append(Tree(branches, name=f"list {entry.list_id}"))
            self.reader.check_length(entry, max(len(branch.ids) for branch in branches))
        rows = iter(self.reader.read(trees, tokens))
        if self.answer == "ranking":
            return [np.stack([_log_softmax(next(rows)) for _ in shown]) for shown in presented]
        grades = np.asarray(builder.grade_values, dtype=np.float64)
        read = [[next(rows) for _ in range(shown.size)] for shown in presented]
        return [
            np.asarray([_expected_grade(row, grades) for row in each]).reshape(shown.shape)
            for each, shown in zip(read, presented, strict=True)
        ]

    def _read_slots(
        self, lists: list[RankingList], presented: list[np.ndarray], method: str, beams: int
    ) -> list[np.ndarray]:
        """The methods of SLOTS: every presentation decoded with a KV cache."""
        flat = [entry for entry, orders in zip(lists, presented, strict=True) for _ in orders]
        orders = [order.tolist() for shown in presented for order in shown]
        prompts = cast("PromptBuilder", self.prompts).rankings(flat, orders)
        for entry, prompt in zip(flat, prompts, strict=True):
            self.reader.check_length(entry, len(prompt.prompt_ids) + len(prompt.answer_ids))
        with memory_errors(self.token_budget, "a batch of lists"):
            scoring = self.scoring if method == "expected" else Scoring()
            beams = beams if method == "beam" else 1
            answers = iter(decode(self.model, prompts, beams, self.token_budget, scoring.score, scoring.score_space))
        scores = []
        for entry, shown in zip(lists, presented, strict=True):
            rows = []
            for _ in shown:
                answer = next(answers)
                check_finite(entry, answer.slots)
                rows.append(SLOTS[method](answer, self.scoring.gamma))
            scores.append(np.stack(rows))
        return scores

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)


def loaded_ranker(options: Any) -> Ranker:
    """The ranker of a command's --adapter, by its options (`options.add_model_options`)."""
    return Ranker.load(
        options.adapter,
        device=options.device,
        base_model=options.base_model,
        trust_remote_code=options.trust_remote_code,
        token_budget=options.token_budget,
        share=options.share,
    )


def _ranking_lists(lists: Iterable[RankingList]) -> Iterator[RankingList]:
    """The lists as they come; AlroFastError for what is none."""
    from ..data.records import RankingList

    expected = "expected alro_fast.RankingList records in a sequence: ranker.rank([one, other])"
    if isinstance(lists, RankingList) or not isinstance(lists, Iterable):
        raise AlroFastError(f"lists is a {type(lists).__name__}; {expected}")
    for number, entry in enumerate(lists):
        if not isinstance(entry, RankingList):
            raise AlroFastError(f"lists holds a {type(entry).__name__} at {number}; {expected}")
        yield entry


def check_device(name: str | torch.device | None, option: str = "--device") -> None:
    """AlroFastError for a device that PyTorch does not know or cannot compute on here; option: how it was given."""
    try:
        torch.zeros(1, device=name).item()
    except (
        RuntimeError,
        TypeError,
        AssertionError,
        ImportError,
    ) as error:  # the last two: a build of PyTorch without it
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise AlroFastError(f"{option} {name} cannot be used here ({reason}); give cpu, or leave it out") from error


def expected_slots(scores: np.ndarray, gamma: float) -> np.ndarray:
    """s_i = sum_k k softmax_k(gamma y_ki), k from 1 (docs/methods.md 1.2); y [m slots, m candidates] -> [m]."""
    weights = np.exp(gamma * (scores - scores.max(axis=0)))
    return np.arange(1, len(scores) + 1) @ (weights / weights.sum(axis=0))


def _predicting(ids: list[int], tokens: list[int]) -> Branch:
    """A branch with one answer row, the one that predicts what follows `ids`; the token put there is read by nobody."""
    return Branch([*ids, tokens[0]], len(ids))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _expected_grade(logits: np.ndarray, grades: np.ndarray) -> float:
    """e = sum_c v_c P(c), P over the grade tokens (docs/methods.md 1.5)."""
    return float(np.exp(_log_softmax(logits)) @ grades)
