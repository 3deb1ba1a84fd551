"""Every fenced command of README.md and docs/*.md, page by page and in order, from an empty folder on a CPU.

Commands of this package run in this process, runs cut to a few lists; all others run in bash. A block that needs more
than a reader has at hand says so (support/places.py: NEEDS) and runs with stand-ins, or is parsed where there are none.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
from places import NEEDS, PAGES, ROOT, Block, blocks, command, statements, steps
from tiny import byte_tokenizer, save_base

from alro_fast.cli import COMMANDS
from alro_fast.studies.plan import parse_seeds, read_study

WITH_COMMANDS = [page for page in PAGES if any(block.language == "bash" for block in blocks(page))]
STOOD_IN = {"movielens", "hub"}
FEW = {"max_train_lists": "8", "max_eval_lists": "3", "max_test_lists": "4"}


def movielens(folder) -> None:
    """A made data set in the files of ml-latest-small: two tastes, 40 users with 60 ratings each."""
    folder.mkdir(parents=True)
    draw, genres = np.random.default_rng(0), ("Comedy", "Drama")
    movies = [f'{item},"Film {item} ({1950 + item % 60})",{genres[item % 2]}' for item in range(1, 121)]
    ratings = [
        f"{user},{item},{(8 if item % 2 == user % 2 else 1) / 2 + draw.integers(0, 3) / 2},{1000 + time}"
        for user in range(1, 41)
        for time, item in enumerate(draw.permutation(120)[:60] + 1)
    ]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n")
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")


def shortened(name: str, words: list[str]) -> list[str]:
    """The same, on a few lists, with what stands in for the hub and for MovieLens."""
    words = ["hub" if word == "Qwen/Qwen3-0.6B" else word for word in words if word != "--accept_licence"]
    more = {}
    if name == "train" and not {"--preferences", "--stage_preferences"} & set(words):
        more = FEW
    elif name == "evaluate" and "--lists" in words:
        more = {"limit": "3"}
    elif name in ("prepare", "first_stage") and "ml-latest-small" in words:
        more = {"raw_dir": "data/ml-latest-small"} | ({"num_samples": "40"} if name == "first_stage" else {})
        words.append("--allow_altered")
    for option, value in more.items():
        if f"--{option}" not in words:
            words += [f"--{option}", value]
    return words


def parsed(name: str, words: list[str]) -> None:
    """As the command itself would, without looking for files: an option it lacks, or does not read, is an error."""
    if name == "train":
        from alro_fast.training.config import parse

        parse(words)
        return
    module = importlib.import_module(f"alro_fast.{name}")
    options = module.parser().parse_args(words)
    if name == "study":
        assert read_study(options.study)
        module.changes(options.set)
        assert parse_seeds(options.seeds or "0")


def runs(block: Block) -> bool:
    return set(block.needs) <= STOOD_IN


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_run_as_pasted(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # noqa: PTH120
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    movielens(tmp_path / "data" / "ml-latest-small")
    save_base(tmp_path / "hub", byte_tokenizer())
    for block in blocks(page):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.text)
        if block.language == "python" and "out/" in block.text:  # others: test_docs.py
            code = compile(block.text, str(page), "exec")
            if runs(block):
                exec(code, {"__name__": "docs"})
        for name, given in steps(block):
            if name == "bash":
                if runs(block):
                    subprocess.run(["bash", "-euc", given], check=True, env=environment, timeout=60)
                continue
            assert name in COMMANDS
            parsed(name, given)
            if runs(block):
                importlib.import_module(f"alro_fast.{name}").main(shortened(name, given))


def test_marks_are_known_and_the_readme_needs_little():
    marks = {mark for page in PAGES for block in blocks(page) for mark in block.needs}
    assert marks <= NEEDS.keys()
    unmarked = [block for block in blocks(ROOT / "README.md") if block.language == "bash" and not block.needs]
    assert sum(len(list(statements(block.text))) for block in unmarked) >= 10


def test_statements_are_found_whole():
    script = "# said\ncat > a <<'END'\nx | y\nEND\npython -m alro_fast.rank \\\n  a\n\npython -m alro_fast.rank - < a\n"
    heredoc, ours, piped = statements(script)
    assert heredoc == "cat > a <<'END'\nx | y\nEND"
    assert command(heredoc) is command(piped) is None
    assert command(ours) == ("rank", ["a"])
    assert command("alro-fast train --seed 1  # again") == ("train", ["--seed", "1"])
    assert command("torchrun --nproc_per_node 2 -m alro_fast.rank a --top_k 1") == ("rank", ["a", "--top_k", "1"])
    assert command("pytest bench") is None
    together = list(steps(Block("bash", "a=1\necho $a\npython -m alro_fast.report out\nls\n", (), None)))
    assert together == [("bash", "a=1\necho $a"), ("report", ["out"]), ("bash", "ls")]
    assert list(steps(Block("python", "import torch\n", (), None))) == []
