"""Commands one after the other in the processes of one launch, with what each of them had to do.

`shared_work.py FOLDER`: FOLDER/commands.json holds [[name, [word, ...]], ...]; leaves work-RANK.json, for each command
the rows that this process ran the trunk over, and the seconds of CPU that it took.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from alro_fast.cli import run
from alro_fast.modeling import logprobs
from alro_fast.processes.dealing import dealing
from alro_fast.ranking import decoding, reading


def counting(module, name: str, rows) -> list[int]:
    """Replace a function of a module by one that notes what `rows` says of its arguments."""
    noted, ordinary = [], getattr(module, name)

    def noting(*given):
        noted.append(int(rows(*given)))
        return ordinary(*given)

    setattr(module, name, noting)
    return noted


def work(commands) -> list[tuple[int, float]]:
    """Runs the commands; (rows, seconds) of each."""
    noted = [
        counting(reading, "answer_hidden_states", lambda model, packed: packed.unique_tokens),
        counting(logprobs, "answer_hidden_states", lambda model, packed: packed.unique_tokens),
        counting(decoding, "_forward", lambda trunk, ids, *_: ids.numel()),
    ]
    found = []
    for name, words in commands:
        before, started = sum(map(sum, noted)), time.process_time()
        run(importlib.import_module(f"alro_fast.{name}").main, words)
        found.append((sum(map(sum, noted)) - before, time.process_time() - started))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with dealing("cpu"):
        done = work(json.loads((folder / "commands.json").read_text()))
    (folder / f"work-{os.environ['RANK']}.json").write_text(json.dumps(done))
