"""Tune a ranker: `python -m alro_fast.train [--config RECIPE] [options]`. No arguments: the demo, on the CPU.

Steps: options -> prepared lists -> base model and adapter -> objective -> Trainer -> closing table on the test lists.
"""

from __future__ import annotations

from .cli import run  # before torch: see there

# isort: split

import logging
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from .modeling.memory import keep_freed_memory
from .training.config import parse
from .training.kinds import run_for, stages


def main(argv: Sequence[str]) -> None:
    """Parse, check, build, train, compare."""
    config = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "torch", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    keep_freed_memory()
    for stage in list(stages(config, argv)):
        session = run_for(stage)
        session.describe()
        if not stage.training.dry_run:
            session.train()


if __name__ == "__main__":
    run(main)
