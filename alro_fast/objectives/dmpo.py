"""Preference tuning at 1:k (docs/methods.md 2): a user's prompt once, the chosen and k rejected answers as branches.

The policy's and the reference's log-probabilities of all 1 + k answers come from one packed forward each; the reference
is the same model with its adapter switched off, or was computed once before training (`ReferenceTable`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..data.preferences import Preference
from ..data.records import RankingList
from ..errors import AlroFastError
from ..losses.preference import dmpo_loss
from ..modeling.lm_head import Head
from ..modeling.packing import Branch, PackedBatch, Tree
from ..modeling.sharded import with_head
from ..options import LISTS, Where, on_files
from ..prompts import PromptBuilder
from .base import ALWAYS, Batch, Description, Example, LossTerm

if TYPE_CHECKING:
    from ..data.negatives import Negatives
    from ..options import ObjectiveArguments
    from ..prompts.preference import PreferenceIds, PreferencePrompts


class ChosenObjective:
    """Supervised tuning on the chosen answers: the mean over their tokens of -log p(token).

    negatives: draws the negatives of ranking lists; unused for preferences.
    """

    def __init__(
        self,
        arguments: ObjectiveArguments,
        prompts: PreferencePrompts,
        *,
        answer: str = "ranking",
        seed: int = 0,
        negatives: Negatives | None = None,
    ) -> None:
        self.arguments, self.prompts, self.negatives = arguments, prompts, negatives

    def encode(self, source: Preference | RankingList, epoch: int) -> PreferenceIds:
        """Branches of one record; those of a ranking list with the negatives of this epoch."""
        if isinstance(source, RankingList):
            source = cast("Negatives", self.negatives).contest(
                source, epoch if self.arguments.resample_negatives else 0
            )
        return self.prompts.encode(source)

    def examples(self, lists: Sequence[Preference | RankingList], indices: Sequence[int], epoch: int) -> list[Example]:
        """One tree per user, of the chosen answers alone."""
        made = []
        for source in lists:
            ids = self.encode(source, epoch)
            kept = [ids.branches[b] for b in ids.chosen]
            made.append(_example(source, ids._replace(branches=kept, chosen=list(range(len(kept))), rejected=[])))
        return made

    def targets(self, packed: PackedBatch, examples: Sequence[Example]) -> tuple[Any, dict[str, int]]:
        """Nothing beyond the labels that the packed batch carries."""
        return None, {"sft": len(packed.labels)}

    def loss(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: Any) -> list[LossTerm]:
        """The mean cross-entropy, full vocabulary."""
        logprobs = head.label_logprobs(hidden, packed, backend=self.arguments.backend)
        return [LossTerm("sft", -logprobs.mean(), 1.0, len(packed.labels))]


class PreferenceTargets(NamedTuple):
    """Which branch is what. Branches are numbered through the batch; tensors on the batch's device."""

    branch: Tensor  # [N] branch of each answer row
    lengths: Tensor  # [branches] answer tokens
    chosen: Tensor  # [U, k] branch of the chosen answer beside each rejected one; mult: [U, P], the chosen ones
    rejected: Tensor  # [U, k]; -1 pads here and above
    chosen_once: Tensor  # every chosen branch, once
    pairs: int  # rejected answers, pads left out
    reference: Tensor | None  # [branches] summed log-probabilities under the reference; None: not known yet


