"""The one plot that matplotlib draws (the `plots` extra): the users a first stage has sampled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AlroFastError

if TYPE_CHECKING:
    from ..data.first_stage.build import Hinted


def sampling_plot(path: Path, built: Hinted) -> None:
    """A PNG: share of users by number of likes, of all that can be drawn, of the pool, and of the users drawn.

    AlroFastError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise AlroFastError("plots need matplotlib; install it with: pip install 'alro-fast[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.9), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    likes = built.like_count
    everyone = np.flatnonzero(built.sample.cluster >= 0)
    pool = np.repeat(np.arange(len(likes)), built.sample.pool)
    bins = np.geomspace(likes[everyone].min(), likes[everyone].max() + 1, 25).tolist()
    groups = {"all users": everyone, "pool": pool, "drawn": built.sample.drawn}
    for (label, users), colour in zip(groups.items(), ("#9aa0a6", "#5b8fd0", "#1a9850"), strict=True):
        weights = np.full(len(users), 1 / len(users))
        axes.hist(likes[users], bins=bins, weights=weights, histtype="step", linewidth=1.8, color=colour, label=label)
    axes.set_title("likes of all users and of the sampled", loc="left", fontsize=11)
    axes.set_xscale("log")
    axes.set_xlabel("training likes of a user")
    axes.set_ylabel("share of users")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})
