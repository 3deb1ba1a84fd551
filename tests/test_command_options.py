"""Every option of every command changes what the command does, or is refused in one line that names who reads it.

A row for each option: words that set the stage, and words that give the option another value than its default. An
option of a command that has no row fails, and so does one with a `Reader` that no row sees refused. Models are loaded
once for all rows: what is compared is what they were asked to load, and what the command printed and wrote.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
from tiny import byte_tokenizer, catalogue, make_run, random_lists, tiny_llama

from alro_fast import client, evaluate, first_stage, prepare, rank, report
from alro_fast.cli import run
from alro_fast.data import prepared
from alro_fast.data.first_stage.retrieval import DEFAULTS
from alro_fast.data.lists import TARGET_SCHEMA, write_prepared
from alro_fast.errors import AlroFastError
from alro_fast.evaluation import options as evaluation_options
from alro_fast.evaluation import preferences, rankings, zero_shot
from alro_fast.modeling import loading
from alro_fast.prompts.recranker import RecRankerPrompts
from alro_fast.ranking.generation import Generated
from alro_fast.ranking.options import MODEL_READERS, READERS, TASK_METHODS
from alro_fast.ranking.orders import Ranking
from alro_fast.ranking.ranker import Ranker

COMMANDS = (client, evaluate, first_stage, prepare, rank, report)


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


# ---- models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that answer in every form, lists, preferences: what `rank` and `evaluate` are pointed at."""
    folder = tmp_path_factory.mktemp("options")
    make_run(folder)
    tokenizer = byte_tokenizer()
    for name, options in (
        ("ratings", "answer: ratings"),
        ("tasks", "objective: recranker"),
        ("titles", "objective: dmpo\npreference_answer: titles\nnum_negatives: 2"),
    ):
        shutil.copytree(folder / "run", folder / name)
        (folder / name / "config.yaml").write_text(options)
    RecRankerPrompts(tokenizer, "movies").save(folder / "tasks")
    shutil.copytree(folder / "run", folder / "whole", ignore=shutil.ignore_patterns("adapter*"))
    tiny_llama(len(tokenizer), seed=7).save_pretrained(folder / "whole")
    titles = ("Casino", "Clueless", "Babe", "Alien", "Brazil")
    documents = [
        {"history": [{"title": past, "rating": 4.5}], "candidates": [{"title": title} for title in titles]}
        for past in ("Heat", "Ran", "Fargo")
    ]
    (folder / "lists.json").write_text(json.dumps(documents))
    lists = random_lists(9, 5, seed=3, history=3, items=60)
    write_prepared(folder / "data", catalogue(60), {"train": lists[:3], "valid": lists[3:6], "test": lists[6:]})
    write_prepared(folder / "more", catalogue(60), {"test": lists[:4]})
    targets = {"split": ["test"] * 2, "user_id": ["u0", "u1"], "item": [0, 1], "place": [1, 2]}
    hinted = pl.DataFrame(targets, schema=TARGET_SCHEMA)
    write_prepared(folder / "hinted", catalogue(60), {"test": lists[:2]}, {}, hinted)
    for name, good in (("movies", "North"), ("games", "Glass")):
        rows = [{"prompt": f"User {u}:", "chosen": f" {good} {u}", "rejected": [f" Echo {u}"]} for u in range(4)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def models():
    """Folder -> what was loaded from it, for the whole module."""
    return {}


@pytest.fixture
def loads(monkeypatch, models):
    """What the command asked to load; every model is loaded once, whatever is asked."""
    asked = []
    really = {"ranker": Ranker.load, "model": loading.load_for_inference}

    def load(kind, adapter, **options):
        before = asked.copy()
        if (kind, adapter) not in models:
            models[kind, adapter] = really[kind](adapter, device="cpu")
        asked[:] = [*before, (kind, adapter, options)]  # and not what loading a ranker loads
        return models[kind, adapter]

    monkeypatch.setattr(Ranker, "load", lambda adapter, **options: load("ranker", adapter, **options))
    monkeypatch.setattr(loading, "load_for_inference", lambda adapter, **options: load("model", adapter, **options))

    def generate(ranker, lists, **options):
        asked.append(("generate", ranker.answer, options))
        return Generated([list(range(len(one.candidates))) for one in lists], [True] * len(lists), [""] * len(lists))

    score = preferences.score_preferences
    scoring = lambda *words: asked.append(("tokens", words[3])) or score(*words)  # noqa: E731
    monkeypatch.setattr(preferences, "score_preferences", scoring)
    monkeypatch.setattr(rankings, "generate_tasks", generate)
    monkeypatch.setattr(rankings, "generate_and_parse", generate)
    monkeypatch.setattr(rankings, "report_line", lambda *_: "")
    return asked


RANK_READ = [
    Read("adapter", "--adapter run", "--adapter ratings"),
    Read("base_model", "--adapter run", "--base_model base"),
    Read("trust_remote_code", "--adapter run", "--trust_remote_code"),
    Read("device", "--adapter run", "--device cpu"),
    Read("token_budget", "--adapter run", "--token_budget 0"),
    Read("method", "--adapter run", "--method greedy"),
    Read("method", "--adapter tasks", "--method pairwise"),
    Read("beams", "--adapter run --method beam", "--beams 1"),
    Read("hybrid", "--adapter tasks", "--hybrid paper"),
    Read("pairing", "--adapter tasks", "--pairing all"),
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
]
RANK_REFUSED = [
    Refused("base_model", "--adapter whole", "--base_model base", "with an adapter"),
    Refused("beams", "--adapter run", "--beams 8", "by method beam"),
    Refused("beams", "--adapter run", "--beams 4", "by method beam"),  # its default, given
    Refused("beams", "--adapter run --method greedy", "--beams=1", "by method beam"),
    Refused("beams", "--adapter tasks", "--beams 8", "by method beam"),
    Refused("hybrid", "--adapter run", "--hybrid paper", "by method hybrid"),
    Refused("hybrid", "--adapter ratings", "--hybrid code", "by method hybrid"),
    Refused("hybrid", "--adapter tasks --method listwise", "--hybrid paper", "by method hybrid"),
    Refused("pairing", "--adapter run", "--pairing all", "by methods pairwise and hybrid"),
    Refused("pairing", "--adapter tasks --method pointwise", "--pairing all", "by methods pairwise and hybrid"),
    Refused("shuffles", "--adapter tasks --method pointwise", "--shuffles 3", "by every method but pointwise"),
    Refused("shuffles", "--adapter tasks --method pairwise --pairing all", "--shuffles 3", "by every method but"),
    Refused("merge", "--adapter run", "--merge borda", "with --shuffles 2 or more"),
    Refused("merge", "--adapter run --shuffles 1", "--merge mean", "with --shuffles 2 or more"),
    Refused("seed", "--adapter run", "--seed 3", "with --shuffles 2 or more"),
    Refused("seed", "--adapter tasks --method listwise", "--seed 3", "with --shuffles 2 or more"),
    Refused("seed", "--adapter tasks --pairing all", "--seed 3", "with --shuffles 2 or more"),
]


def test_every_option_of_rank_is_read(folder, loads, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def outcome(words):
        loads.clear()
        rank.main([*words.split(), "lists.json"])
        return loads.copy(), capsys.readouterr().out

    assert outcome("--adapter run") == outcome("--adapter run")  # else the rows would prove nothing
    rows = [*RANK_READ, Read("top_k", "--adapter run", "--top_k 2")]
    assert {row.option for row in rows} == options_of(rank)
    for row in rows:
        assert outcome(row.stage) != outcome(f"{row.stage} {row.words}"), row


@pytest.mark.parametrize("row", RANK_REFUSED, ids=str)
def test_what_rank_does_not_read_is_refused_before_weights_are(folder, loads, monkeypatch, capsys, row):
    monkeypatch.chdir(folder)
    check_refusal(rank.main, row, f"{row.stage} {row.words} lists.json", capsys)
    assert loads == []


def test_methods_that_the_model_does_not_answer_cost_no_loading(folder, loads, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for words, said in (
        ("--adapter run --method hybrid", "asks otherwise than this model was tuned to answer"),
        ("--adapter tasks --method first", f"; use {', '.join(TASK_METHODS)}"),
        ("--adapter ratings --method greedy", "this model answers with grades: use 'expected'"),
        ("--adapter ratings --method pointwise", "use expected"),
    ):
        for main, rest in ((rank.main, "lists.json"), (evaluate.main, "--lists data")):
            assert said in refusal(main, f"{words} {rest}", capsys)
    said = refusal(rank.main, "--adapter titles lists.json", capsys)
    assert "was tuned on answers that are titles" in said
    assert loads == []


def test_every_rank_reader_has_refused():
    assert {row.option for row in RANK_REFUSED} == READERS.keys() | MODEL_READERS.keys()


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
        "--hybrid paper",
    ),
    Read("token_budget", "--adapter titles --lists data --bootstrap 9", "--token_budget 100"),
    Read("device", "--adapter titles --lists data --bootstrap 9", "--device cpu"),
    Read("base_model", "--adapter run --preferences movies.json", "--base_model base"),
    Read("trust_remote_code", "--adapter run --preferences movies.json", "--trust_remote_code"),
]
GIVEN = {
    "method": "--method first", "shuffles": "--shuffles 1", "merge": "--merge mean", "beams": "--beams 4",
    "seed": "--seed 0", "hybrid": "--hybrid code", "pairing": "--pairing matching", "gain": "--gain exp2",
    "baselines": "--baselines cheap",
    "generate": "--generate",
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
        READERS | MODEL_READERS | evaluation_options.LISTS_READ | evaluation_options.ANSWERS_READ | zero_shot.READERS
    )
    assert {row.option for row in EVALUATE_REFUSED} == readers.keys() | {"gain"}


# ---- a served model


CLIENT_READ = [
    Read("adapter", "", "--adapter other"),
    Read("model", "", "--model other"),
    Read("url", "", "--url http://other"),
    Read("api_key", "", "--api_key k"),
    Read("parallel", "", "--parallel 2"),
    Read("top_k", "", "--top_k 2"),
    Read("shuffles", "", "--shuffles 2"),
    Read("merge", "--shuffles 2", "--merge borda"),
    Read("seed", "--shuffles 2", "--seed 1"),
]
CLIENT_REFUSED = [
    Refused("merge", "", "--merge borda", "with --shuffles 2 or more"),
    Refused("seed", "--shuffles 1", "--seed 1", "with --shuffles 2 or more"),
]


@pytest.fixture
def served(monkeypatch):
    """What the client asked of a server that puts candidates in the order they come in."""
    asked = []

    def stream(lists, **options):
        asked.append(options)
        for one in lists:
            m = len(one.candidates)
            yield Ranking(one.list_id, tuple(range(m)), -np.arange(m), np.arange(m)[None], -np.arange(m)[None])

    def load(*names, **options):
        asked.append((names, options))
        return SimpleNamespace(stream=stream, prompts=SimpleNamespace(identifiers="letters"))

    monkeypatch.setattr(client.RankingClient, "load", load)
    return asked


def test_every_option_of_client_is_read(folder, served, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def outcome(words):
        served.clear()
        client.main(f"--adapter run --model tuned {words} lists.json".split())
        return served.copy(), capsys.readouterr().out

    assert {row.option for row in CLIENT_READ} == options_of(client)
    for row in CLIENT_READ:
        assert outcome(row.stage) != outcome(f"{row.stage} {row.words}"), row


@pytest.mark.parametrize("row", CLIENT_REFUSED, ids=str)
def test_what_client_does_not_read_is_refused(folder, served, monkeypatch, capsys, row):
    monkeypatch.chdir(folder)
    check_refusal(client.main, row, f"--adapter run --model tuned {row.stage} {row.words} lists.json", capsys)
    assert served == []


# ---- ratings to lists


CSV, ML = "--dataset csv --ratings_file r.csv", "--dataset ml-latest-small --raw_dir ml --allow_altered"
FILES_READ = [
    Read("dataset", "--dataset csv --ratings_file r.csv", "--dataset parquet"),
    Read("ratings_file", CSV, "--ratings_file doubled.csv"),
    Read("ratings_file", ML, "--ratings_file ml/other.csv"),
    Read("items_file", CSV, "--items_file items.csv"),
    Read("items_file", ML, "--items_file items.csv"),
    Read("raw_dir", ML, "--raw_dir other"),
    Read("raw_dir", "--dataset amazon-2023", "--raw_dir other"),
    Read("accept_licence", "--dataset ml-100k", "--accept_licence"),
    Read("allow_altered", "--dataset ml-latest-small --raw_dir ml", "--allow_altered"),
    Read("separator", CSV, "--separator ;"),
    Read("user_column", CSV, "--user_column other_user"),
    Read("user_column", ML, "--user_column other_user"),
    Read("item_column", CSV, "--item_column other_item"),
    Read("rating_column", CSV, "--rating_column other_rating"),
    Read("time_column", CSV, "--time_column none"),
    Read("title_column", CSV, "--title_column name"),
    Read("title_column", ML, "--title_column name"),
    Read("category_column", f"{CSV} --title_column name", "--category_column kind"),
    Read("duplicates", "--dataset csv --ratings_file doubled.csv", "--duplicates drop"),
    Read("untitled", f"{CSV} --items_file items.csv", "--untitled drop"),
]
PREPARE_READ = [
    *FILES_READ,
    Read("output_dir", CSV, "--output_dir elsewhere"),
    Read("overwrite_output_dir", f"{CSV} --output_dir full", "--overwrite_output_dir"),
    Read("history_length", CSV, "--history_length 3"),
    Read("list_size", CSV, "--list_size 4"),
    Read("min_history", CSV, "--min_history 12"),
    Read("train_stride", CSV, "--train_stride 2"),
    Read("max_train_lists_per_user", f"{CSV} --list_size 3", "--max_train_lists_per_user 1"),
    Read("negatives", CSV, "--negatives 2"),
    Read("negatives_by", f"{CSV} --negatives 2", "--negatives_by popularity"),
    Read("test_lists", CSV, "--test_lists 2"),
    Read("signals", CSV, "--signals average"),
    Read("signal_folds", f"{CSV} --signals average", "--signal_folds 2"),
    Read("seed", CSV, "--seed 1"),
]
FILES_REFUSED = [
    Refused("raw_dir", CSV, "--raw_dir ml", "for MovieLens and Amazon data"),
    Refused("raw_dir", "--dataset parquet --ratings_file r.parquet", "--raw_dir ml", "for MovieLens and Amazon data"),
    Refused("raw_dir", "--dataset ml-1m --ratings_file r --items_file i", "--raw_dir ml", "for MovieLens and Amazon"),
    Refused("accept_licence", CSV, "--accept_licence", "where MovieLens is fetched"),
    Refused("accept_licence", "--dataset ml-1m --raw_dir ml", "--accept_licence", "where MovieLens is fetched"),
    Refused("allow_altered", CSV, "--allow_altered", "for MovieLens data"),
    Refused("allow_altered", "--dataset amazon-2018 --raw_dir a", "--allow_altered", "for MovieLens data"),
    Refused("separator", "--dataset ml-25m --raw_dir ml", "--separator ;", "for csv"),
    Refused("separator", "--dataset parquet --ratings_file r.parquet", "--separator ;", "for csv"),
    *(
        Refused(f"{name}_column", f"--dataset {data} --raw_dir ml", f"--{name}_column x", "for csv, parquet")
        for name, datasets in (
            *((name, ("ml-100k", "ml-1m")) for name in ("user", "item", "rating", "time")),
            *((name, ("ml-100k", "ml-1m", "amazon-2014", "amazon-2023")) for name in ("title", "category")),
        )
        for data in datasets
    ),
]
PREPARE_REFUSED = [
    *FILES_REFUSED,
    Refused("negatives_by", CSV, "--negatives_by popularity", "with --negatives 1 or more"),
    Refused("signal_folds", CSV, "--signal_folds 5", "with --signals"),
    Refused("negatives_by", f"{CSV} --negatives 0", "--negatives_by uniform", "with --negatives 1 or more"),
]


@pytest.fixture
def ratings(tmp_path, monkeypatch):
    """A folder of ratings with two columns for everything, and MovieLens files of the same; the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = [(u, i) for u in range(3) for i in range(40)]
    lines = [
        f"{u},{i + 15 * u},{i % 5 + 1},{1000 + i // 2},{i % 3},{u * 40 + i},{5 - i % 5},Film {i + 15 * u},Kind"
        for u, i in rows
    ]
    rest = "other_user,other_item,other_rating,name,kind"
    table = "\n".join([f"user_id,item_id,rating,timestamp,{rest}", *lines])
    (tmp_path / "r.csv").write_text(table)
    (tmp_path / "doubled.csv").write_text("\n".join([table, lines[0]]))
    (tmp_path / "items.csv").write_text(
        "\n".join(["item_id,movieId,title,genres", *(f"{i},{i},Named {i},Drama" for i in range(80))])
    )
    for name, shift in (("ml", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        films = (f"{i},Title {i + shift},Name {i},Drama" for i in range(60))
        (tmp_path / name / "movies.csv").write_text("\n".join(["movieId,title,name,genres", *films]))
        (tmp_path / name / "ratings.csv").write_text("\n".join([f"userId,movieId,rating,timestamp,{rest}", *lines]))
    fewer = "\n".join([f"userId,movieId,rating,timestamp,{rest}", *lines[1:]])
    (tmp_path / "ml" / "other.csv").write_text(fewer)

    def download(dataset, folder, *, accept_licence):
        raise AlroFastError(f"{dataset} would be fetched: {accept_licence}")

    monkeypatch.setattr(prepared, "download", download)
    return tmp_path


def without_record(path) -> bytes:
    """What a file holds; of a manifest not the options, which are recorded whatever they do."""
    if path.name != "manifest.json":
        return path.read_bytes()
    manifest = json.loads(path.read_text())
    return json.dumps(manifest | {"options": None, "seed": None}).encode()


def test_every_option_of_prepare_is_read(ratings, capsys):
    prepare.main(f"{CSV} --output_dir full --list_size 5".split())
    known = {}

    def outcome(words):
        if words in known:
            return known[words]
        out = () if "--output_dir" in words else ("--output_dir", "out")
        try:
            prepare.main([*words.split(), *out])
            places = (path for name in ("out", "elsewhere", "full") for path in ratings.glob(f"{name}/*"))
            found = "", {str(path): without_record(path) for path in places}
        except AlroFastError as error:
            found = str(error), {}
        capsys.readouterr()
        for name in ("out", "elsewhere"):
            shutil.rmtree(ratings / name, ignore_errors=True)
        known[words] = found
        return found

    assert {row.option for row in PREPARE_READ} == options_of(prepare)
    for row in PREPARE_READ:
        assert outcome(row.stage) != outcome(f"{row.stage} {row.words}"), row


@pytest.mark.parametrize("row", PREPARE_REFUSED, ids=str)
def test_what_prepare_does_not_read_is_refused_before_any_work(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refusal(prepare.main, row, f"{row.stage} {row.words} --output_dir out", capsys)
    assert not list(tmp_path.iterdir())


def test_every_prepare_reader_has_refused():
    assert {row.option for row in PREPARE_REFUSED} == prepared.READERS.keys() | prepare.READERS.keys()


HINTS_READ = [
    Read("output_dir", CSV, "--output_dir elsewhere"),
    Read("overwrite_output_dir", CSV, "--overwrite_output_dir"),
    *(
        Read(name, CSV, f"--{name} 3")
        for name in ("num_candidates", "num_samples", "like", "dislike", "history_length", "folds", "seed")
    ),
    Read("min_likes", CSV, "--min_likes 2"),
    Read("choice_lists_only", CSV, "--choice_lists_only"),
    Read("retriever", CSV, "--retriever bpr"),
    *(
        Read(option, f"{CSV} --retriever {name}", f"--{option} 3")
        for name, known in DEFAULTS.items()
        for option in known
    ),
]


def test_every_option_of_first_stage_is_read(monkeypatch):
    """What the files are read with is `prepare`'s; what is fitted and drawn is data/first_stage's."""

    def started(files, options):
        raise AlroFastError(repr((files, options)))

    monkeypatch.setattr(first_stage, "prepare_hinted", started)

    def outcome(words):
        out = "" if "--output_dir" in words else "--output_dir out"
        with pytest.raises(AlroFastError) as raised:
            first_stage.main(f"{words} {out}".split())
        assert str(raised.value).startswith("(FileOptions"), words
        return str(raised.value)

    rows = [*FILES_READ, *HINTS_READ]
    assert {row.option for row in rows} == options_of(first_stage)
    for row in rows:
        assert outcome(row.stage) != outcome(f"{row.stage} {row.words}"), row


FOREIGN = [
    Refused(option, f"{CSV} --retriever {name}", f"--{option} 3", "by ")
    for name in DEFAULTS
    for option in {option for known in DEFAULTS.values() for option in known} - DEFAULTS[name].keys()
]


@pytest.mark.parametrize("row", [*FILES_REFUSED, *FOREIGN], ids=str)
def test_what_first_stage_does_not_read_is_refused_before_any_work(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refusal(first_stage.main, row, f"{row.stage} {row.words} --output_dir out", capsys)
    assert not list(tmp_path.iterdir())


# ---- reports, and help


def test_every_option_of_report_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "write_report", lambda *folders: folders)
    (tmp_path / "config.yaml").touch()
    assert options_of(report) == {"run"}
    for words, said in (([], "('x', None)"), (["--run", str(tmp_path)], f"('x', {str(tmp_path)!r})")):
        report.main(["x", *words])
        assert capsys.readouterr().out.strip() == said
    assert "--run nowhere holds no trainer_state.json or config.yaml" in refusal(report.main, "x --run nowhere", capsys)


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_help_is_short_and_tells_defaults(module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = module.parser()
    assert parser.format_help().count("\n") <= 60
    for group in parser.format_help().split("\n\n"):
        assert group.count("\n") <= 24
    for action in parser._actions:
        if action.option_strings and action.default not in (None, False, "==SUPPRESS=="):
            told = parser._get_formatter()._get_help_string(action)
            assert "default" in told, action.dest


def test_help_does_not_wait_for_torch():
    names = ("rank", "client", "prepare")
    words = "; ".join(f"import alro_fast.{name} as c; c.parser().format_help()" for name in names)
    done = subprocess.run([sys.executable, "-c", f"import sys; {words}; sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0
