"""Pages of docs/ that say what the code says: written by a script, or quoting it."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib

import pytest
from places import ROOT

USING = ROOT / "docs" / "using"


def test_the_options_are_those_of_the_code():
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "scripts" / "options_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    current = (USING / "options.md").read_text(encoding="utf-8")
    assert current == script.page(), "write it again: python scripts/options_page.py"


def pieces(node: ast.AST) -> str:
    """A text of the source; what is put into it is "…"."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    found = []
    for path in (ROOT / "alro_fast").rglob("*.py"):
        found += [text for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if (text := pieces(node))]
    return found


def test_every_line_that_troubleshooting_quotes_is_in_the_code(texts):
    page = (USING / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.+?)` \|", page, flags=re.M)
    assert len(quoted) >= 25
    for line in quoted:
        wanted = re.compile(".*".join(re.escape(part) for part in line.split("…")), flags=re.S)
        assert any(wanted.search(text) for text in texts), line


def test_installing_says_what_pyproject_declares():
    page = (USING / "installing.md").read_text(encoding="utf-8")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in declared["dependencies"]:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        row = re.search(rf"^\| {name} \| (.+?) \|", page, flags=re.M)
        assert row is None or row[1].startswith(least), (name, row[1])
    assert f"Python | {declared['requires-python'].removeprefix('>=')} and later" in page
    assert re.search(r"^\| torch \| 2\.11 to 2\.13 \|", page, flags=re.M)
    assert "torch>=2.11,<2.14" in declared["dependencies"]


def test_the_comparison_names_a_version_of_each_and_claims_no_more_than_it_looked_for():
    page = (ROOT / "docs" / "project" / "comparison.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.+?\]\(https://github\.com/\S+\) \| (.+?) \|", page, flags=re.M)
    assert len(rows) == 5
    assert all(re.search(r"\b[0-9a-f]{7}\b.*\(20\d\d-\d\d-\d\d\)", row) for row in rows)
    table = page.partition("| | alro_fast |")[2].partition("\n\n")[0]
    for row in table.splitlines()[2:]:
        ours, *others = [cell.strip() for cell in row.strip("| ").split("|")][1:]
        assert ours
        assert "no" not in others, row
