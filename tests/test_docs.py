"""What README.md and docs/ show: Python blocks run, but for those that need a trained run. Commands do not run; their
modules and options exist, and so does what links and paths point to. The MovieLens script runs, cut short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MORE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=lambda page: page.stem
)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "docs"}
    for block in blocks(page, "python"):
        if "out/" not in block:  # those speak of a trained run's folder
            exec(compile(block, str(page), "exec"), names)


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if re.match(r"(python|alro-fast)\b", line)]
    return found


@pytest.mark.parametrize("command", [c for c in commands() if "alro_fast." in c or c.startswith("alro-fast")])
def test_every_option_that_the_pages_name_exists(command):
    """The command accepts all its flags: argument parsing alone, which fails on an unknown one."""
    import importlib

    words = shlex.split(command.split("#")[0].split("|")[0].split("<")[0])
    module = words[words.index("-m") + 1] if "-m" in words else f"alro_fast.{words[1]}"
    flags = [word for word in words if word.startswith("--")]
    if module == "alro_fast.train":
        from alro_fast.training.config import parse

        given = words[words.index(module) + 1 :] if module in words else words[2:]
        parse([*given, "--use_cpu", "true"])  # refuses what such a run does not read
        known = set(flags)
    else:
        usage = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert usage.returncode == 0, usage.stderr
        known = set(re.findall(r"--\w+", usage.stdout))
    assert set(flags) <= known
    assert importlib.util.find_spec(module)


@pytest.mark.parametrize("page", [*PAGES, *MORE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    for link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in {slug(line) for line in target.read_text(encoding="utf-8").splitlines()}, link
    here = r"`((?:\.ci|\.github|alro_fast|bench|csrc|docs|kernels|scripts|tests)/[\w./*-]*)`"
    new = set(re.findall(r"^`([^`]+)`, new", text, flags=re.M))  # recipes write these
    for path in set(re.findall(here, text)) - new:
        assert list(ROOT.glob(path)), path


def slug(line: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\s-]", "", line.lstrip("# ").lower()).strip().replace(" ", "-") if line.startswith("#") else ""


def test_the_set_up_commands_are_two_lines():
    lines = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(lines) == 2
    assert all("pip install -e" in line for line in lines)


def test_the_movielens_script_runs_from_ratings_to_a_table(shared_data, tmp_path):
    """scripts/ml-latest-small.sh, which calls movielens.sh, cut to a few steps; README has the whole run's figures."""
    short = ["--max_steps", "4", "--max_train_lists", "60", "--max_eval_lists", "8", "--max_test_lists", "20"]
    script = ROOT / "scripts" / "ml-latest-small.sh"
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(script), str(shared_data / "ml-latest-small"), str(tmp_path), *short],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("random", "popularity", "mean rating", "biased MF", "LambdaMART", "hints", "untuned", "tuned"):
        assert row in done.stdout
    assert (tmp_path / "run" / "results.json").is_file()
