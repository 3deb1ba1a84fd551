"""The kinds of input that are made hostile: how valid files of each are written, and how they are read."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import urllib.error
from http.client import HTTPResponse
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from tiny import byte_tokenizer, catalogue, make_run, random_lists

from alro_fast.data.lists import SPLITS, open_prepared, write_prepared
from alro_fast.data.preferences import read_preferences
from alro_fast.data.sources.interactions import read_interactions
from alro_fast.data.windows import ListOptions, build_lists
from alro_fast.errors import AlroFastError
from alro_fast.evaluation.report import write_report
from alro_fast.evaluation.targets import evaluate_rankers, save_measurement
from alro_fast.prompts import PromptBuilder
from alro_fast.prompts.recranker import RecRankerPrompts
from alro_fast.prompts.template import TEMPLATES, load_template
from alro_fast.ranking import served
from alro_fast.ranking.documents import documents, parse_list
from alro_fast.ranking.orders import make_ranking, presentations
from alro_fast.ranking.ranker import Ranker
from alro_fast.studies.plan import READY, plan, read_study
from alro_fast.training.config import parse

TOKENIZER = byte_tokenizer()
SCALE = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
LISTS = random_lists(4, 5, seed=1, history=3, items=30)
ROWS = [
    (user, item, (user * item) % 5 + 1, 1000 + 7 * item) for user in range(4) for item in range(40) if (user + item) % 3
]


def silent(_: str) -> None:
    """Takes a notice."""


def read(dataset: str, **where: object) -> object:
    """The lists of a data set."""
    found = read_interactions(dataset, **where, duplicates="drop", notice=silent)
    return build_lists(found, ListOptions(list_size=4, history_length=3, min_history=2, negatives=1), notice=silent)


# ---- ratings


def make_csv(folder: Path) -> None:
    lines = [f'{user},{item},{rating},{time},"Film, {item}"' for user, item, rating, time in ROWS]
    (folder / "r.csv").write_text("\n".join(["user_id,item_id,rating,timestamp,title", *lines]) + "\n")
    (folder / "i.csv").write_text("item_id,title,category\n" + "".join(f'{i},"F ""{i}""",Drama\n' for i in range(40)))


def check_csv(folder: Path) -> object:
    return read("csv", ratings_file=folder / "r.csv", items_file=folder / "i.csv")


def make_parquet(folder: Path) -> None:
    table = pl.DataFrame(ROWS, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    (folder / "parts").mkdir()
    for part in range(2):
        table[part::2].write_parquet(folder / "parts" / f"{part}.parquet")


def check_parquet(folder: Path) -> object:
    return read("parquet", ratings_file=folder / "parts")


def make_100k(folder: Path) -> None:
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ROWS))
    items = "".join(
        f"{i}|Film {i} (1999)|01-Jan-1999||http://x|{'|'.join('01'[i % 7 == g % 7] for g in range(19))}\n"
        for i in range(40)
    )
    (folder / "u.item").write_text(items, encoding="latin-1")


def make_1m(folder: Path) -> None:
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ROWS))
    (folder / "movies.dat").write_text("".join(f"{i}::Film {i} (1999)::Drama|War\n" for i in range(40)))


def make_latest(folder: Path) -> None:
    lines = "".join(",".join(map(str, row)) + "\n" for row in ROWS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + lines)
    (folder / "movies.csv").write_text(
        "movieId,title,genres\n" + "".join(f"{i},Film {i},Drama|War\n" for i in range(40))
    )


def make_amazon(folder: Path) -> None:
    reviews = [
        {"user_id": f"U{user}", "parent_asin": f"B{item}", "rating": float(rating), "timestamp": time, "text": "good"}
        for user, item, rating, time in ROWS
    ]
    (folder / "Office.jsonl").write_text("".join(json.dumps(one) + "\n" for one in reviews))
    products = [{"parent_asin": f"B{i}", "title": f"Pen {i}", "categories": ["Office", "Pens"]} for i in range(40)]
    (folder / "meta_Office.jsonl").write_text("".join(json.dumps(one) + "\n" for one in products))


def make_amazon_2014(folder: Path) -> None:
    with gzip.open(folder / "reviews_X.json.gz", "wt") as file:
        for user, item, rating, time in ROWS:
            one = {"reviewerID": f"U{user}", "asin": f"B{item}", "overall": float(rating), "unixReviewTime": time}
            file.write(json.dumps(one) + "\n")
    (folder / "meta_X.json").write_text(
        "".join(f"{{'asin': 'B{i}', 'title': 'Pen {i}', 'categories': [['Office', 'Pens']]}}\n" for i in range(40))
    )


