"""Training runs on preferences: files of them, or one positive and k negatives out of every ranking list.

`alro_fast.train` starts these for objectives whose description says so; they differ from its runs in their data,
in the reference, and in what is measured before and after.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import TrainerCallback

from ..data.negatives import NUM_NEGATIVES, Negatives, positive
from ..data.preferences import MOST_BYTES, Preference, read_preferences, with_first
from ..data.records import Item, RankingList
from ..errors import AlroFastError
from ..evaluation.preference_metrics import Scored, preference_metrics
from ..evaluation.preferences import measure, save, score_preferences, table
from ..modeling.sharded import together
from ..objectives.base import Example, Objective, build_objective
from ..objectives.dmpo import DMPOObjective, ReferenceTable, check_answers
from ..prompts.preference import PreferencePrompts
from ..run_folder import check_writable
from ..texts import read_bytes, read_json
from .config import Config
from .console import show_results
from .engines.checks import measured_later
from .reference_logprobs import reference_table
from .run import Run, prepare

MINED = "mined_negatives.json"  # in checkpoints: item indices by list_id, and the epoch they were chosen for
WATCHED = ("pair_accuracy", "user_auc", "hit@1")


class PreferenceFiles(NamedTuple):
    """Stands where a run has its prepared lists."""

    path: Path
    manifest: dict[str, Any]
    items: list[Item]
    train: list[Preference]
    tests: dict[str, list[Preference]]  # by the names of their files; the first one validates


class PreferenceRun(Run):
    """A run on chosen and rejected answers: of preferences among them, or supervised on the chosen ones."""

    prepared: Any  # PreparedData, or PreferenceFiles
    objective: DMPOObjective  # or ChosenObjective, which has no references
    negatives: Negatives | None

    @staticmethod
    def settle(config: Config) -> None:
        """Set options that follow from others; AlroFastError for those that do not go together."""
        model, objective, data = config.model, config.objective, config.data
        compares = config.description.compares and not objective.reference_free
        if compares and not model.use_peft and not objective.precompute_ref_log_probs:
            raise AlroFastError(
                "--use_peft false leaves no reference once training begins; add --precompute_ref_log_probs true "
                "(or --reference_free true)"
            )
        if objective.precompute_ref_log_probs and data.negatives == "hardest" and data.preferences is None:
            raise AlroFastError(
                "--precompute_ref_log_probs needs negatives that stay; --negatives hardest changes them every epoch"
            )
        if objective.dmpo_variant == "mult" and data.preferences is None and data.preference_answer == "pairs":
            raise AlroFastError(
                "--preference_answer pairs has a prompt per pair; --dmpo_variant mult compares answers to one prompt: "
                "take sdpo"
            )
        if model.model_name_or_path == "scratch" and data.preferences is not None:
            raise AlroFastError(
                "--model_name_or_path scratch learns its words from items; give a model for --preferences"
            )
        if data.preferences is not None and not data.eval_preferences and config.training.eval_strategy != "no":
            when = cast(Any, config.training.eval_strategy).value
            raise AlroFastError(f"--eval_strategy {when} has nothing to evaluate: add --eval_preferences")
        if objective.precompute_ref_log_probs:
            objective.resample_negatives = False
        if data.preferences is None and data.num_negatives is None:
            data.num_negatives = NUM_NEGATIVES

    @staticmethod
    def given(config: Config) -> Any:
        """The PreparedData or PreferenceFiles that a run begins with; None where they have yet to be prepared."""
        return Run.given(config) if config.data.preferences is None else read_files(config)

    def build(self) -> None:
        """Everything up to the Trainer; a file of references that is there already is checked too."""
        super().build()
        options = self.config.objective
        self.precomputes = (
            self.config.description.compares and options.precompute_ref_log_probs and not options.reference_free
        )
        if self.precomputes:
            self.reference_examples = self.examples_by_name()
            if self.reference_path != self.own_references:
                check_writable(self.reference_path.parent)
                if self.reference_path.is_file():
                    self.objective.references = self.precompute()
        if self.negatives is not None and self.negatives.by == "hardest":
            self.trainer.add_callback(_MineEveryEpoch(self))

    @property
    def signals(self) -> dict[str, tuple[str, ...]]:
        """Candidates have them where all are the list's own, and shown."""
        data, places = self.config.data, super().signals
        shown = data.negatives_from == "candidates" and data.preference_answer != "pairs"
        return places if shown else {part: names for part, names in places.items() if part == "history"}

    @property
    def watched(self) -> Sequence[str]:
        return WATCHED if len(self.lists["valid"]) else ()

    # ---- data

    def load(self, work: Path) -> Any:
        return prepare(self.config, work) if self.config.data.preferences is None else read_files(self.config)

    def splits(self) -> dict[str, Sequence[Any]]:
        """Train, valid and test; the tests by name are `self.tests`."""
        data = self.config.data
        if data.preferences is not None:
            self.negatives = None
            self.tests = dict(self.prepared.tests)
            return {"train": self.prepared.train, "valid": next(iter(self.tests.values()), []), "test": []}
        splits = super().splits()
        self.negatives = Negatives.of(
            self.prepared, count=cast(int, data.num_negatives), by=data.negatives, source=data.negatives_from,
            seed=self.training.seed,
        )  # fmt: skip
        drawn = self.negatives
        usable: dict[str, Sequence[Any]] = {
            name: [one for one in lists if drawn.usable(one)] for name, lists in splits.items()
        }
        left = sum(map(len, splits.values())) - sum(map(len, usable.values()))
        if left:
            print(f"{left:,} lists left out: no candidate is rated below another")
        self.tests = {}
        return usable

    def build_objective(self) -> Objective:
        config, data = self.config, self.config.data
        self.builder = None if data.preferences is not None else self.build_prompts()
        self.prompts = PreferencePrompts(
            self.tokenizer, self.builder, form=data.preference_answer, max_length=data.max_length
        )
        seed = self.training.seed
        if self.negatives is not None:
            self.tests = {self.prepared.manifest.get("dataset", "test"): self.lists["test"]}
        limit = data.max_test_lists
        self.tests = {name: people[:limit] for name, people in self.tests.items() if people}
        return build_objective(config.objective, self.prompts, answer=data.answer, seed=seed, negatives=self.negatives)

    # ---- reference and negatives

    @property
    def own_references(self) -> Path:
        """Where reference log-probabilities go that no file was named for: they serve this run, and its resumption."""
        return self.folder / "reference.safetensors"

    @property
    def reference_path(self) -> Path:
        return Path(self.config.objective.ref_log_probs or self.own_references)

    def examples_by_name(self) -> dict[str, Example]:
        """Training and validation examples by list_id; AlroFastError when two different records share one."""
        examples: dict[str, Example] = {}
        for name in ("train", "valid"):
            lists = self.lists[name]
            for example in self.objective.examples([lists[i] for i in range(len(lists))], range(len(lists)), epoch=0):
                earlier = examples.setdefault(example.source.list_id, example)
                if earlier is not example and earlier.source != example.source:
                    raise AlroFastError(
                        f"two different records are named {example.source.list_id}; rename one of the preference files"
                    )
        return examples

    def precompute(self) -> ReferenceTable:
        """Reference log-probabilities of the training and validation records, from the file or computed into it."""
        model, training = self.model.to(self.training.device), self.training
        return reference_table(
            model, list(self.reference_examples.values()), self.reference_path, training.tokens_per_batch,
            self.config.objective.backend, self.trainer.accelerator.autocast, training.share,
        )  # fmt: skip

    def mine(self, epoch: int) -> None:
        """Choose every training list's negatives: those of its pool that come nearest to beating the positive.

        The model as it stands is shown the pool as in training, `num_negatives` at a time.
        """
        draw, training = cast(Negatives, self.negatives), self.training
        if self.checkpoint is not None and self._mined_before(Path(self.checkpoint) / MINED, epoch):
            return
        shown = []
        for one in (self.lists["train"][i] for i in range(len(self.lists["train"]))):
            pool = draw.pool(one, epoch)
            shown += [draw.shown(one, pool[i : i + draw.count], epoch) for i in range(0, len(pool), draw.count)]
        found: dict[str, list[tuple[float, Item]]] = {}
        backend = self.config.objective.backend
        budget, share = training.tokens_per_batch, training.share
        scored = together(
            self.model, lambda: score_preferences(self.model, self.prompts, shown, budget, backend, share)
        )
        for contest, scores in zip(shown, scored, strict=True):
            best = positive(contest)
            others = (item for i, item in enumerate(contest.candidates) if i != best)
            found.setdefault(contest.list_id, []).extend(zip(scores.rejected - scores.chosen, others))
        for name, others_of in found.items():
            hardest = sorted(others_of, key=lambda scored: -scored[0])[: draw.count]
            draw.mined[name] = tuple(item for _, item in hardest)
        self.mined_epoch = epoch

    def _mined_before(self, file: Path, epoch: int) -> bool:
        """Take the negatives that this epoch of a resumed run began with; False where the checkpoint has others."""
        kept = read_json(file) if file.is_file() else {}
        if kept.get("epoch") != epoch:
            return False
        items = self.prepared.items
        cast(Negatives, self.negatives).mined = {
            name: tuple(items[i] for i in chosen) for name, chosen in kept["items"].items()
        }
        self.mined_epoch = epoch
        return True

    def save_extras(self, folder: Path) -> None:
        super().save_extras(folder)
        if self.negatives is not None and self.negatives.mined:
            items = {name: [item.index for item in chosen] for name, chosen in self.negatives.mined.items()}
            kept = json.dumps({"epoch": self.mined_epoch, "items": items})
            (folder / MINED).write_text(kept + "\n", encoding="utf-8")

    # ---- measuring

    def scored(self, people: Sequence[Preference | RankingList]) -> list[Scored]:
        """Answer scores of the model as it stands; negatives of lists as drawn for epoch 0, never mined."""
        if self.negatives is not None:
            people = [self.negatives.contest(cast(RankingList, one), 0) for one in people]
        backend, share = self.config.objective.backend, self.training.share
        return together(
            self.model,
            lambda: score_preferences(self.model, self.prompts, people, self.config.budget, backend, share),
        )

    def validate(self) -> dict[str, float]:
        """Preference metrics on the validation records."""
        lists = self.lists["valid"]
        found = preference_metrics(self.scored([lists[i] for i in range(len(lists))]))
        return {name: found[name] for name in WATCHED}

    def train(self) -> None:
        """Measure, train, measure again; then the table and the files of the run."""
        self.take_over()
        started = time.perf_counter()
        if self.precomputes and self.objective.references is None:
            if self.checkpoint is None and self.training.process_index == 0:
                self.own_references.unlink(missing_ok=True)
            self.objective.references = self.precompute()
        earlier = "untuned" if self.config.model.init_adapter is None else "earlier stage"
        later = measured_later(self.trainer, self.config.model.use_peft)
        before = {} if later else {name: self.scored(people) for name, people in self.tests.items()}
        self.fit()
        self.model.eval()
        if later:
            with cast(Any, self.model).disable_adapter():
                before = {name: self.scored(people) for name, people in self.tests.items()}
        after = {name: self.scored(people) for name, people in self.tests.items()}
        scored = {name: {earlier: before[name], "tuned": after[name]} for name in self.tests}
        if not self.training.should_save:
            return
        if scored:
            results = {name: measure(rows) for name, rows in scored.items()}
            save(self.folder, results, scored)
            show_results(table(results), results, self.training.log_json)
        following = f"python -m alro_fast.evaluate --adapter {self.folder} --preferences FILE"
        self.end(started, following)


