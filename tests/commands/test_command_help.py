"""Options of report, and the help of every command."""

from __future__ import annotations

import subprocess
import sys

import pytest
from option_rows import options_of, refusal

from alro_fast import cli, client, evaluate, first_stage, prepare, rank, report, study
from alro_fast.cli import first_screen
from alro_fast.training.config import recipe_names
from alro_fast.training.help import help_text

COMMANDS = (client, evaluate, first_stage, prepare, rank, report)


def test_every_option_of_report_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "write_report", lambda *folders: folders)
    (tmp_path / "config.yaml").touch()
    assert options_of(report) == {"run", "output_dir"}  # tests/evaluation/test_compare.py has the second
    for words, said in (([], "('x', None)"), (["--run", str(tmp_path)], f"('x', {str(tmp_path)!r})")):
        report.main(["x", *words])
        assert capsys.readouterr().out.strip() == said
    assert "--run nowhere holds no trainer_state.json or config.yaml" in refusal(report.main, "x --run nowhere", capsys)


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_help_is_short_and_tells_defaults(module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = module.parser()
    assert parser.format_help().count("\n") <= 62
    for group in parser.format_help().split("\n\n"):
        assert group.count("\n") <= 24
    for action in parser._actions:
        if action.option_strings and action.default not in (None, False, "==SUPPRESS=="):
            told = parser._get_formatter()._get_help_string(action)
            assert "default" in told, action.dest


@pytest.mark.parametrize("module", [*COMMANDS, study], ids=lambda module: module.__name__)
def test_help_fits_a_terminal_of_80_columns(module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert [line for line in module.parser().format_help().splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("group", [None, "all"])
def test_help_of_train_fits_it_too(group):
    lines = help_text(group, recipe_names()).splitlines()
    assert len(lines) > 20
    assert [line for line in lines if len(line) > 80] == []


def test_the_first_screen_names_every_command_in_80_columns():
    lines = first_screen().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(cli.COMMANDS)


def test_help_does_not_wait_for_torch():
    names = ("rank", "client", "prepare")
    words = "; ".join(f"import alro_fast.{name} as c; c.parser().format_help()" for name in names)
    done = subprocess.run([sys.executable, "-c", f"import sys; {words}; sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0
