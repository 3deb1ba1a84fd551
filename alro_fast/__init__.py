"""alro_fast: fine-tune LLMs to rank a user's candidates (ALRO, DMPO, RecRanker) on one prefix-shared, fused engine."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {  # name -> module that defines it; imported on first use, so `import alro_fast` stays light
    "ALROCounts": "losses",
    "ALROLoss": "losses",
    "DMPOLoss": "preference",
    "PreferenceLoss": "preference",
    "RankingLists": "losses",
    "Grades": "losses",
    "alro_counts": "losses",
    "alro_loss": "losses",
    "alro_loss_from_logits": "losses",
    "check_lists": "losses",
    "dmpo_loss": "preference",
    "head_of": "fused_head",
    "linear_kl": "ops",
    "linear_logprobs": "ops",
    "soft_argmax_ranks": "ops",
    "soft_lambda": "ops",
    "warmup": "backends.triton",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
