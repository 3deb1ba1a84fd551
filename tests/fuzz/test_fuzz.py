"""A few hostile inputs of every kind; `make fuzz` runs for as long as it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_inputs import Failure, Kind, attempt
from readers import KINDS

CASES = {"run": 6, "chat": 3}  # slow ones: a model is loaded, a process is forked
FOUND = [  # what longer runs have found
    ("run", 90),  # an adapter whose configuration names a module for PEFT to import
    ("prepared", 5),  # tables that the manifest vouches for and Parquet's reader cannot read
    ("parquet", 13),  # a panic of that reader
    ("answer", 21),  # a complaint whose message is no text
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Kind -> its valid files, written once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            Kind(*KINDS[name]).make(made[name])
        return made[name]

    return of


@pytest.mark.parametrize("name", KINDS)
def test_hostile_input_is_read_or_refused(name, pristine, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Kind(*KINDS[name]).check(pristine(name))  # what nobody has touched is read
    for seed in range(CASES.get(name, 12)):
        attempt(name, seed, pristine(name), tmp_path / "work")


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_what_was_found_stays_mended(name, seed, pristine, tmp_path):
    attempt(name, seed, pristine(name), tmp_path / "work")


def test_another_exception_is_a_failure(pristine, tmp_path, monkeypatch):
    """The hand that looks: a reader that raises what no reader may, and one that takes too long."""
    monkeypatch.setitem(KINDS, "bad", (None, lambda folder: 1 / 0, ("r.csv",)))
    with pytest.raises(Failure, match=r"(?s)bad, seed 3, r\.csv:.*ZeroDivisionError"):
        attempt("bad", 3, pristine("csv"), tmp_path / "work")
    monkeypatch.setattr("fuzz_inputs.SECONDS", -1.0)
    with pytest.raises(Failure, match="GiB more at the peak"):
        attempt("csv", 3, pristine("csv"), tmp_path / "work")
