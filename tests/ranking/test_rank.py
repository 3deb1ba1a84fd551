"""The rank command: JSON in, JSON lines out, one clear line for what cannot be ranked."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny import byte_tokenizer, catalogue, make_run, random_lists, save_base, tiny_llama

from alro_fast import rank
from alro_fast.cli import run
from alro_fast.data.lists import write_prepared
from alro_fast.data.records import RankingList
from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder, add_item_tokens
from alro_fast.ranking.documents import catalogue as catalogue_of
from alro_fast.ranking.documents import parse_list
from alro_fast.ranking.ranker import Ranker

HEAT = {
    "history": [{"title": "Heat", "category": "Crime", "rating": 4.5}, {"title": "Ran", "rating": 3}],
    "candidates": [
        {"id": 7, "title": "Casino", "category": "Crime"},
        {"title": "Clueless"},
        {"id": "x", "title": "Babe"},
    ],
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("rank"))


def ranked(capsys, adapter, documents, *options):
    """The command's output lines for a JSON text on standard input."""
    text = documents if isinstance(documents, str) else json.dumps(documents)
    sys.stdin, former = io.StringIO(text), sys.stdin
    try:
        rank.main(["--adapter", str(adapter), *options])
    finally:
        sys.stdin = former
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def test_orders_candidates_and_passes_ids_through(capsys, adapter):
    (line,) = ranked(capsys, adapter, HEAT | {"list_id": "first"})
    assert line["list_id"] == "first"
    assert [entry["rank"] for entry in line["ranking"]] == [1, 2, 3]
    shown = {(entry["id"], entry["title"]) for entry in line["ranking"]}
    assert shown == {(7, "Casino"), (None, "Clueless"), ("x", "Babe")}
    scores = [entry["score"] for entry in line["ranking"]]
    assert scores == sorted(scores, reverse=True)
    assert np.exp(scores).sum() == pytest.approx(1)
    direct = Ranker.load(adapter, device="cpu").rank([parse_list(HEAT, 1)])[0]
    assert scores == pytest.approx([direct.scores[i] for i in direct.order], abs=1e-6)


def test_what_the_ranker_does_not_take(adapter):
    with pytest.raises(AlroFastError, match=r"device x cannot be used here .*; give cpu"):
        Ranker.load(adapter, device="x")
    ranker = Ranker.load(adapter, device="cpu")
    one = parse_list(HEAT, 1)
    for given, options, said in (
        (one, {}, "lists is a RankingList; expected alro_fast.RankingList records in a sequence"),
        (5, {}, "lists is a int; expected"),
        ([one, HEAT], {}, "lists holds a dict at 1; expected"),
        ([one], {"beams": 3}, "beams is no option of method first"),
        ([one], {"beam": 3}, "unknown options beam; expected some of method, shuffles"),
    ):
        with pytest.raises(AlroFastError, match=said):
            ranker.rank(given, **options)
    assert len(ranker.rank([one], method="beam", beams=3)) == 1


def test_a_ranker_loads_without_a_word_and_leaves_the_libraries_as_they_were(adapter, capfd, recwarn):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    try:
        Ranker.load(adapter, device="cpu")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
    assert capfd.readouterr() == ("", "")
    assert not [one for one in recwarn if "is_gradient_checkpointing" in str(one.message)]


def test_one_list_an_array_and_json_lines_agree(capsys, adapter, tmp_path):
    other = {"candidates": [{"title": "Only"}]}
    (alone,) = ranked(capsys, adapter, HEAT, "--token_budget", "0")
    array = ranked(capsys, adapter, [HEAT, other], "--token_budget", "0")
    lines = ranked(capsys, adapter, json.dumps(HEAT) + "\n\n" + json.dumps(other) + "\n", "--token_budget", "0")
    assert array == lines
    assert array[0] == alone
    file = tmp_path / "lists.json"
    file.write_text(json.dumps([HEAT, other]), encoding="utf-8")
    rank.main(["--adapter", str(adapter), str(file), "--token_budget", "0", "--top_k", "1"])
    best = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["ranking"] for entry in best] == [entry["ranking"][:1] for entry in array]


def test_json_lines_end_where_they_end(capsys, adapter):
    """U+2028, U+2029 and U+0085 within a JSON text end no line."""
    titles = ["A\u2028B", "C\u2029D", "E\x85F"]
    line = json.dumps({"candidates": [{"title": title} for title in titles]}, ensure_ascii=False)
    found = ranked(capsys, adapter, f"{line}\n{line}\n")
    assert [sorted(entry["title"] for entry in one["ranking"]) for one in found] == [titles] * 2


