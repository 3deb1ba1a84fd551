"""What docstrings and comments point at is there: sections of docs/*.md, files, and names of this package.

Three kinds of references are looked at, in the prose of Python and C++ sources:

    docs/methods.md 1.2    a numbered section; docs/first_stage.md, "Hints" a named one
    `ops.head.Head`        dotted, in backticks, from the name of a module or of a class of the package on
    `training/config.py`   a file, in backticks or from `alro_fast/` on
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

FOLDERS = ("alro_fast", "kernels", "csrc", "bench", "scripts", "tests")
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".cpp", ".h", ".sh"} and path != Path(__file__)
]
NUMBER = r"\d+(?:\.\d+)*"
DOCUMENT = re.compile(rf'\b(?:docs/)?([\w-]+)\.md((?:(?:,? | and |-){NUMBER}\b)*)(?:, "([^"]+)")?')
DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\([^`]*\))?`")
FILE = re.compile(r"`([\w./]+\.(?:py|h|cpp|sh))`|\b(alro_fast/[\w/]+\.py)\b")
WRITTEN = {"README", "report", "table"}  # files that runs, benchmarks and studies write


def prose(path: Path) -> str:
    """Comments, docstrings and messages: every string of more than one word."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return "\n".join(re.findall(r"(?://|#)(.*)", text))
    found = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
             if token.type == tokenize.COMMENT]  # fmt: skip
    found = ["\n".join(line.lstrip("# ") for line in found)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found.append(node.value)
    return "\n".join(found)


@cache
def modules() -> dict[str, Path]:
    """{dotted name: file} of the package; the kernels' sources lie beside it."""
    found = {}
    for path in [*(ROOT / "alro_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("alro_fast", *parts) if parts[0] == "kernels" else parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found | {"alro_fast._cpp": ROOT / "csrc" / "module.cpp"}


@cache
def members(path: Path) -> dict[str, ast.AST]:
    """What a module defines or imports at its top level, by name."""
    found: dict[str, ast.AST] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.suffix == ".py" else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name): node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    if path.name == "__init__.py":  # public names resolved when they are asked for
        found |= {name: ast.Pass() for name in re.findall(r'"(\w+)"', path.read_text(encoding="utf-8"))}
    return found


def in_class(node: ast.ClassDef, name: str) -> bool:
    """Whether a class has an attribute, as far as its own body tells; one with bases may have inherited it."""
    own = {getattr(each, "name", None) or getattr(each, "attr", None) for each in ast.walk(node)}
    own |= {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
    return name in own or bool(node.bases)


def resolves(dotted: str) -> bool:
    """Whether a dotted name leads to something of the package; True for names that begin with none of its modules."""
    first, *rest = dotted.split(".")
    starts = [name for name in modules() if name.rpartition(".")[2] == first]
    classes = [node for path in modules().values() for name, node in members(path).items()
               if name == first and isinstance(node, ast.ClassDef)]  # fmt: skip
    if not starts and not classes:
        return True
    return any(_within(start, rest) for start in starts) or any(in_class(node, rest[0]) for node in classes)


def _within(module: str, rest: list[str]) -> bool:
    while rest and f"{module}.{rest[0]}" in modules():
        module, rest = f"{module}.{rest[0]}", rest[1:]
    if not rest or modules()[module].suffix != ".py":
        return True
    node = members(modules()[module]).get(rest[0])
    return node is not None and (len(rest) == 1 or not isinstance(node, ast.ClassDef) or in_class(node, rest[1]))


@cache
def headings(document: str) -> list[str]:
    (page,) = (ROOT / "docs").rglob(f"{document}.md")
    text = page.read_text(encoding="utf-8")
    return [line.lstrip("# ") for line in re.findall(r"^#+ .*$", text, flags=re.M)]


def broken_documents(text: str) -> list[str]:
    broken = []
    for document, numbers, heading in DOCUMENT.findall(re.sub(r"\s+", " ", text)):
        if document in WRITTEN:
            continue
        if (ROOT / f"{document}.md").is_file():
            continue
        if not any((ROOT / "docs").rglob(f"{document}.md")):
            broken.append(f"docs/{document}.md")
            continue
        there = {re.match(rf"({NUMBER})\.? ", line)[1] for line in headings(document) if re.match(NUMBER, line)}
        broken += [f"docs/{document}.md {number}" for number in re.findall(NUMBER, numbers) if number not in there]
        if heading and heading not in headings(document):
            broken.append(f'docs/{document}.md, "{heading}"')
    return broken


def broken_names(text: str) -> list[str]:
    suffixes = (".py", ".h", ".cpp", ".sh", ".md", ".json", ".jsonl", ".yaml", ".csv", ".png", ".html")
    return [name for name in DOTTED.findall(text) if not name.endswith(suffixes) and not resolves(name)]


def broken_files(text: str) -> list[str]:
    every = [f"/{path.relative_to(ROOT)}" for path in SOURCES]
    names = {one or other for one, other in FILE.findall(text)}
    return [name for name in sorted(names) if not any(path.endswith(f"/{name}") for path in every)]


@pytest.mark.parametrize("find", [broken_documents, broken_names, broken_files])
def test_references_lead_somewhere(find):
    broken = [f"{path.relative_to(ROOT)}: {name}" for path in SOURCES for name in find(prose(path))]
    assert not broken, "\n".join(broken)


def test_the_checks_can_fail():
    assert broken_documents("as in docs/methods.md 1.2, 9.9 and methods.md 1.1-1.5") == ["docs/methods.md 9.9"]
    assert broken_documents('docs/nowhere.md; docs/first_stage.md, "Hints"; docs/first_stage.md, "Nothing"') == [
        "docs/nowhere.md",
        'docs/first_stage.md, "Nothing"',
    ]
    text = "`alro_fast.ops.nothing`, `eager.vocab_pass`, `backends.cpp_attention`, `Tree.sizes`, `torch.mm`"
    assert broken_names(text) == ["alro_fast.ops.nothing", "backends.cpp_attention", "Tree.sizes"]
    assert broken_files("`packing.py`, `hinted.py`, alro_fast/backends/eager.py") == [
        "alro_fast/backends/eager.py",
        "hinted.py",
    ]
