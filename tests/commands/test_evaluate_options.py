"""Every option of evaluate changes the run, or is refused.

A row for each option: words that set the stage, and words that give the option another value than its default. An
option of a command that has no row fails, and so does one with a `Reader` that no row sees refused.
"""

from __future__ import annotations

import json
import shutil

import pytest
from option_rows import RANK_READ, RANK_REFUSED, Read, Refused, check_refusal, options_of

from alro_fast import evaluate
from alro_fast.errors import AlroFastError
from alro_fast.evaluation import options as evaluation_options
from alro_fast.evaluation import zero_shot
from alro_fast.ranking.options import FUSE_READERS, MODEL_READERS, PASS_READERS, READERS

LISTS = "--lists data --bootstrap 9 --baselines none"
BASE = f"--model_name_or_path base {LISTS}"
EVALUATE_READ = [
    *(row._replace(stage=f"{row.stage} {LISTS}") for row in {row.option: row for row in RANK_READ}.values()),
    Read("lists", f"--adapter run {LISTS}", "--lists more"),
    Read("preferences", "--adapter run --preferences movies.json", "--preferences movies.json games.json"),
    Read("baselines", f"--adapter run {LISTS}", "--baselines cheap"),
    Read("model_name_or_path", BASE, "--model_name_or_path whole"),
    Read("template", BASE, "--template music"),
    Read("identifiers", BASE, "--identifiers items"),
    Read("answer", BASE, "--answer ratings"),
    Read("output_dir", BASE, "--output_dir elsewhere"),
    Read("shuffles", BASE, "--shuffles 2"),
    Read("split", f"--adapter run {LISTS}", "--split valid"),
    Read("split", "--adapter titles --lists data --bootstrap 9", "--split valid"),
    Read("limit", f"--adapter run {LISTS}", "--limit 2"),
    Read("limit", "--adapter run --preferences movies.json", "--limit 2"),
    Read("output_dir", f"--adapter run {LISTS}", "--output_dir elsewhere"),
    Read("output_dir", "--adapter run --preferences movies.json", "--output_dir elsewhere"),
    Read("bootstrap", f"--adapter run {LISTS}", "--bootstrap 0"),
    Read("bootstrap", "--adapter titles --lists data --bootstrap 9", "--bootstrap 0"),
    Read("bootstrap", "--adapter run --preferences movies.json", "--bootstrap 0"),
    Read("gain", f"--adapter run {LISTS}", "--gain linear"),
    Read("generate", f"--adapter run {LISTS}", "--generate"),
    Read("generate", f"--adapter tasks {LISTS}", "--generate"),
    Read(
        "hybrid",
        f"--adapter tasks --method pointwise --generate {LISTS}",
        "--hybrid figure",
    ),
    Read("token_budget", "--adapter titles --lists data --bootstrap 9", "--token_budget 100"),
    Read("share", "--adapter titles --lists data --bootstrap 9", "--share none"),
    Read("device", "--adapter titles --lists data --bootstrap 9", "--device cpu"),
    Read("base_model", "--adapter run --preferences movies.json", "--base_model base"),
    Read("trust_remote_code", "--adapter run --preferences movies.json", "--trust_remote_code"),
]
GIVEN = {
    "method": "--method first", "shuffles": "--shuffles 1", "merge": "--merge mean", "beams": "--beams 4",
    "seed": "--seed 0", "hybrid": "--hybrid code", "pairing": "--pairing matching", "gain": "--gain exp2",
    "pair_orders": "--pair_orders both", "baselines": "--baselines cheap",
    "generate": "--generate", "fuse": "--fuse",
}  # fmt: skip
EVALUATE_REFUSED = [
    *(row._replace(stage=f"{row.stage} {LISTS}") for row in RANK_REFUSED),
    *(
        Refused(option, stage, words, "where rankings are measured")
        for stage in ("--adapter run --preferences movies.json", "--adapter titles --lists data")
        for option, words in GIVEN.items()
    ),
    Refused("split", "--adapter run --preferences movies.json", "--split test", "with --lists"),
    *(
        Refused(option, f"--adapter run {LISTS}", f"--{option} {value}", "with --model_name_or_path")
        for option, value in zero_shot.OPTIONS.items()
    ),
    Refused("base_model", BASE, "--base_model whole", "with --adapter"),
    Refused("preferences", "--model_name_or_path base", "--preferences movies.json", "with --adapter"),
    Refused("fuse", BASE, "--fuse", "with --adapter"),
    Refused("beams", BASE, "--beams 3", "by method beam"),
    Refused("generate", f"{BASE} --answer ratings", "--generate", "for models that answer with an order"),
    Refused("generate", "--adapter ratings --lists data", "--generate", "for models that answer with an order"),
    Refused("gain", "--adapter run --lists hinted", "--gain linear", "for graded lists"),
    Refused("pairing", "--adapter run --lists data --generate", "--pairing all", "by methods pairwise and hybrid"),
]


def written(folder) -> dict:
    """What evaluations wrote, but for times; removed."""
    files = {}
    for place in (*folder.glob("*/evaluation"), folder / "out" / "zero-shot", folder / "elsewhere"):
        for path in place.glob("*.json*"):
            files[str(path)] = [timeless(json.loads(line)) for line in joined(path)]
        shutil.rmtree(place, ignore_errors=True)
    return files


def test_every_option_of_evaluate_is_read(folder, loads, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    known = {}

    def outcome(words):
        if words in known:
            return known[words]
        loads.clear()
        try:
            evaluate.main(words.split())
        except AlroFastError as error:
            return str(error)
        files = written(folder)
        assert files
        capsys.readouterr()
        known[words] = loads.copy(), files
        return known[words]

    first = outcome(EVALUATE_READ[0].stage)
    known.clear()
    assert outcome(EVALUATE_READ[0].stage) == first  # else the rows would prove nothing
    assert {row.option for row in EVALUATE_READ} == options_of(evaluate)
    for row in EVALUATE_READ:
        assert outcome(row.stage) != outcome(f"{row.stage} {row.words}"), row


def joined(path) -> list[str]:
    """JSON texts of a file: its lines, or the whole."""
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def timeless(document):
    """Without what differs between two equal runs."""
    if isinstance(document, dict):
        return {k: timeless(v) for k, v in document.items() if k not in ("lists_per_second", "peak_memory_gib")}
    return document


@pytest.mark.parametrize("row", EVALUATE_REFUSED, ids=str)
def test_what_evaluate_does_not_read_is_refused_before_weights_are(folder, loads, monkeypatch, capsys, row):
    monkeypatch.chdir(folder)
    check_refusal(evaluate.main, row, f"{row.stage} {row.words}", capsys)
    assert loads == []


def test_every_evaluate_reader_has_refused():
    readers = (
        READERS
        | MODEL_READERS
        | FUSE_READERS
        | PASS_READERS
        | evaluation_options.LISTS_READ
        | evaluation_options.ANSWERS_READ
        | zero_shot.READERS
    )
    assert {row.option for row in EVALUATE_REFUSED} == readers.keys() | {"gain"}