class ReferenceTable:
    """Summed answer log-probabilities by record: float32 [branches] for every list_id."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def of(self, example: Example) -> Tensor:
        """Those of one example; AlroFastError when it is not among the records the table was made for."""
        found = self.values.get(example.source.list_id)
        if found is None or len(found) != len(example.tree.ids):
            raise AlroFastError(
                f"no reference log-probabilities for {example.source.list_id}: they were computed for other data; "
                "compute them again"
            )
        return found


class DMPOObjective(ChosenObjective):
    """`dmpo_loss` over every user's answers, plus `ftx` times the cross-entropy of the chosen ones.

    `references`: log-probabilities computed before training; None: the model's own, with its adapter switched off.
    """

    references: ReferenceTable | None = None

    def examples(self, lists: Sequence[Preference | RankingList], indices: Sequence[int], epoch: int) -> list[Example]:
        """One tree per user: the shared prompt, and a branch per answer."""
        made = []
        for source in lists:
            ids = self.encode(source, epoch)
            check_answers(ids, source.list_id, self.arguments.dmpo_variant)
            made.append(_example(source, ids))
        return made

    def targets(self, packed: PackedBatch, examples: Sequence[Example]) -> tuple[PreferenceTargets, dict[str, int]]:
        """Branches of every user, padded to the most negatives; reference log-probabilities where they are known."""
        mult = self.arguments.dmpo_variant == "mult"
        chosen, rejected, once, first = [], [], [], 0
        for example in examples:
            ids: PreferenceIds = example.views[0]
            good, bad = [first + b for b in ids.chosen], [first + b for b in ids.rejected]
            once += good
            chosen.append(good if mult or ids.paired else good * len(bad))
            rejected.append(bad)
            first += len(ids.branches)
        starts = torch.tensor([row for rows in packed.branch_rows for row in rows[:-1]])
        lengths = torch.diff(torch.cat([starts, torch.tensor([len(packed.labels)])]))
        reference = None
        if self.references is not None:
            reference = torch.cat([self.references.of(example) for example in examples])
        pairs = sum(map(len, rejected))
        targets = PreferenceTargets(
            torch.repeat_interleave(torch.arange(first), lengths), lengths, _padded(chosen), _padded(rejected),
            torch.tensor(once), pairs, reference,
        )  # fmt: skip
        counts = {"preference": len(examples), "reward_accuracy": pairs, "reward_margin": pairs}
        return targets, counts | ({"ftx": len(once)} if self.arguments.ftx else {})

    def complete(self, model: nn.Module, batch: Batch, forward: Callable[[PackedBatch], Tensor]) -> Batch:
        """The batch with reference log-probabilities: a packed forward of the same tokens, the adapter switched off."""
        if self.arguments.reference_free or batch.targets.reference is not None:
            return batch
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), cast(Any, model).disable_adapter():
                reference = with_head(
                    model, forward(batch.packed), lambda rows, head: self._sums(rows, head, batch.packed, batch.targets)
                )
        finally:
            model.train(training)
        return replace(batch, targets=batch.targets._replace(reference=reference))

    def loss(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: PreferenceTargets) -> list[LossTerm]:
        """The preference loss, ftx, and two figures to watch: pairs won, and by what margin of reward."""
        options = self.arguments
        policy = self._sums(hidden, head, packed, targets)
        chosen, rejected = (_gathered(policy, branches) for branches in (targets.chosen, targets.rejected))
        reference: list[Tensor | None] = [None, None]
        if not options.reference_free:
            sums = cast(Tensor, targets.reference)
            reference = [_gathered(sums, branches) for branches in (targets.chosen, targets.rejected)]
        mask = targets.rejected >= 0
        out = dmpo_loss(
            chosen, rejected, *reference, beta=options.dpo_beta, variant=options.dmpo_variant,
            rejected_mask=mask, chosen_mask=targets.chosen >= 0,
        )  # fmt: skip
        best = out.rewards_chosen
        if options.dmpo_variant == "mult":  # several positives: a rejected answer must be below the least of them
            best = best.masked_fill(targets.chosen < 0, torch.inf).amin(dim=1, keepdim=True)
        # Sums over the mask: an index of the pairs would wait for the device to count them.
        margins = (best - out.rewards_rejected).masked_fill(~mask, 0.0)
        terms = [
            LossTerm("preference", out.loss, 1.0, len(mask)),
            LossTerm("reward_accuracy", (margins > 0).sum() / targets.pairs, 0.0, targets.pairs),
            LossTerm("reward_margin", margins.sum() / targets.pairs, 0.0, targets.pairs),
        ]
        if options.ftx:
            once = targets.chosen_once
            entropy = -(policy[once] / targets.lengths[once]).mean()
            terms.append(LossTerm("ftx", entropy, options.ftx, len(once)))
        return terms

    def _sums(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: PreferenceTargets) -> Tensor:
        logprobs = head.label_logprobs(hidden, packed, backend=self.arguments.backend)
        return logprobs.new_zeros(len(targets.lengths)).index_add(0, targets.branch, logprobs)


def check_answers(answers: Preference | PreferenceIds, name: str, variant: str) -> None:
    """AlroFastError, naming the record, unless `variant` compares what it holds."""
    if not answers.rejected:
        raise AlroFastError(f"{name} has no rejected answer; objective dmpo compares with at least one")
    if variant == "mult" and answers.paired:
        raise AlroFastError(
            f"{name} has a prompt per pair; --dmpo_variant mult compares answers to one prompt: take sdpo"
        )
    if variant != "mult" and not answers.paired and len(answers.chosen) > 1:
        raise AlroFastError(
            f"{name} has {len(answers.chosen)} chosen answers; --dmpo_variant {variant} takes one: take mult"
        )


def branches_of(ids: PreferenceIds) -> list[Branch]:
    """The token branches of one user, in their order."""
    return [Branch(branch.prompt_ids + branch.answer_ids, len(branch.prompt_ids)) for branch in ids.branches]


def _example(source: Preference | RankingList, ids: PreferenceIds) -> Example:
    return Example(Tree(branches_of(ids), name=source.list_id), (ids,), source)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


def _gathered(sums: Tensor, branches: Tensor) -> Tensor:
    """sums[branches], 0 on pads."""
    return sums[branches.clamp(min=0)] * (branches >= 0)


def preferred_answer(options: Mapping[str, Any]) -> str:
    """What a model learns to answer that is trained on preferences: `given` by a file, or what is made of a list."""
    return "given" if options.get("preferences") is not None else options.get("preference_answer", "titles")


REFERENCED = Where("with --reference_free false", lambda o: not o.reference_free, ("reference_free",))
KEPT = Where(
    "with --precompute_ref_log_probs true, and a reference",
    lambda o: o.precompute_ref_log_probs and not o.reference_free,
    ("precompute_ref_log_probs", "reference_free"),
)
REDRAWN = Where(
    "on ranking lists, without --precompute_ref_log_probs",
    lambda o: not on_files(o) and not o.precompute_ref_log_probs,
    (*LISTS.decided_by, "precompute_ref_log_probs"),
)
ANSWERS = {
    "preferences": ALWAYS,
    "preference_answer": LISTS,
    "num_negatives": LISTS,
    "negatives": LISTS,
    "negatives_from": LISTS,
    "resample_negatives": REDRAWN,
}
CHOSEN = Description(
    name="sft_chosen",
    summary="cross-entropy of the chosen answers",
    stands_for="sft",
    objective=ChosenObjective,
    run="preferences",
    prompts=PromptBuilder,
    reads=ANSWERS,
    logs={"sft": "cross-entropy"},
    learns=preferred_answer,
    ranks_lists=False,
)
DMPO = Description(
    name="dmpo",
    summary="prefers a chosen answer over many rejected ones (arXiv 2405.16127); also S-DPO and Mult-DPO",
    objective=DMPOObjective,
    run="preferences",
    prompts=PromptBuilder,
    reads=ANSWERS
    | {
        "num_negatives": ALWAYS,
        "dpo_beta": ALWAYS,
        "dmpo_variant": ALWAYS,
        "reference_free": ALWAYS,
        "ftx": ALWAYS,
        "precompute_ref_log_probs": REFERENCED,
        "ref_log_probs": KEPT,
    },
    logs={
        "preference": "preference",
        "ftx": "cross-entropy of the chosen answer",
        "reward_accuracy": "share of pairs won",
        "reward_margin": "margin",
    },
    learns=preferred_answer,
    ranks_lists=False,
    compares=True,
    instead={"beta": "dpo_beta"},
)
