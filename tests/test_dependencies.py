"""Whatever the code imports is declared in pyproject.toml, in the extra of those who use it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {  # folder -> the extras its files may import from, beside the dependencies of everyone
    "alro_fast": {"baselines", "recranker", "plots", "study", "trackers", "cuda"},
    "kernels": set(),
    "bench": {"bench"},
    "scripts": set(),
    "tests": {"test"},
}
OWN = {"alro_fast", "bench", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file but the standard library's; `pytest.importorskip` is no need of it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - OWN


def declared(extras: set[str]) -> set[str]:
    """Distributions of the dependencies and of extras, with the extras that those name."""
    wanted, todo = set(), [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    while todo:
        for requirement in todo.pop():
            name, among = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
            if name == PROJECT["name"]:
                todo += [PROJECT["optional-dependencies"][extra] for extra in among.split(",")]
            else:
                wanted.add(normal(name))
    return wanted


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("folder", EXTRAS)
def test_every_import_is_declared(folder):
    found, allowed = packages_distributions(), declared(EXTRAS[folder])
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imported(path)
        if not {normal(each) for each in found.get(name, [name])} & allowed  # not installed here: by its own name
    }
    assert not missing
