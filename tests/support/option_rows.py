"""Rows of tests that walk through every option of a command: read in a setting, or refused in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from alro_fast.cli import run


class Read(NamedTuple):
    option: str
    stage: str
    words: str


class Refused(NamedTuple):
    option: str
    stage: str
    words: str
    reader: str  # what the line says of who reads it


def options_of(module) -> set[str]:
    """Names of a command's options, without --help and what stands without a name."""
    return {action.dest for action in module.parser()._actions if action.option_strings} - {"help"}


def refusal(main: Callable, words: str, capsys) -> str:
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        run(main, words.split())
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def check_refusal(main: Callable, row: Refused, words: str, capsys) -> None:
    """Refused with the words, and with the words alone to blame."""
    said = refusal(main, words, capsys)
    assert f"--{row.option} is no option of " in said
    assert f"(it is read {row.reader}" in said


RANK_READ = [
    Read("adapter", "--adapter run", "--adapter ratings"),
    Read("base_model", "--adapter run", "--base_model base"),
    Read("trust_remote_code", "--adapter run", "--trust_remote_code"),
    Read("device", "--adapter run", "--device cpu"),
    Read("token_budget", "--adapter run", "--token_budget 0"),
    Read("share", "--adapter run", "--share none"),
    Read("share", "--adapter ratings", "--share list"),
    Read("share", "--adapter tasks", "--share none"),
    Read("method", "--adapter run", "--method greedy"),
    Read("method", "--adapter tasks", "--method pairwise"),
    Read("beams", "--adapter run --method beam", "--beams 1"),
    Read("hybrid", "--adapter tasks", "--hybrid figure"),
    Read("hybrid", "--adapter tasks", "--hybrid grade=1,win=4"),
    Read("pairing", "--adapter tasks", "--pairing all"),
    Read("pair_orders", "--adapter tasks", "--pair_orders one"),
    Read("pair_orders", "--adapter tasks --method pairwise --pairing all", "--pair_orders one"),
    Read("pairing", "--adapter tasks --method pairwise", "--pairing all"),
    Read("shuffles", "--adapter run", "--shuffles 2"),
    Read("shuffles", "--adapter ratings", "--shuffles 2"),
    Read("shuffles", "--adapter tasks --method listwise", "--shuffles 2"),
    Read("shuffles", "--adapter tasks --method pairwise", "--shuffles 2"),
    Read("merge", "--adapter run --shuffles 3", "--merge borda"),
    Read("merge", "--adapter run --shuffles 3", "--merge kemeny"),
    Read("seed", "--adapter run --shuffles 2", "--seed 1"),
    Read("seed", "--adapter tasks", "--seed 1"),
    Read("seed", "--adapter tasks --method pairwise", "--seed 1"),
    Read("fuse", "--adapter run", "--fuse"),
]

RANK_REFUSED = [
    Refused("method", "--adapter run --fuse", "--method first", "without --fuse"),
    Refused("hybrid", "--adapter tasks --fuse", "--hybrid code", "without --fuse"),
    Refused("pairing", "--adapter tasks --fuse", "--pairing all", "without --fuse"),
    Refused("pair_orders", "--adapter tasks --fuse", "--pair_orders one", "without --fuse"),
    Refused("base_model", "--adapter whole", "--base_model base", "with an adapter"),
    Refused("share", "--adapter run --method greedy", "--share list", "by methods that read all answers in one pass"),
    Refused("share", "--adapter run --method expected", "--share batch", "by methods that read all answers"),
    Refused("beams", "--adapter run", "--beams 8", "by method beam"),
    Refused("beams", "--adapter run", "--beams 4", "by method beam"),  # its default, given
    Refused("beams", "--adapter run --method greedy", "--beams=1", "by method beam"),
    Refused("beams", "--adapter tasks", "--beams 8", "by method beam"),
    Refused("hybrid", "--adapter run", "--hybrid figure", "by method hybrid"),
    Refused("hybrid", "--adapter ratings", "--hybrid code", "by method hybrid"),
    Refused("hybrid", "--adapter tasks --method listwise", "--hybrid figure", "by method hybrid"),
    Refused("pairing", "--adapter run", "--pairing all", "by methods pairwise and hybrid"),
    Refused("pairing", "--adapter tasks --method pointwise", "--pairing all", "by methods pairwise and hybrid"),
    Refused("pair_orders", "--adapter run", "--pair_orders one", "by methods pairwise and hybrid"),
    Refused("pair_orders", "--adapter tasks --method listwise", "--pair_orders both", "by methods pairwise and hybrid"),
    Refused("shuffles", "--adapter tasks --method pointwise", "--shuffles 3", "by every method but pointwise"),
    Refused("shuffles", "--adapter tasks --method pairwise --pairing all", "--shuffles 3", "by every method but"),
    Refused("merge", "--adapter run", "--merge borda", "with --shuffles 2 or more"),
    Refused("merge", "--adapter run --shuffles 1", "--merge mean", "with --shuffles 2 or more"),
    Refused("seed", "--adapter run", "--seed 3", "with --shuffles 2 or more"),
    Refused("seed", "--adapter tasks --method listwise", "--seed 3", "with --shuffles 2 or more"),
    Refused("seed", "--adapter tasks --pairing all", "--seed 3", "with --shuffles 2 or more"),
]