def make_books(folder: Path) -> None:
    lines = "".join(f'"{user}";"{item}";"{rating}"\r\n' for user, item, rating, _ in ROWS)
    (folder / "BX-Book-Ratings.csv").write_text('"User-ID";"ISBN";"Book-Rating"\r\n' + lines, encoding="latin-1")
    head = '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher"\r\n'
    books = "".join(f'"{i}";"Caf\xe9 {i}";"A. Writer";"1999";"House"\r\n' for i in range(40))
    (folder / "BX-Books.csv").write_text(head + books, encoding="latin-1")


def in_folder(dataset: str):
    """Reads a data set whose files have names of their own."""
    return lambda folder: read(dataset, raw_dir=folder, allow_altered=True)


# ---- prepared folders, preferences, lists


def make_prepared(folder: Path) -> None:
    lists = dict.fromkeys(SPLITS, LISTS)
    seen = pl.DataFrame({"user_id": ["u0"], "items": pl.Series([[1, 2]], dtype=pl.List(pl.UInt32))})
    write_prepared(folder, catalogue(30), lists, {"rating_values": [1.0, 2.0]}, seen=seen)


def check_prepared(folder: Path) -> None:
    """What opens a folder, after its manifest was made to agree with a damaged table: by who means harm."""
    manifest = folder / "manifest.json"
    try:
        told = json.loads(manifest.read_bytes())
        for name in told["files"]:
            told["files"][name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        manifest.write_text(json.dumps(told))
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        pass
    data = open_prepared(folder)
    for split in SPLITS:
        for one in data.lists(split):
            assert one.candidates
    data.seen(), data.rating_values(), data.known_ratings("test")


def make_preferences(folder: Path) -> None:
    rows = [{"prompt": f"User {u}:", "chosen": " A", "rejected": [" B", " C"], "history": "x"} for u in range(3)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"role": "user", "content": "Which?"}]
    rows = [{"prompt": turns, "chosen": [{"role": "assistant", "content": "A"}], "rejected": "B"}] * 2
    (folder / "t.json").write_text(json.dumps(rows))
    rows = [{"instruction": "Rank", "input": "x", "output": ["A", "B"], "system": "s", "history": [["a", "b"]]}] * 2
    (folder / "a.json").write_text(json.dumps(rows))
    pl.DataFrame({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": [["e"], ["f"]]}).write_parquet(
        folder / "p.parquet"
    )


def check_preferences(folder: Path) -> None:
    failure = None
    for file in sorted(folder.iterdir()):
        try:
            read_preferences(file)
        except AlroFastError as error:
            failure = error
    if failure:
        raise failure


def make_lists(folder: Path) -> None:
    line = {
        "list_id": "a",
        "history": [{"title": "Heat", "category": "Crime", "rating": 4.5, "average": 3.0, "count": 7}],
        "candidates": [{"id": 7, "title": "Casino", "hint": 4.1}, {"id": "x", "title": "Clueless", "near": 0.1}],
    }
    (folder / "lists.jsonl").write_text((json.dumps(line) + "\n") * 3)
    (folder / "lists.json").write_text(json.dumps([line, line], indent=1))


def check_lists(folder: Path) -> None:
    """What `rank` does with lists before a model sees them, and the prompts of those that pass."""
    prompts, failure = PromptBuilder(TOKENIZER, "movies"), None
    for file in sorted(folder.iterdir()):
        try:
            for number, document in enumerate(documents(str(file)), start=1):
                if isinstance(document, AlroFastError):
                    raise document
                entry = parse_list(document, number)
                if len(entry.candidates) <= prompts.max_candidates:
                    prompts.ranking(entry)
        except AlroFastError as error:
            failure = error
    if failure:
        raise failure


# ---- templates, options, studies


def make_templates(folder: Path) -> None:
    for name in ("movies", "items", "compact"):
        (folder / f"{name}.yaml").write_bytes((TEMPLATES / f"{name}.yaml").read_bytes())
    (folder / "tasks.yaml").write_bytes((TEMPLATES / "recranker" / "movies.yaml").read_bytes())


def check_templates(folder: Path) -> None:
    failure = None
    for file in sorted(folder.iterdir()):
        try:
            if file.stem == "tasks":
                RecRankerPrompts(TOKENIZER, str(file))
            else:
                PromptBuilder(TOKENIZER, load_template(file, SCALE)).rankings(LISTS)
        except AlroFastError as error:
            failure = error
    if failure:
        raise failure


def make_chat(folder: Path) -> None:
    (folder / "chat.jinja").write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def check_chat(folder: Path) -> object:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (folder / "chat.jinja").read_text(errors="replace")
    return PromptBuilder(tokenizer, "movies").rankings(LISTS[:1])


def make_options(folder: Path) -> None:
    options = {
        "objective": "alro",
        "learning_rate": 0.001,
        "lora_r": 4,
        "max_steps": 3,
        "output_dir": "out",
        "bf16": False,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(options))
    (folder / "s.yaml").write_bytes((READY / "alro-parts.yaml").read_bytes())


def check_options(folder: Path) -> None:
    failure = None
    try:
        parse(["--config", str(folder / "c.yaml")])
    except AlroFastError as error:
        failure = error
    plan(read_study(str(folder / "s.yaml")), seeds=[0, 1], output_dir=folder / "out")
    if failure:
        raise failure


# ---- run folders


def check_run(folder: Path) -> object:
    return Ranker.load(folder / "run", device="cpu").rank(LISTS[:1])


def make_report(folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(len(LISTS), 2, 5))
    rankings = {
        "tuned": [make_ranking(one, presentations(one, 2, seed=0), row, "mean") for one, row in zip(LISTS, rows)]
    }
    scores = {"tuned": [one.scores for one in rankings["tuned"]], "popularity": [np.arange(5)] * len(LISTS)}
    results = evaluate_rankers(LISTS, scores, targets=False, bootstrap=20)
    save_measurement(folder, results, LISTS, rankings, targets=False)
    history = [{"step": n, "loss": 1 / n, "eval_ndcg@3": 0.5, "lists_per_second": 3.0} for n in (1, 2)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "config.yaml").write_text("objective: alro\nmax_steps: 2\n")


# ---- a server's answers

ASKED = PromptBuilder(TOKENIZER, "movies").ranking(LISTS[0])


def make_answer(folder: Path) -> None:
    top = {f"token_id:{token}": -0.1 * at for at, token in enumerate(ASKED.candidate_ids, start=1)}
    body = json.dumps({"choices": [{"index": 0, "text": " A", "logprobs": {"top_logprobs": [top]}}]})
    (folder / "answer").write_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body.encode()))
    (folder / "complaint").write_bytes(b'HTTP/1.1 400 Bad\r\n\r\n{"error": {"message": "maximum is 20"}}')


