"""CONTRIBUTING.md followed to the letter: every recipe applied to a copy of the checkout, its command run, its files
counted by git."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^### A new ([a-z ]+)\n(.*?)(?=^### |^## |\Z)", PAGE, flags=re.M | re.S))
MOST_FILES = {"objective": 3, "divergence": 3, "reader": 2, "ranking method": 3, "kernel configuration": 3}


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=reader", "-c", "user.email=reader@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what belongs to the checkout, as it is now, and of what was built in it; committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to it is not known")
    copy = tmp_path_factory.mktemp("contributing") / "checkout"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    git(copy, "init", "-q")
    git(copy, "add", "-A")
    git(copy, "commit", "-q", "--no-verify", "-m", "before")
    for built in (ROOT / "alro_fast").glob("_cpp*.so"):
        shutil.copy2(built, copy / "alro_fast")
    return copy


def follow(recipe: str, folder: Path) -> str:
    """Write the new files, edit the others, as the text says; its command."""
    path, commands = None, []
    for name, new, language, block in re.findall(
        r"^`([^`]+)`(, new)?:$|^```(\w+)\n(.*?)^```$", recipe, flags=re.M | re.S
    ):
        if name:
            path = folder / name
            assert path.exists() == (not new), name
        elif language == "python":
            assert not path.exists(), f"{path}: a new file is given whole, once"
            path.write_text(block, encoding="utf-8")
        elif language == "diff":
            lines, text = block.splitlines(keepends=True), path.read_text(encoding="utf-8")
            before = "".join(line[1:] for line in lines if line[0] != "+")
            assert text.count(before) == 1, f"{path} has this {text.count(before)} times:\n{before}"
            path.write_text(text.replace(before, "".join(line[1:] for line in lines if line[0] != "-")))
        else:
            commands.append(block.strip())
    (command,) = commands
    return command


def run(command: str, folder: Path, settings: Path) -> subprocess.CompletedProcess:
    """As a reader of the copy would; the package is that of the copy, also where another is installed for editing."""
    settings.mkdir()
    (settings / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [each for each in sys.meta_path if 'editable' not in type(each).__module__]\n"
    )
    words = shlex.split(command)
    assert words[0] == "python"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(settings), str(folder)]), "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    more = ["-p", "no:cacheprovider"] if "pytest" in words else []
    return subprocess.run(
        [sys.executable, *words[1:], *more], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_recipes_are_these():
    assert set(RECIPES) == set(MOST_FILES)


@pytest.mark.parametrize("name", MOST_FILES)
def test_a_recipe_works_and_touches_few_files(name, checkout, tmp_path):
    git(checkout, "clean", "-qfd")
    git(checkout, "checkout", "-q", ".")
    command = follow(RECIPES[name], checkout)
    git(checkout, "add", "-A")
    try:
        changed = git(checkout, "diff", "--cached", "--stat").splitlines()
        assert 0 < len(changed) - 1 <= MOST_FILES[name], changed
        done = run(command, checkout, tmp_path / "settings")
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
        where = [sys.executable, "-c", "import alro_fast; print(alro_fast.__file__)"]
        assert str(checkout) in run(shlex.join(["python", *where[1:]]), checkout, tmp_path / "again").stdout
    finally:
        git(checkout, "reset", "-q", "--hard")
