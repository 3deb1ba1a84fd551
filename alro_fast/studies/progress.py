"""What a study prints as its runs end."""

from __future__ import annotations

from ..errors import AlroFastError
from .figures import figures
from .plan import PlannedRun, Study


class Progress:
    """A line for every run that ends."""

    def __init__(self, study: Study, waiting: int, processes: int) -> None:
        self.study, self.waiting, self.processes = study, waiting, processes
        self.ended, self.spent = 0, 0.0

    def __call__(self, run: PlannedRun, seconds: float, complaint: str | None) -> str | None:
        """The complaint, or why the figures of a run that made none cannot be read."""
        self.ended, self.spent = self.ended + 1, self.spent + seconds
        left = (self.waiting - self.ended) * self.spent / self.ended / self.processes
        told = f"{seconds:.0f} s"
        if complaint is None:
            try:
                means = (f"{measure} {each.mean:.4f}" for measure, each in figures(self.study, run).items())
                told = f"{', '.join(means)}, {told}"
            except AlroFastError as error:
                complaint = str(error)
        if complaint is not None:
            told = f"failed: {complaint} ({run.log})"
        print(f"[{self.ended}/{self.waiting}] {run.title}: {told}; about {left / 60:.1f} minutes left", flush=True)
        return complaint
