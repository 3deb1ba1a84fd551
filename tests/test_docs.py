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


METHODS = ROOT / "docs" / "methods.md"
MARKS = {  # where a formula, constant or prompt may come from -> what must be named beside it
    "stated in the abstract": "",
    "described by a secondary source": r" \(.+?\)",
    "authors' released code": r" \(.*?`.+?`.*?\)",
    "our choice": "",
}


def sections(text: str) -> dict[str, str]:
    """The parts of methods.md that have a number, but for those that only hold others."""
    found = re.findall(r"^##+ ([\d.]+ .*?)\n(.*?)(?=^##|\Z)", text, flags=re.M | re.S)
    return {title: body for title, body in found if re.match(r"\d+\.\d", title) or "*our choice*" in body}


def test_every_formula_says_where_it_comes_from():
    """Each section, and within it each formula, is followed by one of four marks before the next; none has another."""
    text = METHODS.read_text(encoding="utf-8")
    assert len(sections(text)) >= 18
    assert all(re.search(rf"^### {number}\.", text, flags=re.M) for number in (1, 2, 3))
    assert all(f"\n- *{mark}*" in text.partition("\n## ")[0] for mark in MARKS)  # the legend names all four
    for title, body in sections(text).items():
        marks = re.findall(r"^- \*(.+?)\*((?:.|\n)*?)(?=^- \*|\n\n|\Z)", body, flags=re.M)
        assert marks, title
        for mark, said in marks:
            assert mark in MARKS, (title, mark)
            assert re.match(MARKS[mark] + r"(: |\b|,| )", said.replace("\n", " ")), (title, mark, said)
            assert ":" in said, (title, mark)
        for formula in re.finditer(r"(?:^    \S.*\n)+", body, flags=re.M):
            after = re.split(r"^    \S", body[formula.end() :], maxsplit=1, flags=re.M)[0]
            assert re.search(r"^- \*", after, flags=re.M), (title, formula[0])
    assert "**Choice" not in text


def test_the_definitions_cite_sections_that_exist():
    """Every public function of the reference, by a number; templates and recipes of the methods, by this page."""
    import inspect

    from alro_fast.losses import reference

    numbers = {title.split()[0] for title in sections(METHODS.read_text(encoding="utf-8"))}
    for name, function in inspect.getmembers(reference, inspect.isfunction):
        if function.__module__ == reference.__name__ and (not name.startswith("_") or name == "_permutation"):
            cited = re.findall(r"\b\d\.\d\b", inspect.getdoc(function).partition(":")[0])
            assert cited, name
            assert set(cited) <= numbers, name
    package = ROOT / "alro_fast"
    files = [*package.glob("templates/**/*.yaml"), *package.glob("recipes/dmpo*.yaml"), package / "ranking/hybrid.py"]
    for file in [*files, package / "data/first_stage/sampling.py"]:
        cited = re.findall(r"docs/methods.md (\d\.\d)", file.read_text(encoding="utf-8"))
        assert cited, file
        assert set(cited) <= numbers, file


def test_the_page_of_recranker_tunes_an_llm_at_its_own_rate_and_shows_what_is_disliked(capsys):
    """The recipe's learning rate is for random weights; and the example has disliked items to show."""
    from alro_fast.training.config import parse

    page = ROOT / "docs" / "recranker.md"
    tuned = [
        line for line in commands() if "--objective recranker" in line and line in page.read_text(encoding="utf-8")
    ]
    for line in tuned:
        training = parse([*shlex.split(line)[3:], "--use_cpu", "true"]).training
        assert training.learning_rate == 2e-4
    assert tuned
    exec(compile(blocks(page, "python")[0], str(page), "exec"), {"__name__": "docs"})
    shown = capsys.readouterr().out
    assert shown.count("disliked:\nClueless\nSpeed 2\nGigli\n") == 3
    assert "None." not in shown
