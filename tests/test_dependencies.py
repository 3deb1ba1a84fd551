"""Whatever the code imports is declared in pyproject.toml, in the extra of those who use it."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path

import pytest
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {  # folder -> the extras its files may import from, beside the dependencies of everyone
    "alro_fast": {"baselines", "recranker", "plots", "study", "ray", "trackers", "cuda"},
    "kernels": set(),
    "bench": {"bench"},
    "scripts": set(),
    "tests": {"test"},
}
OWN = {"alro_fast", "bench", "launched", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}


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


def test_licences_of_what_is_needed_are_allowed(capsys):
    """`make licences`: of what is installed here; and a licence that is not allowed is told."""
    script = runpy.run_path(str(ROOT / "scripts" / "licences.py"))
    assert script["main"]() == 0, capsys.readouterr().err
    assert "torch " in capsys.readouterr().out
    assert script["refused"]({"a": {"MIT", "AGPL-3.0"}, "b": {"none named"}, "nvidia-cublas": {"Other"}}) == {
        "a": {"AGPL-3.0"},
        "b": {"none named"},
    }


@pytest.mark.parametrize(
    ("told", "licences"),
    [
        ("License-Expression: Apache-2.0 AND (MIT OR BSD-2-Clause)", {"Apache-2.0", "MIT", "BSD-2-Clause"}),
        ("Classifier: License :: OSI Approved :: MIT License", {"MIT"}),
        ("License: Apache 2.0 License", {"Apache-2.0"}),
        ("License: MPL-2.0 AND MIT", {"MPL-2.0", "MIT"}),
        ("License: GPLv3", {"GPLv3"}),
        ("Summary: x", {"none named"}),
    ],
)
def test_a_licence_is_read_as_it_is_told(told, licences, tmp_path):
    (folder := tmp_path / "a-1.dist-info").mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: a\nVersion: 1\n{told}\n")
    found = runpy.run_path(str(ROOT / "scripts" / "licences.py"))["licences"]
    assert found(PathDistribution(folder)) == licences
