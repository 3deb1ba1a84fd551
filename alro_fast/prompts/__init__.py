"""Ranking list -> text -> token ids, slots and identifiers, for any tokenizer of the `tokenizers` library."""

from .builder import PromptBuilder, RankingPrompt, RatingBranch, RatingPrompt
from .identifiers import add_item_tokens, item_token
from .signal_tokens import SignalPrompts, SignalVocabulary, add_signal_tokens
from .template import load_template, ready_templates

__all__ = [
    "PromptBuilder",
    "RankingPrompt",
    "RatingBranch",
    "RatingPrompt",
    "SignalPrompts",
    "SignalVocabulary",
    "add_item_tokens",
    "add_signal_tokens",
    "item_token",
    "load_template",
    "ready_templates",
]
