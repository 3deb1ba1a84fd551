"""Preference files and negatives: every format, the authors' files in full, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from tiny import byte_tokenizer, catalogue, random_lists

from alro_fast import prepare
from alro_fast.data.lists import SPLITS, open_prepared, seen_frame, write_prepared
from alro_fast.data.negatives import DRAWS, SOURCES, Negatives, positive
from alro_fast.data.preferences import Preference, Turn, read_preferences, two_items, with_first
from alro_fast.data.records import Signal
from alro_fast.errors import AlroFastError
from alro_fast.objectives.base import build_objective
from alro_fast.options import ObjectiveArguments
from alro_fast.prompts.preference import PreferencePrompts
from alro_fast.training.plans.dataset import build_batch


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        path.write_text(json.dumps(rows))
    return path


ROW = {"prompt": "Next?", "chosen": " North", "rejected": [" Echo", " Gold"]}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_trl_rows_of_every_file_type(tmp_path, suffix):
    [one] = read_preferences(write(tmp_path / f"a{suffix}", [ROW]))
    assert one.prompts == ("Next?",)
    assert (one.chosen, one.rejected) == ((" North",), (" Echo", " Gold"))
    assert not one.paired


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x1c", "\x0b"])
def test_a_line_of_jsonl_ends_with_a_line_feed_alone(tmp_path, separator):
    rows = [ROW | {"prompt": f"One{separator}two?"}, ROW]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if separator in "\x1c\x0b":  # JSON wants these escaped
        lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\r\n".join([*lines, ""]), encoding="utf-8", newline="")
    assert [one.prompts for one in read_preferences(tmp_path / "a.jsonl")] == [(f"One{separator}two?",), ("Next?",)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path, suffix):
    file = write(tmp_path / f"a{suffix}", [ROW])
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert read_preferences(file)[0].prompts == ("Next?",)


def test_alpaca_history_is_earlier_turns(tmp_path):
    row = {"instruction": "Next?", "input": None, "output": ["a", "b"], "history": [["Seen?", "Gold"]]}
    [one] = read_preferences(write(tmp_path / "a.json", [row]))
    assert one.prompts == ((Turn("user", "Seen?"), Turn("assistant", "Gold"), Turn("user", "Next?")),)


def test_trl_rejected_may_be_a_text_and_rows_of_a_user_become_one(tmp_path):
    rows = [
        {"prompt": "A?", "chosen": "x", "rejected": "y"},
        {"prompt": "B?", "chosen": "x", "rejected": "y"},
        {"prompt": "A?", "chosen": "x", "rejected": "z"},
        {"prompt": "A?", "chosen": "w", "rejected": "z"},
    ]
    file = write(tmp_path / "a.json", rows)
    first, second, third = read_preferences(file)
    assert (first.prompts, first.chosen, first.rejected) == (("A?",), ("x",), ("y", "z"))
    assert (second.prompts, third.chosen) == (("B?",), ("w",))
    assert first.user_id == third.user_id != second.user_id


def test_an_answer_rejected_twice_counts_once(tmp_path, capsys):
    """Within a row, in rows of one prompt, and as a whole row that asks about two items."""
    pair = {"prompt": TEXT, "chosen": "<Title:B , C> , <Title:Bug's Life, A >",
            "rejected": "<Title:Bug's Life, A > , <Title:B , C>"}  # fmt: skip
    rows = [ROW | {"rejected": ["x", "y", "x"]}, ROW | {"rejected": "y"}, pair, pair]
    first, second = read_preferences(write(tmp_path / "a.json", rows))
    assert first.rejected == ("x", "y")
    assert (second.rejected, second.paired) == ((pair["rejected"],), False)
    assert "a.json: 3 rejected answers stand there twice" in capsys.readouterr().out


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_trl_conversations(tmp_path, suffix):
    """Messages as prompt and answers; the prompt inside chosen and rejected; one rejected or a list of them."""
    asked = [message("system", "Rank."), message("user", "Next?")]
    one, other = [message("assistant", "North")], [message("assistant", "Echo")]
    expected = ((Turn("system", "Rank."), Turn("user", "Next?")),)
    for number, row in enumerate(
        [
            {"prompt": asked, "chosen": one, "rejected": other},
            {"prompt": asked, "chosen": one, "rejected": [other]},
            {"chosen": asked + one, "rejected": asked + other},
        ]
    ):
        [read] = read_preferences(write(tmp_path / f"{number}{suffix}", [row]))
        assert (read.prompts, read.chosen, read.rejected) == (expected, ("North",), ("Echo",))


def test_alpaca_rows_without_pairs(tmp_path):
    row = {"instruction": "Which?", "input": "Gold", "output": ["North", "Echo"], "system": "Rank."}
    [one] = read_preferences(write(tmp_path / "a.json", [row]))
    assert one.prompts == ((Turn("system", "Rank."), Turn("user", "Which?\nGold")),)
    alone = write(tmp_path / "b.json", [{"instruction": "Which?", "output": "North"}])
    assert read_preferences(alone, need_rejected=False)[0].rejected == ()


TEXT = "History:  <Title:A >  <Title:B, The> . Rank the two movies  <Title:Bug's Life, A >  and  <Title:B , C> ."


def test_orderings_of_two_items():
    """Items with commas in their titles are told apart by the prompt that names them."""
    answer = " <Title:Bug's Life, A > ,  <Title:B , C> "
    assert two_items(answer, TEXT) == ("<Title:Bug's Life, A >", "<Title:B , C>")
    assert two_items("<Title:B , C> ,  <Title:Bug's Life, A >", TEXT) == ("<Title:B , C>", "<Title:Bug's Life, A >")
    assert two_items("North , Echo", TEXT) is None
    assert two_items(" <Title:A > ", TEXT) is None


def test_one_ordering_gives_the_other_with_its_spaces(tmp_path):
    row = {"instruction": TEXT, "input": "", "output": " <Title:Bug's Life, A > ,  <Title:B , C> "}
    [one] = read_preferences(write(tmp_path / "a.json", [row]))
    assert one.rejected == (" <Title:B , C> ,  <Title:Bug's Life, A > ",)


ALPACA = {"instruction": "Next?", "output": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", [{"prompt": "a", "chosen": "b"}], "a.json, row 0 has no rejected answer"),
        ("a.json", [{"prompt": "a", "chosen": "b", "rejected": []}], "row 0 has no rejected answer"),
        ("a.json", [ROW, ROW | {"chosen": "  "}], "row 1: a chosen answer is empty"),
        ("a.json", [ROW | {"rejected": ["b", ""]}], "row 0: a rejected answer is empty"),
        ("a.json", [ROW | {"chosen": "\u200b \ufeff"}], "row 0: a chosen answer is empty"),
        ("a.json", [ROW | {"prompt": ""}], "row 0: the prompt is empty"),
        ("a.json", [ROW | {"prompt": [message("user", " \u200b")]}], "row 0: the prompt is empty"),
        ("a.json", [ALPACA | {"instruction": ""}], "row 0: the prompt is empty"),
        ("a.json", [ROW | {"chosen": "\ud83d"}], "row 0: '\\ud83d' holds half of a surrogate pair"),
        ("a.json", [ROW | {"prompt": "x\udc00"}], "holds half of a surrogate pair"),
        ("a.json", [ALPACA | {"instruction": None}], "row 0: instruction is None; expected a text"),
        ("a.json", [ALPACA | {"instruction": 3}], "row 0: instruction is 3; expected a text"),
        ("a.json", [ALPACA | {"input": ["x"]}], "row 0: input is ['x']; expected a text"),
        ("a.json", [ALPACA | {"system": 3}], "row 0: system is 3; expected a text"),
        ("a.json", [ALPACA | {"history": [["a"]]}], "row 0: history is [['a']]; expected a list of [question, answer]"),
        ("a.json", [ALPACA | {"history": [["a", None]]}], "expected a list of [question, answer]"),
        ("a.json", [ALPACA | {"history": 3}], "row 0: history is 3; expected"),
        ("a.json", [ALPACA | {"history": ["ab"]}], "row 0: history is ['ab']; expected"),
        ("a.json", [ROW | {"rejected": ["x", " North"]}], "' North' is chosen and rejected"),
        ("a.json", [{"chosen": "a", "rejected": "b"}], "row 0 has no prompt"),
        ("a.json", [{"question": "a"}], "row 0 has the columns question; expected columns prompt, chosen, rejected"),
        ("a.json", [{"instruction": "a", "output": ["b", "c", "d"]}], "expected a text, or the two texts"),
        ("a.json", [{"instruction": "a", "output": "b"}], "row 0 has no rejected answer"),
        ("a.json", [ROW | {"chosen": 3}], "an answer is 3; expected a text"),
        ("a.json", [ROW | {"prompt": [{"text": "a"}]}], "a message lacks 'role'"),
        ("a.json", [ROW | {"chosen": [message("user", "a")]}], "one message of the assistant"),
        ("a.json", [], "holds no rows"),
        ("a.json", {"a": 1}, "is no list of rows"),
        ("a.json", "{not json", "is not JSON"),
        ("a.jsonl", "{not json", "line 1 is not JSON"),
        ("a.parquet", "PAR", "is no Parquet file"),
        ("a.csv", "a,b", "cannot read .csv; expected .json, .jsonl, .parquet"),
        (None, None, "no preference file"),
    ],
)
def test_mistakes_name_file_and_row(tmp_path, name, content, said):
    file = tmp_path / (name or "missing.json")
    if name is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(AlroFastError) as caught:
        read_preferences(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_negatives_of_a_record():
    shared = Preference("a", "u", ("P",), ("x",), ("1", "2", "3"))
    assert with_first(2, shared) == replace(shared, rejected=("1", "2"))
    own = Preference("a", "u", ("P", "Q", "R"), ("x", "y", "z"), ("1", "2", "3"))
    assert with_first(1, own) == Preference("a", "u", ("P",), ("x",), ("1",))
    assert with_first(3, own) == own
    with pytest.raises(AlroFastError, match="a has 3 rejected answers, fewer than --num_negatives 4; lower it, or"):
        with_first(4, shared)


def test_rows_of_supervised_tuning(tmp_path):
    """Alpaca, an output of one text: two items in order are rejected in the other order, all else has no rejection."""
    rows = [{"instruction": "Rank the movies <A> and <B> .", "input": "", "output": " <B> , <A> "}]
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(rows))
    (one,) = read_preferences(file)
    assert (one.chosen, one.rejected) == ((" <B> , <A> ",), (" <A> , <B> ",))
    file.write_text(json.dumps([*rows, {"instruction": "Which movie?", "output": "<C>"}]))
    assert [len(one.rejected) for one in read_preferences(file, need_rejected=False)] == [1, 0]
    with pytest.raises(AlroFastError, match=r"sft.json, row 1 has no rejected answer.* or train with --objective sft"):
        read_preferences(file)


# ---- the authors' files

FILES = [(name, k) for name in ("data_ml_1m", "Amazon_Movie") for k in range(1, 6)]


@pytest.mark.parametrize(("name", "k"), FILES)
def test_the_authors_files_are_read_as_they_are(shared_data, name, k):
    """100 users with exactly k distinct negatives (the stray Amazon k = 1 file: 200); all become trees."""
    folder = shared_data / "dmpo-prompts"
    file = folder / f"rec_{name}_dpo_ranking_{k}.json"
    people = read_preferences(file)
    assert len(people) == (200 if (name, k) == ("Amazon_Movie", 1) else 100)
    rows = json.loads(file.read_text())
    assert sum(len(one.rejected) for one in people) == len(rows)
    assert sorted(answer for one in people for answer in one.chosen) == sorted(row["output"][0] for row in rows)
    for one in people:
        assert len(set(one.rejected)) == len(one.rejected) == k
        assert one.paired == (k > 1)
        assert len({answer.split(" , ")[0] for answer in one.chosen}) == 1  # one positive
        assert len({prompt[0].content.split(" . Rank")[0] for prompt in one.prompts}) == 1  # one history
    assert len({one.user_id for one in people}) == len(people)
    objective = build_objective(
        ObjectiveArguments(objective="dmpo"), PreferencePrompts(byte_tokenizer()), answer="ranking", seed=0
    )
    few = people[:10]
    batch = build_batch(objective.examples(few, range(10), 0), objective)
    assert batch.counts == {"preference": 10, "reward_accuracy": 10 * k, "reward_margin": 10 * k}
    assert batch.packed.unshared_tokens > (1 + k / 2) * batch.packed.unique_tokens


@pytest.mark.parametrize("name", ["data_ml_1m", "Amazon_Movie"])
def test_the_authors_evaluation_and_sft_files(shared_data, name):
    """1,000 evaluation rows, whether both orderings are given or one; SFT rows of the training users."""
    folder = shared_data / "dmpo-prompts"
    measured = read_preferences(folder / f"rec_{name}_eval_ranking.json")
    assert len(measured) == 1000
    assert all(len(one.rejected) == 1 and one.chosen[0] != one.rejected[0] for one in measured)
    assert all(sorted(one.chosen[0]) == sorted(one.rejected[0]) for one in measured)  # the same titles, reordered
    taught = read_preferences(folder / f"rec_{name}_sft_ranking.json")
    tuned = read_preferences(folder / f"rec_{name}_dpo_ranking_3.json")
    assert {one.user_id for one in taught} == {one.user_id for one in tuned}
    assert not {one.user_id for one in measured} & {one.user_id for one in tuned}


# ---- negatives

SHELF = catalogue(80)
LISTS = random_lists(12, range(3, 8), seed=5, history=6, items=80)
COUNTS = np.arange(80) % 7  # some never rated


def negatives(**options):
    return Negatives(SHELF, COUNTS, LISTS, **{"count": 4} | options)


@pytest.mark.parametrize("by", DRAWS)
@pytest.mark.parametrize("source", SOURCES)
def test_negatives_are_never_of_the_users_history(by, source):
    """Nor a known item, nor one nobody rated; distinct; the positive is the highest rated candidate."""
    draw = negatives(by=by, source=source)
    for one in LISTS:
        if not draw.usable(one):
            continue
        for epoch in range(3):
            contest = draw.contest(one, epoch)
            best = contest.candidates[positive(contest)]
            rating = dict(zip(one.candidates, one.ratings))
            assert rating[best] == max(one.ratings)
            others = [item for item in contest.candidates if item != best]
            assert len({item.index for item in others}) == len(others)
            assert not {item.index for item in others} & {item.index for item in one.history}
            assert all(item.title != best.title for item in others)
            if source == "catalogue":
                assert len(others) == 4
                assert not {item.index for item in others} & draw.seen[one.user_id]
                assert all(COUNTS[item.index] for item in others)
                assert sum(math.isnan(r) for r in contest.ratings) == 4
            else:
                assert all(rating[item] < rating[best] for item in others)


@pytest.mark.parametrize("by", DRAWS)
def test_no_negative_was_ever_rated_by_its_user(tmp_path, by, capsys):
    """Prepared with one training list of three ratings per user, of 40 each: most ratings are in no list."""
    rated = {f"u{u}": np.random.default_rng(u).choice(80, 40, replace=False).tolist() for u in range(5)}
    rows = [f"{user},i{item},{1 + item % 5},{time}" for user, items in rated.items() for time, item in enumerate(items)]
    (tmp_path / "r.csv").write_text("\n".join(["user_id,item_id,rating,timestamp", *rows]))
    prepare.main([
        "--dataset", "csv", "--ratings_file", str(tmp_path / "r.csv"), "--output_dir", str(tmp_path / "lists"),
        "--list_size", "3", "--history_length", "2", "--train_stride", "7", "--max_train_lists_per_user", "2",
    ])  # fmt: skip
    prepared = open_prepared(tmp_path / "lists")
    capsys.readouterr()
    draw = Negatives.of(prepared, count=2, by=by)
    assert capsys.readouterr().out == ""
    for one in (one for split in SPLITS for one in prepared.lists(split)):
        known = {f"i{item}" for item in rated[one.user_id]}
        assert {prepared.items[i].item_id for i in prepared.seen()[one.user_id]} == known
        for epoch in range(3):
            new = {item.item_id for item in draw.contest(one, epoch).candidates} - {i.item_id for i in one.candidates}
            assert len(new) == 2
            assert not new & known


OTHERS = random_lists(8, range(3, 8), seed=6, history=6, items=80)  # who rated what the first user may be shown


def test_a_folder_without_ratings_tells_what_its_lists_show(tmp_path, capsys):
    """Five lists of one user over three splits, and nothing else known: what any of them shows is no negative."""
    lists = [replace(one, user_id="u") for one in LISTS[:5]]
    write_prepared(tmp_path, SHELF, {"train": [*lists[:2], *OTHERS], "valid": lists[2:3], "test": lists[3:]})
    draw = Negatives.of(open_prepared(tmp_path), count=2)
    assert capsys.readouterr().out.count("has no seen.parquet") == 1
    shown = {item.index for one in lists for item in (*one.history, *one.candidates)}
    for one in lists:
        for epoch in range(8):
            own = {item.index for item in one.candidates}
            assert not ({item.index for item in draw.contest(one, epoch).candidates} - own) & shown


def test_rated_items_are_kept_by_user_and_checked(tmp_path):
    """Ratings in any order; a user without any is left out; a replaced file is refused."""
    seen = seen_frame(np.array([2, 0, 2]), np.array([7, 5, 3]), pl.Series(["a", "b", "c"]))
    write_prepared(tmp_path, SHELF, {"train": LISTS[:1]}, seen=seen)
    found = open_prepared(tmp_path).seen()
    assert {user: items.tolist() for user, items in found.items()} == {"a": [5], "c": [3, 7]}
    seen[:1].write_parquet(tmp_path / "seen.parquet")
    with pytest.raises(AlroFastError, match=r"seen\.parquet is not the file its manifest"):
        open_prepared(tmp_path).seen()


def test_draws_depend_on_seed_epoch_and_list_alone():
    one, other = LISTS[0], LISTS[1]
    assert negatives().contest(one, 3) == negatives().contest(one, 3)
    drawn = [negatives(seed=seed).contest(LISTS[i], epoch) for seed in (0, 1) for i in (0, 1) for epoch in (0, 1)]
    assert len({tuple(item.index for item in contest.candidates) for contest in drawn}) == 8
    places = [positive(negatives().contest(one, epoch)) for epoch in range(30)]
    assert set(places) == {0, 1, 2, 3, 4}  # no place gives the positive away
    assert one.list_id != other.list_id


def test_hints_and_signals_stay_where_every_candidate_has_them():
    """Beside the positive alone they would name it: none is shown with items from the catalogue."""
    numbers = tuple(float(item.index) for item in LISTS[0].candidates)
    past = (1.0,) * len(LISTS[0].history)
    one = replace(LISTS[0], hints=numbers, signals=(Signal("average", past, numbers),))
    shown = negatives().contest(one, 0)
    assert shown.hints == ()
    assert shown.signals == (Signal("average", past, ()),)
    shown = negatives(source="candidates", count=2).contest(one, 0)
    own = tuple(float(item.index) for item in shown.candidates)
    assert shown.hints == own
    assert shown.signals == (Signal("average", past, own),)
    assert negatives().contest(LISTS[0], 0).hints == ()


def test_popular_items_are_drawn_in_proportion():
    """An item with half of all ratings is drawn in about half of 400 draws; uniformly in about one of 80."""
    counts = np.where(np.arange(80) == 79, 79, 1)
    assert SHELF[79] not in (*LISTS[0].history, *LISTS[0].candidates)
    share = {}
    for by in ("popularity", "uniform"):
        draw = Negatives(SHELF, counts, (), count=1, by=by)
        share[by] = np.mean([SHELF[79] in draw.contest(LISTS[0], epoch).candidates for epoch in range(400)])
    assert 0.4 < share["popularity"] < 0.75
    assert share["uniform"] < 0.05


@pytest.mark.parametrize("source", SOURCES)
def test_where_nothing_was_mined_the_hardest_are_drawn_uniformly(source):
    """So that a model is measured on the same contests by the run that tuned it and by the command."""
    hardest, uniform = (negatives(by=by, source=source, count=2) for by in ("hardest", "uniform"))
    assert all(repr(hardest.contest(one, 0)) == repr(uniform.contest(one, 0)) for one in LISTS if hardest.usable(one))


def test_the_hardest_are_those_that_were_mined():
    draw = negatives(by="hardest", count=2)
    one = LISTS[0]
    pool = draw.pool(one, 0)
    assert len(pool) == 8
    draw.mined[one.list_id] = pool[5:7]
    shown = draw.contest(one, 0).candidates
    assert {item.index for item in pool[5:7]} < {item.index for item in shown}
    assert len(shown) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "luck"}, "--negatives 'luck'; expected one of uniform, popularity, hardest"),
        ({"source": "thin air"}, "--negatives_from 'thin air'; expected one of catalogue, candidates"),
        ({"count": 0}, "--num_negatives 0 is too few"),
        ({"count": 70}, "--num_negatives 70 is too many"),
    ],
)
def test_impossible_draws_are_refused(options, said):
    with pytest.raises(AlroFastError, match=said):
        negatives(**options)