def read_files(config: Config) -> PreferenceFiles:
    """The preference files of a run; AlroFastError where one is not what its objective takes."""
    data, compares = config.data, config.description.compares
    file, measured = Path(cast(str, data.preferences)), {Path(name).stem: Path(name) for name in data.eval_preferences}
    if len(measured) < len(data.eval_preferences):
        raise AlroFastError("two --eval_preferences files have one name; rename one, results are kept by it")
    train = read_preferences(file, need_rejected=compares)
    tests = {name: read_preferences(path) for name, path in measured.items()}
    if compares and data.num_negatives is not None:
        train = [with_first(data.num_negatives, one) for one in train]
    if compares:
        for one in (*train, *next(iter(tests.values()), ())):
            check_answers(one, one.list_id, config.objective.dmpo_variant)
    roles = {f"train: {file.name}": file} | {f"eval: {path.name}": path for path in measured.values()}
    hashes = {role: hashlib.sha256(read_bytes(path, MOST_BYTES)).hexdigest() for role, path in roles.items()}
    return PreferenceFiles(file, {"dataset": file.stem, "files": hashes}, [], train, tests)


class _MineEveryEpoch(TrainerCallback):
    def __init__(self, owner: PreferenceRun) -> None:
        self.owner = owner

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.owner.mine(int(state.epoch or 0))
