"""The runs of a study, a process each: begun, gone on with, left alone where they are finished."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AlroFastError
from ..run_folder import check_writable, contents, run_options
from .plan import PlannedRun, Study, told_apart

RESULTS = {True: "results.json", False: "preference_results.json"}  # written last, by whether the run ranks lists
PLAN = "study.yaml"
PATIENCE = 10.0  # seconds that a process has to end once it was asked to
Done = Callable[[PlannedRun, float, str | None], str | None]  # see `execute`


@dataclass
class Job:
    """A run under way: its commands that are left, and the one that runs."""

    run: PlannedRun
    commands: list[list[str]]
    process: subprocess.Popen[bytes] = field(init=False)  # once it runs
    started: float = field(default_factory=time.monotonic)


def check_folder(study: Study) -> None:
    """AlroFastError where the study's folder holds something else, or a run with other options than planned."""
    check_writable(study.folder)
    if contents(study.folder) and not (study.folder / PLAN).is_file():
        raise AlroFastError(f"--output_dir {study.folder} holds something else than a study; give another folder")
    for run in study.runs:
        for folder, planned in run.stages.items():
            recorded = told_apart(run_options(folder))
            for key in sorted(recorded.keys() | planned.keys()) if recorded else ():
                if recorded.get(key) != planned.get(key):
                    raise AlroFastError(
                        f"{folder} was run with {key} {recorded.get(key)!r}, and is now to be run with "
                        f"{planned.get(key)!r}: remove that folder, or give another --output_dir"
                    )


def finished(study: Study, run: PlannedRun) -> bool:
    """Whether a run has left its results; `check_folder` has seen that its options are those planned."""
    return (run.measured / RESULTS[study.ranks_lists]).is_file()


def evaluated(study: Study, run: PlannedRun) -> bool:
    """Whether the evaluation that the study asks for is there, or none is asked for."""
    return not study.evaluate or (study.evaluation(run) / "results.json").is_file()


def execute(study: Study, processes: int, done: Done) -> list[PlannedRun]:
    """Run what is not finished, `processes` at a time, in the study's order; the runs that failed.

    done(run, seconds, complaint): called as each ends; complaint: the last line of its log where it failed. What it
    returns is that complaint, or one of its own, by which the run counts as failed too. An interruption ends the
    processes at once: what they had finished stays, and checkpoints are gone on from.
    """
    waiting = [Job(run, commands) for run in study.runs if (commands := commands_of(study, run))]
    running: list[Job] = []
    failed: list[PlannedRun] = []
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                job.started = time.monotonic()
                job.run.folder.parent.mkdir(parents=True, exist_ok=True)
                job.run.log.unlink(missing_ok=True)
                _next(job, environment)
                running.append(job)
            time.sleep(0.05)
            for job in [job for job in running if job.process.poll() is not None]:
                complaint = _complaint(study, job)
                if complaint is None and job.commands:
                    _next(job, environment)
                    continue
                running.remove(job)
                complaint = done(job.run, time.monotonic() - job.started, complaint)
                failed += [job.run] if complaint is not None else []
    except BaseException:
        _stop(running)
        raise
    return failed


def commands_of(study: Study, run: PlannedRun) -> list[list[str]]:
    """What is left to do for a run, command after command."""
    commands = []
    if not finished(study, run):
        begun = any(run.folder.glob("**/checkpoint-*"))
        again = ["--resume_from_checkpoint", "auto"] if begun else ["--overwrite_output_dir", "true"]
        commands += [[*_module("train"), *run.words, "--output_dir", str(run.folder), *again]]
    if not evaluated(study, run):
        options = {"output_dir": study.evaluation(run), "bootstrap": 0, "baselines": "none"} | study.evaluate
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        lists = run.stages[run.measured].get("data_dir") or run.measured / "data"
        commands += [[*_module("evaluate"), "--adapter", str(run.measured), "--lists", str(lists), *words]]
    return commands


def last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _module(command: str) -> list[str]:
    return [sys.executable, "-m", f"alro_fast.{command}"]


def _next(job: Job, environment: dict[str, str]) -> None:
    with job.run.log.open("ab") as log:
        job.process = subprocess.Popen(
            job.commands.pop(0), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _complaint(study: Study, job: Job) -> str | None:
    """Why a run whose process has ended cannot go on; None where it can, or is done."""
    if job.process.returncode:
        return last_line(job.run.log)
    if not finished(study, job.run):
        return f"it left no {RESULTS[study.ranks_lists]}: there is nothing to test on"
    if not job.commands and not evaluated(study, job.run):
        return "its evaluation left no results.json"
    return None


def _stop(running: list[Job]) -> None:
    """End the processes that are left: asked first, then killed."""
    for job in running:
        if job.process.poll() is None:
            job.process.terminate()
    ends = time.monotonic() + PATIENCE
    for job in running:
        try:
            job.process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
