"""alro_fast: fine-tune LLMs to rank a user's candidates (ALRO, DMPO, RecRanker) on one prefix-shared, fused engine."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

_PUBLIC = {  # name -> module that defines it; imported on first use, so `import alro_fast` stays light
    "AlroFastError": "errors",
    "ALROCounts": "losses",
    "ALROLoss": "losses",
    "DMPOLoss": "losses",
    "PreferenceLoss": "losses",
    "Item": "data.records",
    "Ranker": "ranking.ranker",
    "RankingCollator": "losses",
    "RankingList": "data.records",
    "RankingLists": "losses",
    "Grades": "losses",
    "alro_counts": "losses",
    "alro_loss": "losses",
    "alro_loss_from_logits": "losses",
    "check_lists": "losses",
    "dmpo_loss": "losses",
    "head_of": "modeling.lm_head",
    "linear_kl": "ops",
    "linear_logprobs": "ops",
    "soft_argmax_ranks": "ops",
    "soft_lambda": "ops",
    "warmup": "ops.backends.warmup",
}
_ALSO_AT = {  # public modules by the short names that documentation and others' code import: the same module objects
    "attention": "modeling.attention",
    "config": "training.config",
    "fused_head": "modeling.lm_head",
    "hybrid": "ranking.hybrid",
    "metrics": "evaluation.metrics",
    "model": "modeling.loading",
    "packing": "modeling.packing",
    "reference": "losses.reference",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _ShortNames(MetaPathFinder, Loader):
    """`import alro_fast.packing` gives `alro_fast.modeling.packing`, and so on for `_ALSO_AT`."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _ALSO_AT else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(f".{_ALSO_AT[name.rpartition('.')[2]]}", __name__)


sys.meta_path.append(_ShortNames())
