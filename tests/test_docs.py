"""What README.md and docs/ show: Python blocks run, but for those that need a trained run; links and paths point to
something; formulas say where they come from. The MovieLens script runs, cut short. Commands: test_pages.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import PAGES, ROOT, blocks, steps

MORE = [ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").rglob("*.md"))]


def python_of(page: Path) -> list[str]:
    return [block.text for block in blocks(page) if block.language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "docs"}
    for block in python_of(page):
        if "out/" not in block:  # those speak of a trained run's folder
            exec(compile(block, str(page), "exec"), names)


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
    commands = [words for block in blocks(page) for name, words in steps(block) if name == "train"]
    tuned = [words for words in commands if "--objective" in words]
    for words in tuned:
        assert parse([*words, "--use_cpu", "true"]).training.learning_rate == 2e-4
    assert tuned
    exec(compile(python_of(page)[0], str(page), "exec"), {"__name__": "docs"})
    shown = capsys.readouterr().out
    assert shown.count("disliked:\nClueless\nSpeed 2\nGigli\n") == 3
    assert "None." not in shown


@pytest.mark.parametrize("page", ["README.md", "docs/preferences.md"])
def test_the_demo_base_knows_the_words_of_the_preference_samples(page):
    """Else all answers are one unknown token after the other, and tuning has nothing to tell apart."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "alro_fast" / "demo_model")
    lines = re.findall(r'^{"prompt".*}$', (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
    assert len(lines) >= 2
    for row in map(json.loads, lines):
        answers = [row["chosen"], *row["rejected"]]
        tokens = [tokenizer.encode(text, add_special_tokens=False) for text in (row["prompt"], *answers)]
        assert not any(tokenizer.unk_token_id in each for each in tokens), row
        assert len(set(map(tuple, tokens[1:]))) == len(answers)
