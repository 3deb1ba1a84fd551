"""Which trees go into which batch: best-fit-decreasing bin packing by rows, the same number of batches every epoch, of
training then levelled by cost.

Rows are what memory bounds, cost is what a step takes: rows, visible pairs of attention and answer rows each at their
price (`alro_fast.training.speed.costs`). Packing leaves the last batches emptier than the others; `levelled` moves and
swaps trees until all cost alike, so that no process waits for another.
"""

from .best_fit import halve, plan_batches, plan_forwards
from .epochs import EpochPlans
from .level import SPREAD, levelled, spread

__all__ = ["SPREAD", "EpochPlans", "halve", "levelled", "plan_batches", "plan_forwards", "spread"]
