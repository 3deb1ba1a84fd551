"""Categories of Amazon Reviews from local files in the publisher's formats, from prepare to the plan of a run."""

from __future__ import annotations

import gzip
import json

import pytest

from alro_fast import prepare, train
from alro_fast.data.lists import open_prepared
from alro_fast.data.sources import files
from alro_fast.data.sources.columns import Columns
from alro_fast.data.sources.interactions import read_interactions
from alro_fast.errors import AlroFastError

USERS, ITEMS = 4, 24


def ratings() -> list[tuple[str, str, float, int]]:
    return [
        (f"A{u}", f"B{i:03}", float(1 + (u + i) % 5), 1_400_000_000 + i) for u in range(USERS) for i in range(ITEMS)
    ]


def put(path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write(folder, edition: str, packed: str = "") -> None:
    """Ratings alone, and products: B000 has no title, and B001 is not described."""
    folder.mkdir(exist_ok=True)
    rows = ratings()
    if edition == "amazon-2023":
        lines = ["user_id,parent_asin,rating,timestamp", *(f"{u},{i},{r},{t}123" for u, i, r, t in rows)]
        name, meta = f"Office.csv{packed}", f"meta_Office.jsonl{packed}"
        products = [
            json.dumps({"parent_asin": f"B{i:03}", "title": f"Pen, {i}", "main_category": "Office"})
            for i in range(2, ITEMS)
        ]
        products += [json.dumps({"parent_asin": "B000", "main_category": "Office"})]
    elif edition == "amazon-2018":
        lines = [f"{i},{u},{r},{t}" for u, i, r, t in rows]
        name, meta = f"Office.csv{packed}", f"meta_Office.json{packed}"
        products = [
            json.dumps({"asin": f"B{i:03}", "title": f"Pen, {i}", "main_cat": "Office"}) for i in range(2, ITEMS)
        ]
        products += [json.dumps({"asin": "B000", "main_cat": "Office"})]
    else:
        lines = [f"{u},{i},{r},{t}" for u, i, r, t in rows]
        name, meta = f"ratings_Office.csv{packed}", f"meta_Office.json{packed}"
        products = [
            repr({"asin": f"B{i:03}", "title": f"Pen, {i}", "categories": [["Office"]]}) for i in range(2, ITEMS)
        ]
        products += [repr({"asin": "B000", "categories": [["Office"]]})]
    put(folder / name, "\n".join(lines) + "\n")
    put(folder / meta, "\n".join(products) + "\n")


EDITIONS = ["amazon-2014", "amazon-2018", "amazon-2023"]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("edition", EDITIONS)
def test_ratings_alone(tmp_path, edition, packed):
    write(tmp_path / "raw", edition, packed)
    notes: list[str] = []
    found = read_interactions(edition, tmp_path / "raw", notice=notes.append)
    ids, items = found.user_ids, found.items["item_id"]
    columns = (found.user, found.item, found.rating, found.time // (1000 if edition == "amazon-2023" else 1))
    assert [(ids[u], items[i], r, t) for u, i, r, t in zip(*(c.tolist() for c in columns))] == ratings()
    assert found.items.rows()[:3] == [("B000", "B000", "Office"), ("B001", "B001", ""), ("B002", "Pen, 2", "Office")]
    assert notes == ["2 items have no title: shown by their id (--untitled drop leaves them out)"]
    assert found.time_unit == ("ms" if edition == "amazon-2023" else "s")


@pytest.mark.parametrize("edition", EDITIONS)
def test_from_files_to_the_plan_of_a_run(tmp_path, edition, capsys):
    write(tmp_path / "raw", edition, ".gz")
    out = tmp_path / "lists"
    more = ["--k_core", "3", "--list_size", "4", "--untitled", "drop"]
    prepare.main(["--dataset", edition, "--raw_dir", str(tmp_path / "raw"), "--output_dir", str(out), *more])
    data = open_prepared(out)
    assert len(data.lists("test")) == USERS
    assert data.manifest["licence"]["name"].startswith("none stated")
    assert data.manifest["counts"]["k_core"]["after"] == {
        "users": USERS,
        "items": ITEMS - 2,
        "ratings": USERS * (ITEMS - 2),
    }
    capsys.readouterr()
    words = [
        "--data_dir",
        str(out),
        "--template",
        "products",
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "true",
    ]
    train.main([*words, "--model_name_or_path", "scratch", "--use_peft", "false", "--dry_run", "true"])
    assert "steps" in capsys.readouterr().out


def test_reviews_of_2014_and_their_names(tmp_path):
    """reviews_X_5.json.gz beside meta_X.json.gz; a line of metadata that is code is no product, and is not run."""
    reviews = [
        {"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t, "reviewText": "x"} for u, i, r, t in ratings()
    ]
    put(tmp_path / "reviews_Office_5.json.gz", "".join(json.dumps(one) + "\n" for one in reviews))
    put(tmp_path / "meta_Office.json.gz", "{'asin': 'B002', 'title': 'A \\'good\\' pen', 'price': 1.5}\n")
    found = read_interactions("amazon-2014", tmp_path, notice=list)
    assert found.items.row(2) == ("B002", "A 'good' pen", "")
    run = tmp_path / "was-run"
    for line in (f"{{'asin': open({str(run)!r}, 'w')}}", "[" * 100_000, "{'asin': 1"):
        put(tmp_path / "meta_Office.json.gz", line)
        with pytest.raises(AlroFastError, match=r"meta_Office\.json\.gz holds a line that is no JSON object"):
            read_interactions("amazon-2014", tmp_path, notice=list)
    assert not run.exists()


@pytest.mark.parametrize(
    "product", [{"asin": ["B002"]}, {"asin": "B002", "title": 5, "category": "Pens"}, {"asin": None}]
)
def test_products_of_odd_shapes(tmp_path, product):
    write(tmp_path / "raw", "amazon-2018")
    meta = tmp_path / "raw" / "meta_Office.json"
    meta.write_text(json.dumps(product) + "\n" + meta.read_text())
    rows = {row[0]: row[1:] for row in read_interactions("amazon-2018", tmp_path / "raw", notice=list).items.rows()}
    assert rows["B002"] == (("B002", "Pens") if "title" in product else ("Pen, 2", "Office"))


def test_what_a_file_without_header_cannot_be_asked(tmp_path):
    write(tmp_path / "raw", "amazon-2014")
    with pytest.raises(AlroFastError, match=r"ratings_Office\.csv of amazon-2014 has no header: --rating_column names"):
        read_interactions("amazon-2014", tmp_path / "raw", columns=Columns(rating="stars"))
    with pytest.raises(AlroFastError, match=r"describes none of the reviewed products"):  # 2014 has the user first
        read_interactions("amazon-2018", tmp_path / "raw")
    (tmp_path / "raw" / "ratings_Office.csv").write_text("A1,B1,5\n")
    with pytest.raises(AlroFastError, match=r"has 3 fields per line when split at ','; 4 are expected"):
        read_interactions("amazon-2014", tmp_path / "raw")
    write(tmp_path / "new", "amazon-2023")
    (tmp_path / "new" / "Office.csv").write_text("user_id,asin,rating,timestamp\nA1,B1,5,1\n")
    with pytest.raises(AlroFastError, match=r"Office\.csv has no column 'parent_asin'.*--item_column"):
        read_interactions("amazon-2023", tmp_path / "new")


@pytest.mark.parametrize(
    "edition, name", [("amazon-2014", "ratings_Office.csv.gz"), ("amazon-2018", "meta_Office.json.gz")]
)
def test_an_archive_that_unfolds_beyond_reason_is_refused(tmp_path, monkeypatch, edition, name):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(files, "UNFOLDED_BYTES", 1 << 18)
    write(tmp_path / "raw", edition, ".gz")
    put(tmp_path / "raw" / name, "\n" * (1 << 22))
    with pytest.raises(AlroFastError, match=rf"{name} unfolds to more than [\d,]+ bytes"):
        read_interactions(edition, tmp_path / "raw", notice=list)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    monkeypatch.setattr(files, "LINE_BYTES", 1000)
    write(tmp_path / "raw", "amazon-2018")
    (tmp_path / "raw" / "meta_Office.json").write_text("x" * 2000)
    with pytest.raises(AlroFastError, match=r"meta_Office\.json has a line of more than 1,000 bytes"):
        read_interactions("amazon-2018", tmp_path / "raw", notice=list)
