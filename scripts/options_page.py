"""Write docs/using/options.md from the option dataclasses and the commands' parsers: python scripts/options_page.py."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

from alro_fast.cli import COMMANDS
from alro_fast.objectives.base import descriptions
from alro_fast.training import help as training_help

PAGE = Path(__file__).resolve().parents[1] / "docs" / "using" / "options.md"
HEAD = """# Options

Written by `python scripts/options_page.py` from the code; a test fails where it is not current. Defaults are in
brackets. `--help` says the same in a terminal. An option that a run does not read is refused, and the line says who
reads it.

## train

A flag of `python -m alro_fast.train` is a key of the YAML file that `--config` names; the command line wins.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, (title, entries) in training_help.groups().items():
        lines += [f"### {name}: {title}\n"]
        if name == "transformers":
            lines += [
                "Those of transformers.TrainingArguments that have a meaning here: `--help transformers` lists them.\n"
            ]
            continue
        reads = {}
        for one in descriptions().values():
            reads |= one.reads if name in (one.name, one.stands_for) else {}
        rows = []
        for entry in entries:
            where = entry.metadata.get("read") or reads.get(entry.name)
            default = training_help.default_of(entry)
            said = [entry.metadata["help"], f"Read {where.said}." if where else "", f"`{default}`" if default else ""]
            rows.append((f"`--{entry.name}`", f"`{training_help.values_of(entry)}`", " ".join(filter(None, said))))
        lines += [*table(("option", "values", "what"), rows), ""]
    for command in COMMANDS:
        if command != "train":
            parser = importlib.import_module(f"alro_fast.{command}").parser()
            lines += [f"## {command}\n", f"{COMMANDS[command].capitalize()}.\n"]
            lines += [*table(("option", "what"), options(parser)), ""]
    return "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Of a command: option or place, and what it is."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if "--help" not in action.option_strings and action.help != argparse.SUPPRESS:
            name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
            values = f": {', '.join(map(str, action.choices))}" if action.choices else ""
            yield f"`{name}`", " ".join((formatter._expand_help(action) if action.help else "").split()) + values


def table(head: tuple[str, ...], rows: object) -> list[str]:
    """Lines of Markdown."""
    body = [tuple(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