def test_a_byte_order_mark_and_a_null_history_are_taken(capsys, adapter, tmp_path):
    document = {"candidates": HEAT["candidates"]}
    (expected,) = ranked(capsys, adapter, document)
    (tmp_path / "marked.json").write_text(json.dumps(document), encoding="utf-8-sig")
    rank.main(["--adapter", str(adapter), str(tmp_path / "marked.json")])
    assert json.loads(capsys.readouterr().out) == expected
    assert ranked(capsys, adapter, "\ufeff" + json.dumps(document | {"history": None})) == [expected]


def test_titles_may_repeat_and_history_may_be_empty(capsys, adapter):
    same = {"candidates": [{"title": "Twin"}, {"title": "Twin"}, {"id": 1, "title": "Twin"}], "history": []}
    (line,) = ranked(capsys, adapter, same)
    assert len(line["ranking"]) == 3


def test_keys_that_are_not_read_and_whole_characters_are_fine(capsys, adapter):
    labelled = json.dumps(
        {"user": 3, "user_id": 3, "candidates": [{"id": 1, "title": "\U0001f600", "rating": 4}, {"title": "B"}]}
    )
    assert "\\ud83d" in labelled  # both halves, as JSON writes them
    (line,) = ranked(capsys, adapter, labelled)
    assert {entry["title"] for entry in line["ranking"]} == {"\U0001f600", "B"}


@pytest.mark.parametrize("options", [("--method", "beam", "--beams", "2"), ("--shuffles", "3", "--merge", "kemeny")])
def test_options_reach_the_ranker(capsys, adapter, options):
    (line,) = ranked(capsys, adapter, HEAT, *options)
    assert [entry["score"] for entry in line["ranking"]] in ([-1.0, -2.0, -3.0], [0.0, -1.0, -2.0])


def test_long_lists_are_announced_and_ranked(capsys, adapter):
    long = {"candidates": [{"title": f"T{i}"} for i in range(60)]}
    sys.stdin, former = io.StringIO(json.dumps(long)), sys.stdin
    try:
        rank.main(["--adapter", str(adapter)])
    finally:
        sys.stdin = former
    printed = capsys.readouterr()
    assert "has more than 52 candidates: such lists are ranked by windows" in printed.err
    assert sorted(entry["title"] for entry in json.loads(printed.out)["ranking"]) == sorted(f"T{i}" for i in range(60))


def test_a_model_that_grades(capsys, tmp_path):
    (line,) = ranked(capsys, make_run(tmp_path, answer="ratings"), HEAT)
    scores = [entry["score"] for entry in line["ranking"]]
    assert 5 > scores[0] >= scores[1] >= scores[2] > 0.5
    with pytest.raises(AlroFastError, match="answers with grades"):
        ranked(capsys, tmp_path / "run", HEAT, "--method", "greedy")


def test_a_model_with_a_token_per_item(capsys, tmp_path):
    tokenizer, shelf = byte_tokenizer(), catalogue(9)
    add_item_tokens(tokenizer, len(shelf))
    save_base(tmp_path, tokenizer)
    prompts = PromptBuilder(tokenizer, "movies", identifiers="items", items=shelf)
    prompts.save(tmp_path)
    (tmp_path / "config.yaml").write_text("answer: ranking\ndata_dir: null\n")
    document = {
        "history": [{"id": "m8", "title": "h", "rating": 4}],
        "candidates": [{"id": f"m{i}", "title": "t"} for i in (5, 2, 7)],
    }
    with pytest.raises(AlroFastError, match=r"its prepared data .* is gone"):
        ranked(capsys, tmp_path, document)
    write_prepared(tmp_path / "data", shelf, {"test": random_lists(2, 3, history=2, items=9)})
    (line,) = ranked(capsys, tmp_path, document)
    stored = RankingList("1", "1", (shelf[8],), (4.0,), (shelf[5], shelf[2], shelf[7]), (1.0, 1.0, 1.0))
    direct = Ranker(tiny_llama(len(tokenizer)), tokenizer, prompts).rank([stored])[0]
    assert [entry["id"] for entry in line["ranking"]] == [stored.candidates[i].item_id for i in direct.order]
    assert [entry["score"] for entry in line["ranking"]] == pytest.approx(sorted(direct.scores)[::-1], abs=1e-5)
    catalogue_of.cache_clear()
    with pytest.raises(AlroFastError, match="candidates 1: id None is not in the catalogue"):
        ranked(capsys, tmp_path, {"candidates": [{"title": "new"}]})


