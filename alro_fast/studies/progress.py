"""What a study prints as its runs end."""

from __future__ import annotations

from .figures import figures
from .plan import PlannedRun, Study


class Progress:
    """A line for every run that ends."""

    def __init__(self, study: Study, waiting: int, processes: int) -> None:
        self.study, self.waiting, self.processes = study, waiting, processes
        self.ended, self.spent = 0, 0.0

    def __call__(self, run: PlannedRun, seconds: float, complaint: str | None) -> None:
        self.ended, self.spent = self.ended + 1, self.spent + seconds
        left = (self.waiting - self.ended) * self.spent / self.ended / self.processes
        if complaint is not None:
            told = f"failed: {complaint} ({run.log})"
        else:
            means = (f"{measure} {each.mean:.4f}" for measure, each in figures(self.study, run).items())
            told = f"{', '.join(means)}, {seconds:.0f} s"
        print(f"[{self.ended}/{self.waiting}] {run.title}: {told}; about {left / 60:.1f} minutes left", flush=True)
