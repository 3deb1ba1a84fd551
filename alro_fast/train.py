"""Tune a ranker: `python -m alro_fast.train [--config RECIPE] [options]`. No arguments: the demo, on the CPU.

Steps: options -> prepared lists -> base model and adapter -> objective -> Trainer -> closing table on the test lists.
"""

from __future__ import annotations

from .cli import launch  # before torch: see there

if __name__ == "__main__":
    launch("train")

# isort: split


from collections.abc import Sequence

from .modeling.memory import keep_freed_memory
from .modeling.quiet import quiet_libraries
from .processes.dealing import dealing
from .training.config import parse
from .training.kinds import run_for, stages


def main(argv: Sequence[str]) -> None:
    """Parse, check, build, train, compare."""
    config = parse(argv)
    quiet_libraries()
    keep_freed_memory()
    for stage in list(stages(config, argv)):
        with run_for(stage) as session, dealing():
            session.describe()
            if not stage.training.dry_run:
                session.train()
