"""A few hostile inputs of every kind; `make fuzz` runs for as long as it is told."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import polars as pl
import pytest
from fuzz_inputs import Failure, Kind, attempt
from readers import KINDS

from alro_fast.data.sources.files import polars_errors
from alro_fast.errors import AlroFastError
from alro_fast.ranking.ranker import Ranker

CASES = {"run": 6, "chat": 3}  # slow ones: a model is loaded, a process is forked
FOUND = [  # what longer runs have found
    ("run", 1032),  # a tokenizer whose longest text is a list
    ("run", 90),  # an adapter whose configuration names a module for PEFT to import
    ("prepared", 5),  # tables that a manifest vouches for and no reader of Parquet can read
    ("prepared", 143),
    ("answer", 63),  # a complaint whose message is no text
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


def test_a_panic_of_the_reader_of_parquet_is_one_line(tmp_path):
    """As a damaged row group gives it, now and then: it is no Exception."""
    with (
        pytest.raises(AlroFastError, match=r"r\.parquet cannot be read \(range end index"),
        polars_errors(tmp_path / "r.parquet"),
    ):
        raise pl.exceptions.PanicException("range end index 4815 out of range for slice of length 1845")


def test_an_adapter_has_no_module_imported(pristine, tmp_path):
    shutil.copytree(pristine("run"), tmp_path / "work")
    file = tmp_path / "work" / "run" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"megatron_config": {}, "megatron_core": "antigravity"}))
    with pytest.raises(AlroFastError, match="has a megatron_config, for which PEFT imports the module antigravity"):
        Ranker.load(file.parent, base_model=str(tmp_path / "work" / "base"))
    assert "antigravity" not in sys.modules


def test_another_exception_is_a_failure(pristine, tmp_path, monkeypatch):
    """The hand that looks: a reader that raises what no reader may, and one that takes too long."""
    monkeypatch.setitem(KINDS, "bad", (None, lambda folder: 1 / 0, ("r.csv",)))
    with pytest.raises(Failure, match=r"(?s)bad, seed 3, r\.csv:.*ZeroDivisionError"):
        attempt("bad", 3, pristine("csv"), tmp_path / "work")
    monkeypatch.setattr("fuzz_inputs.SECONDS", -1.0)
    with pytest.raises(Failure, match="GiB more at the peak"):
        attempt("csv", 3, pristine("csv"), tmp_path / "work")
