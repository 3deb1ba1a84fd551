"""Other libraries' metrics on the same rankings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

_RANX = """
import json, sys, ranx
qrels, run, names = json.load(sys.stdin)
scores = ranx.evaluate(ranx.Qrels.from_dict(qrels), ranx.Run.from_dict(run), names, return_mean=False)
json.dump([dict(zip(sorted(run), values.tolist())) for values in (scores[name] for name in names)], sys.stdout)
"""


def ranx_scores(qrels: dict, run: dict, names: list[str]) -> dict[str, dict[str, float]]:
    """{metric: {query: value}} by ranx: in a process of its own without numba's compiler, which takes 20 s to start."""
    if find_spec("ranx") is None:
        pytest.skip("ranx is not installed")
    done = subprocess.run(
        [sys.executable, "-c", _RANX],
        input=json.dumps([qrels, run, names]),
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(names, json.loads(done.stdout), strict=True))
