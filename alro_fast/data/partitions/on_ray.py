"""Steps of `prepare_partitions` as tasks of Ray Data (extra `ray`): `prepare_partitions(..., each=on_ray)`.

Every task reads and writes files of the output folder: machines of a cluster share it, at the same path. A task has one
step of one partition in its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...errors import AlroFastError


def on_ray(step: Callable[[int], None], parts: Sequence[int]) -> None:
    """Call `step` with every part, on the cluster that Ray is connected to, or on this machine.

    Raises AlroFastError where Ray is not installed, and what a step raised of it.
    """
    try:
        import ray
    except ImportError:
        raise AlroFastError("Ray is not installed; install alro-fast[ray], or leave out each=on_ray") from None

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            step(parts[int(row["id"])])
        except AlroFastError as error:
            return {"error": str(error)}
        return {"error": ""}

    for row in ray.data.range(len(parts), override_num_blocks=max(len(parts), 1)).map(run).take_all():
        if row["error"]:
            raise AlroFastError(row["error"])
