"""The faults: each strikes a small run on the CPU, which then goes on; beside it stands the run that nothing struck."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from .processes import Ended, Laboratory
from .wounds import PLACES

SMALL = """
    --max_train_lists 24 --max_eval_lists 3 --max_test_lists 4 --num_train_epochs 2 --tokens_per_batch 1200
    --save_strategy steps --save_steps 2 --eval_strategy steps --eval_steps 4 --logging_steps 2
    --learning_rate 0.003 --use_cpu true --disable_tqdm true --report_to none --baselines none --seed 5
"""
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """One fault and what came of it. steps: done again; weights: the largest difference in the end, None where not
    compared; lists: how many were trained more or less often than without it."""

    fault: str
    ended: Ended
    steps: int = 0
    weights: float | None = None
    lists: int = 0
    wrong: str = ""


class Faults:
    """All of them, in a folder of their own."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.lab = Laboratory(folder)

    def whole(self) -> None:
        """The run that nothing strikes, the data for all, and how many changes to files a save is."""
        made = self.lab.run("train", ["--output_dir", self.folder / "made", *SMALL.split()])
        if made.status:
            raise SystemExit(made.output)
        shutil.copytree(self.folder / "made" / "data", self.folder / "data")
        counted = {"kind": "count", "save": 2, "file": str(self.folder / "changes.txt")}
        ended = self.lab.run("train", self.words("whole"), counted, "whole")
        if ended.status:
            raise SystemExit(ended.output)
        self.steps = max(self.lab.trained("whole"))
        self.changes = int((self.folder / "changes.txt").read_text())

    # ---- a run

    def words(self, name: str, *more: object) -> list[object]:
        data = self.folder / "data"
        return ["--output_dir", self.folder / name, "--data_dir", data, *SMALL.split(), *more]

    def struck(self, fault: str, wound: dict[str, object], status: int = 137, processes: int = 1) -> Outcome:
        """A run that is struck, and then given again with --resume_from_checkpoint auto, as often as it needs: once."""
        name = f"run-{self.lab.count}"
        if processes > 1:
            ended = self.lab.launch(processes, self.words(name), wound, name)
        else:
            ended = self.lab.run("train", self.words(name), wound, name)
        before = self.lab.trained(name)
        wrong = "" if ended.status == status or processes > 1 else f"ended with {ended.status}: {ended.said}"
        wrong = wrong or ("it says that everything is in" if "everything is in" in ended.output else "")
        self.heal(name)
        auto = ("--resume_from_checkpoint", "auto")
        if processes > 1:
            again = self.lab.launch(processes, self.words(name, *auto), {}, name)
        else:
            again = self.lab.run("train", self.words(name, *auto), trace=name)
        wrong = wrong or (f"did not go on: {again.said}" if again.status else "")
        if processes > 1 and not (self.folder / "whole2").is_dir():
            self.lab.launch(processes, self.words("whole2"), {}, "whole2")
        return self.compared(name, fault, ended, before, wrong, "whole2" if processes > 1 else "whole")

    def heal(self, name: str) -> None:
        """What was struck is as before: the folder can be written again."""
        if (self.folder / name).is_dir():
            (self.folder / name).chmod(0o755)

    def compared(
        self, name: str, fault: str, ended: Ended, before: dict[int, list[str]], wrong: str, whole: str = "whole"
    ) -> Outcome:
        """With the run that nothing struck."""
        path = self.folder / name / "adapter_model.safetensors"
        if wrong or not path.is_file():
            return Outcome(fault, ended, wrong=wrong or "it left no adapter")
        found, expected = load_file(path), load_file(self.folder / whole / "adapter_model.safetensors")
        difference = max(float(np.abs(found[key] - expected[key]).max()) for key in expected)
        one, other = ([x for lists in self.lab.trained(run).values() for x in lists] for run in (name, whole))
        lists = sum(one.count(x) != other.count(x) for x in {*one, *other})
        second = [*self.lab.runs(name), {}][1]
        again = len(before.keys() & second.keys())
        if difference > TOLERANCE or lists:
            wrong = f"weights differ by {difference:.1e}, {lists} lists were trained more or less often"
        return Outcome(fault, ended, again, difference, lists, wrong)

    # ---- faults

    def step(self) -> Outcome:
        step, place = self.draw.randint(1, self.steps), self.draw.choice(PLACES)
        return self.struck("SIGKILL in a step", {"kind": "kill at step", "step": step, "place": place})

    def save(self) -> Outcome:
        save = self.draw.randint(1, self.steps // 2)
        wound = {"kind": "kill in save", "save": save}
        where = {"share": self.draw.random()} if self.draw.random() < 0.4 else {
            "change": self.draw.randint(1, self.changes)
        }  # fmt: skip
        return self.struck("SIGKILL in a save", wound | where)

    def rank(self) -> Outcome:
        wound = {"kind": "kill at step", "step": self.draw.randint(1, self.steps // 2), "place": PLACES[0]}
        return self.struck("SIGKILL of one rank of two", wound | {"rank": self.draw.randint(0, 1)}, processes=2)

    def stop(self) -> Outcome:
        number = self.draw.choice((signal.SIGTERM, signal.SIGINT))
        wound = {"kind": "signal at step", "step": self.draw.randint(1, self.steps - 1), "signal": int(number)}
        return self.struck("SIGTERM or SIGINT", wound, status=128 + number)

    def full(self) -> Outcome:
        wound = {"kind": "full", "save": 2, "bytes": 700_000}
        return self.one_line(self.struck("a disk that takes no more, in a save", wound, status=2), "cannot be written")

    def read_only(self) -> Outcome:
        wound = {"kind": "read-only", "save": 2}
        found = self.struck("a folder that is read-only, in a save", wound, status=2)
        return self.one_line(found, "cannot be written (Permission denied)")

    def memory(self) -> Outcome:
        wound = {"kind": "little memory", "step": self.draw.randint(2, self.steps), "bytes": 1 << 18}
        return self.one_line(self.struck("no memory left, in a step", wound, status=2), "--tokens_per_batch 1200")

    def numbers(self) -> Outcome:
        wound = {"kind": "no number", "steps": list(range(5, 99))}
        found = self.struck("infinite losses from a step on", wound, status=2)
        return self.one_line(found, "no finite loss and gradient (not finite: ")

    def vanished(self) -> Outcome:
        name, data = f"run-{self.lab.count}", self.folder / f"data-{self.lab.count}"
        shutil.copytree(self.folder / "data", data)
        words = [*self.words(name), "--data_dir", data]
        ended = self.lab.run("train", words, {"kind": "vanish", "step": 3, "folder": str(data)}, name)
        before = self.lab.trained(name)
        if ended.status:
            shutil.copytree(self.folder / "data", data)
            ended_again = self.lab.run("train", [*words, "--resume_from_checkpoint", "auto"], trace=name)
            if ended_again.status:
                return Outcome("lists that vanish", ended, wrong=ended_again.said)
            wrong = "" if ended.said.startswith("error: ") else ended.said
        else:
            wrong = ""
        return self.compared(name, "lists that vanish in a run", ended, before, wrong)

    def one_line(self, found: Outcome, told: str) -> Outcome:
        """The same, wrong where the command did not end with one line that says so."""
        lines = [line for line in found.ended.output.splitlines() if line.startswith(("error: ", "Traceback"))]
        good = len(lines) == 1 and told in lines[0]
        if found.wrong or good:
            return found
        return Outcome(found.fault, found.ended, wrong=f"said {found.ended.said!r}; expected a line with {told!r}")

    def prepare(self) -> Outcome:
        """The same folder prepared again, with other options, and killed on the way."""
        table = self.folder / "ratings.csv"
        if not table.is_file():
            rows = [f"u{u},i{(u * 7 + t * 3) % 60},{1 + (u + t) % 5},{t}" for u in range(30) for t in range(40)]
            table.write_text("\n".join(["user_id,item_id,rating,timestamp", *rows]) + "\n")
        words = ["--dataset", "csv", "--ratings_file", table, "--list_size", "5"]
        counted = self.folder / "prepare-changes.txt"
        expected = self.folder / "prepared"
        if not expected.is_dir():
            wound = {"kind": "count", "folder": str(expected), "file": str(counted)}
            ended = self.lab.run("prepare", [*words, "--output_dir", expected], wound)
            if ended.status:
                raise SystemExit(ended.output)
        out = self.folder / f"prepared-{self.lab.count}"
        older = self.lab.run("prepare", ["--output_dir", out, *words[:-1], "4"])
        at = self.draw.randint(1, int(counted.read_text()))
        wound = {"kind": "kill at change", "folder": str(out), "change": at}
        ended = self.lab.run("prepare", [*words, "--output_dir", out, "--overwrite_output_dir"], wound)
        again = self.lab.run("prepare", [*words, "--output_dir", out, "--overwrite_output_dir"])
        wrong = older.said if older.status else again.said if again.status else ""
        if not wrong:
            one, other = (json.loads((f / "manifest.json").read_text())["files"] for f in (out, expected))
            wrong = "" if one == other else "other lists"
        wrong = wrong or ("" if ended.status == 137 else f"ended with {ended.status}")
        return Outcome("SIGKILL in prepare", ended, wrong=wrong)

    def evaluate(self) -> Outcome:
        """An evaluation in place of an older one, killed on the way: one of them is there."""
        out, counted = self.folder / f"evaluation-{self.lab.count}", self.folder / "evaluation-changes.txt"
        words = ["--adapter", self.folder / "whole", "--lists", self.folder / "data", "--baselines", "none"]
        words += ["--output_dir", out, "--device", "cpu", "--bootstrap", "0"]
        older = self.lab.run("evaluate", [*words, "--limit", "3"])
        if not counted.is_file():
            wound = {"kind": "count", "folder": str(out), "file": str(counted)}
            self.lab.run("evaluate", [*words, "--limit", "3"], wound)
        at = self.draw.randint(1, int(counted.read_text()))
        wound = {"kind": "kill at change", "folder": str(out), "change": at}
        ended = self.lab.run("evaluate", [*words, "--limit", "5"], wound)
        report = self.lab.run("report", [out])
        lists = json.loads((out / "results.json").read_text())["about"]["lists"]
        lines = len((out / "predictions.jsonl").read_text().splitlines())
        again = self.lab.run("evaluate", [*words, "--limit", "5"])
        wrong = next((one.said for one in (older, report, again) if one.status), "")
        wrong = wrong or ("" if lists == lines and lists in (3, 5) else f"{lists} and {lines} lists")
        wrong = wrong or ("" if ended.status == 137 else f"ended with {ended.status}")
        return Outcome("SIGKILL while an evaluation replaces another", ended, wrong=wrong)


CASES: dict[str, tuple[Callable[[Faults], Outcome], int]] = {  # name -> how, and how often unless told
    "step": (Faults.step, 7),
    "save": (Faults.save, 5),
    "prepare": (Faults.prepare, 3),
    "evaluate": (Faults.evaluate, 3),
    "rank": (Faults.rank, 2),
    "stop": (Faults.stop, 4),
    "full": (Faults.full, 1),
    "read_only": (Faults.read_only, 1),
    "memory": (Faults.memory, 1),
    "numbers": (Faults.numbers, 1),
    "vanished": (Faults.vanished, 1),
}


def outcomes(folder: Path, names: list[str], times: int | None, seed: int) -> Iterator[Outcome]:
    """Every fault as often as told; a fault's moments are drawn from the seed and its name alone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    faults = Faults(folder, seed)
    faults.whole()
    for name in names:
        how, often = CASES[name]
        faults.draw = random.Random(f"{seed} {name}")
        for _ in range(times or often):
            yield how(faults)
