"""The losses. `reference` defines them in plain PyTorch; the modules beside it are the fast way to the same numbers."""

from .alro import ALROLoss, ALROLossOutput, alro_loss, alro_loss_from_logits
from .collator import RankingCollator
from .lists import ALROCounts, Grades, RankingLists, alro_counts, check_lists
from .preference import DMPOLoss, PreferenceLoss, dmpo_loss

__all__ = [
    "ALROCounts",
    "ALROLoss",
    "ALROLossOutput",
    "DMPOLoss",
    "Grades",
    "PreferenceLoss",
    "RankingCollator",
    "RankingLists",
    "alro_counts",
    "alro_loss",
    "alro_loss_from_logits",
    "check_lists",
    "dmpo_loss",
]
