"""Ranking list -> text -> token ids, slots and identifiers, for any tokenizer of the `tokenizers` library."""

from .builder import PromptBuilder, RankingPrompt, RatingBranch, RatingPrompt
from .identifiers import add_item_tokens, item_token
from .template import load_template, ready_templates

__all__ = [
    "PromptBuilder",
    "RankingPrompt",
    "RatingBranch",
    "RatingPrompt",
    "add_item_tokens",
    "item_token",
    "load_template",
    "ready_templates",
]
