"""Book-Crossing in both of its forms: quotes that are escaped or lost, implicit zeros, no times; and its templates."""

from __future__ import annotations

import pytest
from tiny import byte_tokenizer

from alro_fast import first_stage, prepare, train
from alro_fast.data.lists import open_prepared
from alro_fast.data.sources.interactions import read_interactions
from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder

RATINGS = [
    ("276725", "034545104X", 0),
    ("276726", "0155061224", 5),
    ("276727", "2070426769", 10),
    ("276726", "078946697X", 7),
]
BOOKS = {  # what is in the dump's line -> what it says
    r'"0155061224";"Rites of \"Passage\" &amp; More; or not";"Judith Rae";"2001";"Heinle";"http://s"': (
        'Rites of "Passage" & More; or not',
        "Judith Rae",
    ),
    '"2070426769";"Peuple du ciel, suivi de \'Les Bergers\\";Jean Cl\xe9zio";"2003";"Gallimard";"http://s"': (
        "Peuple du ciel, suivi de 'Les Bergers",
        "Jean Cl\xe9zio",
    ),
    r'"078946697X";"DK Readers (Level 4: Proficient Readers)\";"Michael T";"2000";"DK";"http://s"': (
        "DK Readers (Level 4: Proficient Readers)",
        "Michael T",
    ),
    r'"1111111111";"Never rated\\";"";"0";"";"http://s"': ("Never rated", ""),
}  # fmt: skip
HEADER = '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S"'


def write_dump(folder, ratings=RATINGS, books=tuple(BOOKS)):
    folder.mkdir(exist_ok=True)
    lines = ['"User-ID";"ISBN";"Book-Rating"', *(f'"{u}";"{i}";"{r}"' for u, i, r in ratings)]
    (folder / "BX-Book-Ratings.csv").write_bytes("\r\n".join(lines).encode("latin-1") + b"\r\n")
    (folder / "BX-Books.csv").write_bytes("\r\n".join([HEADER, *books]).encode("latin-1") + b"\r\n")
    return folder


def test_the_dump(tmp_path):
    notes: list[str] = []
    found = read_interactions("book-crossing", write_dump(tmp_path / "bx"), notice=notes.append)
    said = dict(zip(("0155061224", "2070426769", "078946697X"), BOOKS.values()))
    assert {row[0]: row[1:] for row in found.items.rows()} == said
    ids, items = found.user_ids, found.items["item_id"]
    rows = [(ids[u], items[i], r) for u, i, r in zip(found.user.tolist(), found.item.tolist(), found.rating.tolist())]
    assert rows == [row for row in RATINGS if row[2]]
    assert set(found.time.tolist()) == {0}
    assert found.time_unit == "none"
    assert found.counts["implicit_ratings_left_out"] == 1
    assert found.counts["broken_books_left_out"] == found.counts["broken_lines_left_out"] == 0
    assert notes == ["1 ratings of 0 left out: they are implicit, no grades"]


def test_lines_that_cannot_be_split_are_counted(tmp_path):
    broken = ['"2222222222";"No end', '"3333333333";"One";"Too";"2000";"Many";"http://s";"cells"', '"4444444444";"Few"']
    folder = write_dump(tmp_path / "bx", [*RATINGS, ("9", '4"', 5)], [*BOOKS, *broken])
    with (folder / "BX-Book-Ratings.csv").open("ab") as file:
        file.write(b'"1";"0155061224\r\n"77";"0155061224";"8"\r\n')
    notes: list[str] = []
    found = read_interactions("book-crossing", folder, columns=None, notice=notes.append)
    assert "3 lines of BX-Books.csv cannot be split into cells: left out" in notes
    assert found.counts["broken_books_left_out"] == 3
    assert found.counts["broken_lines_left_out"] == 1
    assert found.user_ids.to_list()[:2] == ["9", "77"]


@pytest.mark.parametrize("names", [("Ratings.csv", "Books.csv"), ("BX-Book-Ratings.csv", "BX-Books.csv")])
def test_plain_csv_under_either_name(tmp_path, names):
    (tmp_path / names[0]).write_text("User-ID,ISBN,Book-Rating\n1,A,0\n1,B,8\n2,B,10\n2,C,1\n")
    (tmp_path / names[1]).write_text(
        "ISBN,Book-Title,Book-Author,Year-Of-Publication\n"
        'B,"Caf\xe9 ""Noir"", a tale",Anna,1999\n'
        'C,"DK Readers\\"";Michael T""",2000,DK\n',
        encoding="utf-8",
    )
    found = read_interactions("book-crossing", tmp_path, notice=list)
    assert found.items.rows() == [("B", 'Caf\xe9 "Noir", a tale', "Anna"), ("C", "DK Readers", "Michael T")]
    assert found.rating.tolist() == [8.0, 10.0, 1.0]
    assert found.counts["implicit_ratings_left_out"] == 1


