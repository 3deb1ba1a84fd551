"""The house: rooms that can be seen at a glance, modules that can be read at a sitting, short names that are the same
modules. Which room may import which is a contract of import-linter (`make layers`)."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from places import ROOT

import alro_fast

MOST_FILES, MOST_LINES, MOST_COMMAND_LINES = 15, 500, 120
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LAYERS = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """What git tracks or would: relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to it is not known")
    return sorted({Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()})


def lines(path: Path) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_a_folder_has_few_files(files):
    counted = Counter(file.parent for file in files if file.name != "py.typed")  # an empty mark for type checkers
    crowded = {str(folder): n for folder, n in counted.items() if n > MOST_FILES}
    assert len(files) > 100
    assert not crowded, f"more than {MOST_FILES} files"


def test_a_module_is_read_at_a_sitting(files):
    modules = [file for file in files if file.suffix in (".py", ".cpp", ".h", ".sh")]
    long = {str(file): n for file in modules if (n := lines(file)) > MOST_LINES}
    assert len(modules) > 100
    assert not long, f"more than {MOST_LINES} lines"


def test_a_command_parses_calls_and_prints():
    commands = LAYERS[0].split(" | ")
    assert len(commands) >= 7
    files = {name: Path(*name.split(".")) for name in commands}
    files = {name: at / "__init__.py" if (ROOT / at).is_dir() else at.with_suffix(".py") for name, at in files.items()}
    long = {name: n for name, file in files.items() if (n := lines(file)) >= MOST_COMMAND_LINES}
    assert not long, f"{MOST_COMMAND_LINES} lines or more"


def test_every_module_is_in_the_contract(files):
    """A new room, or a module beside the rooms, has a place in the order of imports."""
    known = {name for layer in LAYERS for name in layer.split(" | ")}
    found = {
        ".".join(("alro_fast", file.parts[1].removesuffix(".py")))
        for file in files
        if file.parts[0] == "alro_fast" and file.suffix == ".py"
    }
    assert found - {"alro_fast.__init__", "alro_fast.__main__"} <= known


@pytest.mark.parametrize("short", sorted(alro_fast._ALSO_AT))
def test_a_short_name_is_the_same_module(short):
    assert importlib.import_module(f"alro_fast.{short}") is importlib.import_module(
        f"alro_fast.{alro_fast._ALSO_AT[short]}"
    )


def test_short_names_may_be_imported_first():
    """In a fresh process, before the modules they stand for, and both ways that an import is written."""
    tried = "".join(
        f"import alro_fast.{short} as a; from alro_fast import {short} as b; import alro_fast.{long} as c\n"
        "assert a is b is c, c.__name__\n"
        for short, long in alro_fast._ALSO_AT.items()
    )
    done = subprocess.run([sys.executable, "-c", tried], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_commits_and_ci_format_with_the_same_versions():
    hooks = re.findall(r"[\w-]+==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {hook.partition("==")[0] for hook in hooks} == {"ruff", "clang-format"}
    assert set(hooks) <= set(PROJECT["project"]["optional-dependencies"]["dev"])
