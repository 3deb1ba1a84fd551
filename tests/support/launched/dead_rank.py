"""A short run in which process 1 fails while the others wait for it: `dead_rank.py FOLDER`, under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import long_run

from alro_fast.training.trainer import RankerTrainer


def failing(trainer, *given, **more):
    if trainer.state.global_step == 2 and os.environ["RANK"] == "1":
        raise ValueError("the second process fails here")
    return compute(trainer, *given, **more)


if __name__ == "__main__":
    compute, RankerTrainer.compute_loss = RankerTrainer.compute_loss, failing
    long_run.train(Path(sys.argv[1]), lists=60, epochs=2, accumulation=1)