BAD = {
    "header of another": ('"User-ID";"ISBN";"Stars"\n"1";"2";"3"\n', "has no column 'Book-Rating'.*--rating_column"),
    "no header": ('"1";"2";"2"\n"1";"3";"4"\n', "does not begin with the names of its columns"),
    "all implicit": ('"User-ID";"ISBN";"Book-Rating"\n"1";"2";"0"\n', "holds no ratings"),
    "a word": ('"User-ID";"ISBN";"Book-Rating"\n"1";"2";"good"\n', "has a rating that is not a number"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
def test_mistakes_are_one_line(tmp_path, text, message):
    folder = write_dump(tmp_path / "bx")
    (folder / "BX-Book-Ratings.csv").write_text(text)
    with pytest.raises(AlroFastError, match=rf"BX-Book-Ratings\.csv .*{message}") as raised:
        read_interactions("book-crossing", folder, notice=list)
    assert "\n" not in str(raised.value)


def test_a_folder_without_either_name(tmp_path):
    with pytest.raises(AlroFastError, match=r"lacks BX-Book-Ratings.csv and BX-Books.csv of book-crossing"):
        read_interactions("book-crossing", tmp_path)
    (tmp_path / "Ratings.csv").touch()
    with pytest.raises(AlroFastError, match=r"lacks Books.csv of book-crossing"):
        read_interactions("book-crossing", tmp_path)


@pytest.fixture
def folder(tmp_path):
    """Eight readers with the grades of thirty books, and an implicit zero each."""
    ratings = [(str(u), f"isbn{b}", 1 + (3 * u + b) % 10) for u in range(1, 9) for b in range(30)]
    ratings += [(str(u), "isbn90", 0) for u in range(1, 9)]
    books = [f'"isbn{b}";"Book {b}";"Writer {b % 4}";"1999";"House";"http://s"' for b in range(30)]
    return write_dump(tmp_path / "bx", ratings, books)


def test_lists_of_data_without_times_and_their_page(folder, tmp_path, capsys):
    """Held out at random by the seed; the template `books` shows authors and grades every rating by one token."""
    tests = []
    for seed in ("0", "0", "1"):
        out = tmp_path / f"lists-{len(tests)}"
        words = ["--dataset", "book-crossing", "--raw_dir", str(folder), "--output_dir", str(out), "--seed", seed]
        prepare.main([*words, "--list_size", "5"])
        data = open_prepared(out)
        tests.append([[item.index for item in one.candidates] for one in data.lists("test")])
    assert sorted(tests[0][0]) == sorted(tests[1][0]) != sorted(tests[2][0])
    assert data.manifest["time_unit"] == "none"
    assert data.manifest["counts"]["implicit_ratings_left_out"] == 8
    assert data.manifest["rating_values"] == [float(grade) for grade in range(1, 11)]
    text = "".join(PromptBuilder(byte_tokenizer(), "books").text(data.lists("test")[0]))
    assert "- Book " in text
    assert " by Writer " in text
    words = [
        "--data_dir",
        str(tmp_path / "lists-0"),
        "--template",
        "books",
        "--answer",
        "ratings",
        "--use_peft",
        "false",
    ]
    words += ["--model_name_or_path", "scratch", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    capsys.readouterr()
    train.main([*words, "--dry_run", "true"])
    assert "steps" in capsys.readouterr().out


def test_a_first_stage_and_its_tasks(folder, tmp_path, capsys):
    pytest.importorskip("implicit")
    out = tmp_path / "lists"
    words = [
        "--dataset",
        "book-crossing",
        "--raw_dir",
        str(folder),
        "--output_dir",
        str(out),
        "--like",
        "8",
        "--dislike",
        "4",
    ]
    first_stage.main([*words, "--retriever", "popularity", "--num_samples", "20"])
    words = [
        "--config",
        "recranker",
        "--data_dir",
        str(out),
        "--template",
        "books",
        "--use_cpu",
        "true",
        "--dry_run",
        "true",
    ]
    capsys.readouterr()
    train.main([*words, "--output_dir", str(tmp_path / "run")])
    assert "steps" in capsys.readouterr().out