class Sent:
    """A socket into which a server has sent all that it will send."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self.content)


def check_answer(folder: Path) -> None:
    """The client, which gets these bytes in answer to what it asks."""

    def open_with(content: bytes):
        def opened(request, timeout):
            response = HTTPResponse(Sent(content), method="POST")
            response.begin()
            if response.status >= 300:
                raise urllib.error.HTTPError(request.full_url, response.status, "no", response.headers, response)
            return response

        return opened

    asker, real = (
        served.RankingClient("http://localhost:1", "tuned", PromptBuilder(TOKENIZER, "movies")),
        served._OPENER,
    )
    try:
        for name in ("complaint", "answer"):
            opener = type("Opener", (), {"open": staticmethod(open_with((folder / name).read_bytes()))})
            served._OPENER = opener
            try:
                list(asker.stream(LISTS[:1]))
            except AlroFastError:
                if name == "answer":
                    raise
    finally:
        served._OPENER = real


RUN = ("adapter_model.safetensors", "adapter_config.json", "config.yaml", "tokenizer.json", "tokenizer_config.json")
KINDS = {  # name -> how its files are made, how they are read, which are made hostile
    "csv": (make_csv, check_csv, ("r.csv", "r.csv", "i.csv")),
    "parquet": (make_parquet, check_parquet, ("parts/0.parquet", "parts/1.parquet")),
    "ml-100k": (make_100k, in_folder("ml-100k"), ("u.data", "u.item")),
    "ml-1m": (make_1m, in_folder("ml-1m"), ("ratings.dat", "movies.dat")),
    "ml-latest": (make_latest, in_folder("ml-latest-small"), ("ratings.csv", "movies.csv")),
    "amazon": (make_amazon, in_folder("amazon-2023"), ("Office.jsonl", "meta_Office.jsonl")),
    "amazon-2014": (make_amazon_2014, in_folder("amazon-2014"), ("reviews_X.json.gz", "meta_X.json")),
    "books": (make_books, in_folder("book-crossing"), ("BX-Book-Ratings.csv", "BX-Books.csv")),
    "prepared": (
        make_prepared,
        check_prepared,
        ("manifest.json", "items.parquet", "lists-train.parquet", "lists-test.parquet", "seen.parquet"),
    ),
    "preferences": (make_preferences, check_preferences, ("p.jsonl", "t.json", "a.json", "p.parquet")),
    "lists": (make_lists, check_lists, ("lists.jsonl", "lists.json")),
    "templates": (make_templates, check_templates, ("movies.yaml", "items.yaml", "compact.yaml", "tasks.yaml")),
    "chat": (make_chat, check_chat, ("chat.jinja",)),
    "options": (make_options, check_options, ("c.yaml", "s.yaml")),
    "run": (make_run, check_run, tuple(f"run/{name}" for name in (*RUN, "prompt_template.yaml"))),
    "report": (
        make_report,
        write_report,
        ("results.json", "predictions.jsonl", "trainer_state.json", "config.yaml"),
    ),
    "answer": (make_answer, check_answer, ("answer", "answer", "complaint")),
}