def test_bad_input_is_one_clear_line_before_the_model_is_looked_for(capsys, monkeypatch):
    """tests/ranking/test_documents.py has what else is said of documents."""
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"candidates": []}'))
    with pytest.raises(SystemExit) as stopped:
        run(rank.main, ["--adapter", "nowhere"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("error: list 1: no candidates")
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_bad_options_and_folders(capsys, adapter, tmp_path):
    with pytest.raises(AlroFastError, match="unknown method 'random'"):
        ranked(capsys, adapter, HEAT, "--method", "random")
    for words, said in (
        ("--top_k 0", "--top_k is at least 1; given 0"),
        ("--top_k -1", "--top_k is at least 1; given -1"),
        ("--seed -1", "seed is at least 0; given -1"),
        ("--token_budget -5", "token_budget is at least 0; given -5"),
        ("--device foo", "--device foo cannot be used here"),
        ("--device cuda:99", "--device cuda:99 cannot be used here"),
    ):
        with pytest.raises(AlroFastError, match=said) as raised:
            ranked(capsys, adapter, HEAT, *words.split())
        assert "\n" not in str(raised.value)
    with pytest.raises(AlroFastError, match="no such folder"):
        ranked(capsys, tmp_path / "missing", HEAT)
    with pytest.raises(AlroFastError, match="no such file"):
        rank.main(["--adapter", str(adapter), str(tmp_path / "missing.json")])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AlroFastError, match="UTF-16 text"):
        rank.main(["--adapter", str(adapter), str(tmp_path / "binary")])
    save_base(tmp_path / "wide", hidden_size=64)
    with pytest.raises(AlroFastError, match="does not fit"):
        ranked(capsys, adapter, HEAT, "--base_model", str(tmp_path / "wide"))


def test_a_base_of_another_vocabulary_is_refused(capsys, adapter, tmp_path):
    """Weights that LoRA fits, with too few embeddings for the tokens of the prompts."""
    tokenizer = byte_tokenizer()
    tiny_llama(100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AlroFastError, match=f"100 token embeddings, and the tokenizer of .* {len(tokenizer)} tokens"):
        ranked(capsys, adapter, HEAT, "--base_model", str(tmp_path))


def test_a_folder_that_is_no_run_is_named_as_such(capsys, adapter, tmp_path):
    """`--model_name_or_path` is a flag of train: nothing here speaks of it."""
    empty, bare, gone = tmp_path / "empty", tmp_path / "bare", tmp_path / "gone"
    for folder in (empty, bare):
        folder.mkdir()
    (bare / "config.json").write_text("{}")
    shutil.copytree(adapter, gone)
    config = json.loads((gone / "adapter_config.json").read_text())
    (gone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")}))
    for folder, options, said in (
        (empty, (), f"{empty}: neither adapter_config.json nor config.json found"),
        (bare, (), f"{bare}: no tokenizer could be loaded"),
        (gone, (), f"{gone}: base model {tmp_path / 'base'}: no causal LM could be loaded"),
        (adapter, ("--base_model", str(empty)), f"--base_model {empty}: no causal LM could be loaded"),
    ):
        with pytest.raises(AlroFastError, match=re.escape(said)) as raised:
            ranked(capsys, folder, HEAT, *options)
        assert "--model_name_or_path" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "share", "said"),
    [
        ("adapter_model.safetensors", 0.5, "the adapter is damaged, or does not fit the base model"),
        ("adapter_model.safetensors", 0, "the adapter is damaged, or does not fit the base model"),
        ("adapter_config.json", 0.5, "adapter_config.json is damaged: expected what PEFT wrote"),
        ("config.yaml", 0, "config.yaml is damaged: expected the options that alro_fast.train recorded"),
        ("tokenizer.json", 0.5, "no tokenizer could be loaded"),
        ("identifiers.json", 0.5, "identifiers.json is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_one_line(capsys, adapter, tmp_path, name, share, said):
    run = tmp_path / "run"
    shutil.copytree(adapter, run)
    (run / name).write_bytes((run / name).read_bytes()[: int(share * (run / name).stat().st_size)])
    with pytest.raises(AlroFastError, match=re.escape(said)) as raised:
        ranked(capsys, run, HEAT)
    assert str(run) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_process_of_its_own_prints_no_traceback(adapter):
    done = subprocess.run(
        [sys.executable, "-m", "alro_fast.rank", "--adapter", str(adapter)], input="{}", capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: list 1: no candidates")
    assert done.stderr.count("\n") == 1
