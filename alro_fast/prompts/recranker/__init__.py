"""RecRanker's prompts: pointwise, pairwise and listwise questions (Luo et al., arXiv 2312.16018)."""

from .prompts import TOP, Ask, Listing, Question, RecRankerPrompts, TaskPrompts
from .task_template import TaskTemplate, load_task_template, parse_task_template

__all__ = [
    "TOP",
    "Ask",
    "Listing",
    "Question",
    "RecRankerPrompts",
    "TaskPrompts",
    "TaskTemplate",
    "load_task_template",
    "parse_task_template",
]
