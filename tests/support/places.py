"""Where the checkout is, the real data sets beside it, and its pages, cut into what can be run: fenced blocks, their
marks, and the commands in them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("ALRO_FAST_SHARED_DATA", ROOT.parent / "shared" / "data"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {  # what a line `<!-- needs: NAME, NAME -->` before a block says that an empty folder on a CPU does not have
    "install": "an environment of its own: .ci/run runs these lines",
    "clone": "the scripts of a checkout",
    "movielens": "MovieLens ml-latest-small, downloaded or at data/ml-latest-small; tests stand in a small made one",
    "hub": "a model of the Hugging Face hub; tests stand in a tiny one",
    "files": "files of the reader's own",
    "server": "an inference server",
    "minutes": "a long time",
    "gpus": "several GPUs; tests run the same engines on the CPU",
}


class Block(NamedTuple):
    """A fenced block of a page. file: the name that the line above gives it, "This is `NAME`:"."""

    language: str
    text: str
    needs: tuple[str, ...]
    file: str | None


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, start, said = [], None, [""]  # said: what stands above, without empty lines
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line == "```":
            mark = re.fullmatch(r"<!-- needs: (.+) -->", said[-1])
            named = re.search(r"is `([\w.-]+)`:$", said[-1])
            text = "".join(f"{each}\n" for each in lines[start + 1 : number])
            needs = tuple(each.strip() for each in mark[1].split(",")) if mark else ()
            found.append(Block(lines[start][3:].strip(), text, needs, named[1] if named else None))
            start = None
        elif start is None and line.strip():
            said.append(line)
    return found


def statements(script: str) -> Iterator[str]:
    """The commands of a script, each with its continued lines and its here-document."""
    lines = iter(script.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        whole = [line]
        while whole[-1].endswith("\\"):
            whole.append(next(lines))
        if word := re.search(r"<<\s*'?(\w+)'?", line):
            while whole[-1] != word[1]:
                whole.append(next(lines))
        yield "\n".join(whole)


def command(statement: str) -> tuple[str, list[str]] | None:
    """(name, words) of a command of this package, launched in whichever way; None for another, or where the shell has
    more to do than run it."""
    joined = statement.replace("\\\n", " ")
    if re.search(r"[|<>$;&]", joined):
        return None
    words = shlex.split(joined, comments=True)
    if words[0] == "torchrun" and "-m" in words:  # as one process; tests/processes has several
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"] and words[2].startswith("alro_fast."):
        return words[2].removeprefix("alro_fast."), words[3:]
    return (words[1], words[2:]) if words[0] == "alro-fast" else None


def steps(block: Block) -> Iterator[tuple[str, Any]]:
    """(command of this package, its words), and ("bash", what stands between two of those), in order."""
    between: list[str] = []
    for statement in statements(block.text) if block.language == "bash" else ():
        of_ours = command(statement)
        if of_ours is None:
            between.append(statement)
            continue
        if between:
            yield "bash", "\n".join(between)
            between = []
        yield of_ours
    if between:
        yield "bash", "\n".join(between)
