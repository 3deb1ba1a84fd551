"""Where the checkout is, and the real data sets beside it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("ALRO_FAST_SHARED_DATA", ROOT.parent / "shared" / "data"))
