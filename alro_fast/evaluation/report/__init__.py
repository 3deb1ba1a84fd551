"""report.html of a run or an evaluation, of two compared, and their tables as CSV."""

from .compare import write_comparison
from .page import report_line, write_report

__all__ = ["report_line", "write_comparison", "write_report"]
