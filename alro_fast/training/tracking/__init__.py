"""What a run leaves for others to see: its results in the trackers of --report_to, and its model card."""

from .card import model_card
from .closing import Closing, read_results
from .hub import check_pushed, push_results

__all__ = ["Closing", "check_pushed", "model_card", "push_results", "read_results"]
