"""Every option of prepare and first_stage changes the run, or is refused.

A row for each option: words that set the stage, and words that give the option another value than its default. An
option of a command that has no row fails, and so does one with a `Reader` that no row sees refused.
"""

from __future__ import annotations

import json
import shutil

import pytest
from option_rows import Read, Refused, check_refusal, options_of

from alro_fast import first_stage, prepare
from alro_fast.data import prepared
from alro_fast.data.first_stage.retrieval import DEFAULTS
from alro_fast.errors import AlroFastError

CSV, ML = "--dataset csv --ratings_file r.csv", "--dataset ml-latest-small --raw_dir ml --allow_altered"
BOOKS = "--dataset book-crossing --raw_dir books"
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
    Read("title_column", BOOKS, "--title_column Book-Author"),
    Read("rating_column", BOOKS, "--rating_column Other"),
    Read("category_column", f"{CSV} --title_column name", "--category_column kind"),
    Read("duplicates", "--dataset csv --ratings_file doubled.csv", "--duplicates drop"),
    Read("untitled", f"{CSV} --items_file items.csv", "--untitled drop"),
    Read("k_core", CSV, "--k_core 2"),
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
    Read("ungraded", f"{CSV} --negatives 2", "--ungraded as_zero"),
    Read("test_lists", CSV, "--test_lists 2"),
    Read("partitions", CSV, "--partitions 2"),
    Read("signals", CSV, "--signals average"),
    Read("signal_folds", f"{CSV} --signals average", "--signal_folds 2"),
    Read("seed", CSV, "--seed 1"),
]
FILES_REFUSED = [
    Refused("raw_dir", CSV, "--raw_dir ml", "for MovieLens, Amazon and Book-Crossing data"),
    Refused("raw_dir", "--dataset parquet --ratings_file r.parquet", "--raw_dir ml", "for MovieLens, Amazon"),
    Refused("raw_dir", "--dataset ml-1m --ratings_file r --items_file i", "--raw_dir ml", "for MovieLens, Amazon"),
    Refused("accept_licence", CSV, "--accept_licence", "where MovieLens is fetched"),
    Refused("accept_licence", "--dataset ml-1m --raw_dir ml", "--accept_licence", "where MovieLens is fetched"),
    Refused("allow_altered", CSV, "--allow_altered", "for MovieLens data"),
    Refused("allow_altered", "--dataset amazon-2018 --raw_dir a", "--allow_altered", "for MovieLens data"),
    Refused("separator", "--dataset ml-25m --raw_dir ml", "--separator ;", "for csv"),
    Refused("separator", "--dataset parquet --ratings_file r.parquet", "--separator ;", "for csv"),
    *(
        Refused(f"{name}_column", f"--dataset {data} --raw_dir ml", f"--{name}_column x", "for csv, parquet")
        for name, datasets in (
            *((name, ("ml-100k", "ml-1m")) for name in ("user", "item", "rating")),
            ("time", ("ml-100k", "ml-1m", "book-crossing")),
            *((name, ("ml-100k", "ml-1m", "amazon-2014", "amazon-2023")) for name in ("title", "category")),
        )
        for data in datasets
    ),
]
PREPARE_REFUSED = [
    *FILES_REFUSED,
    Refused("negatives_by", CSV, "--negatives_by popularity", "with --negatives 1 or more"),
    Refused("ungraded", CSV, "--ungraded as_zero", "with --negatives 1 or more"),
    Refused("signal_folds", CSV, "--signal_folds 5", "with --signals"),
    Refused("signals", f"{CSV} --partitions 2", "--signals average", "without --partitions"),
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
    (tmp_path / "books").mkdir()
    graded = (f"{u},{i + 15 * u},{i % 10 + 1},{10 - i % 10}" for u, i in rows)
    (tmp_path / "books" / "Ratings.csv").write_text("\n".join(["User-ID,ISBN,Book-Rating,Other", *graded]))
    books = (f"{i},Book {i},Writer {i % 7}" for i in range(80))
    (tmp_path / "books" / "Books.csv").write_text("\n".join(["ISBN,Book-Title,Book-Author", *books]))
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
            places = (path for name in ("out", "elsewhere", "full") for path in ratings.glob(f"{name}/**/*.*"))
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
    Read("sampling", CSV, "--sampling none"),
    Read("sampling", CSV, "--sampling penalty,clustering"),
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
    for option in sorted({option for known in DEFAULTS.values() for option in known} - DEFAULTS[name].keys())
]


@pytest.mark.parametrize("row", [*FILES_REFUSED, *FOREIGN], ids=str)
def test_what_first_stage_does_not_read_is_refused_before_any_work(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refusal(first_stage.main, row, f"{row.stage} {row.words} --output_dir out", capsys)
    assert not list(tmp_path.iterdir())
