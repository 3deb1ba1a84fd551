"""Every option of rank changes the run, or is refused.

A row for each option: words that set the stage, and words that give the option another value than its default. An
option of a command that has no row fails, and so does one with a `Reader` that no row sees refused.
"""

from __future__ import annotations

import json

import pytest
from option_rows import RANK_READ, RANK_REFUSED, Read, check_refusal, options_of, refusal

from alro_fast import evaluate, rank
from alro_fast.ranking.options import FUSE_READERS, MODEL_READERS, PASS_READERS, READERS, TASK_METHODS


def test_every_option_of_rank_is_read(folder, loads, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def outcome(words):
        loads.clear()
        rank.main([*words.split(), *(["lists.json"] if "--lists" not in words else [])])
        return loads.copy(), capsys.readouterr().out

    assert outcome("--adapter run") == outcome("--adapter run")  # else the rows would prove nothing
    rows = [
        *RANK_READ,
        Read("top_k", "--adapter run", "--top_k 2"),
        Read("lists", "--adapter run", "--lists data"),
        Read("split", "--adapter run --lists data", "--split valid"),
        Read("limit", "--adapter run --lists data", "--limit 1"),
    ]
    on_error = {"on_error"}  # test_a_list_that_cannot_be_ranked_ends_the_command_or_costs_a_line
    assert {row.option for row in rows} == options_of(rank) - on_error
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


def test_a_file_and_a_folder_of_lists_do_not_go_together(folder, loads, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for words, said in (
        ("--lists data lists.json", "both a file, lists.json, and --lists data are given; leave one out"),
        ("--limit 2 lists.json", "--limit is no option of a file of lists (it is read with --lists)"),
        ("--split valid lists.json", "--split is no option of a file of lists (it is read with --lists)"),
        ("--lists data --split all", "--split 'all': expected train, valid or test"),
        ("--lists data --limit 0", "--limit is at least 1; given 0"),
    ):
        assert said in refusal(rank.main, f"--adapter run {words}", capsys)
    assert loads == []


def test_a_list_that_cannot_be_ranked_ends_the_command_or_costs_a_line(folder, loads, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    good = [json.dumps({"list_id": n, "candidates": [{"title": "A"}, {"title": "B"}]}) for n in range(3)]
    (folder / "broken.jsonl").write_text("\n".join([good[0], "{", '{"candidates": []}', *good[1:]]) + "\n")
    assert "broken.jsonl, line 2 is not JSON" in refusal(rank.main, "--adapter run broken.jsonl", capsys)
    assert loads == []
    with pytest.raises(SystemExit) as ended:
        rank.main(["--adapter", "run", "--on_error", "skip", "broken.jsonl"])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert [json.loads(line)["list_id"] for line in said.out.splitlines()] == [0, 1, 2]
    assert said.err.count("; skipped\n") == 2
    assert "line 2 is not JSON" in said.err
    assert "list 3: no candidates" in said.err
    assert "2 lists were skipped" in said.err
    assert "--on_error 'go': expected one of stop, skip" in refusal(rank.main, "--adapter run --on_error go x", capsys)


def test_every_rank_reader_has_refused():
    assert {row.option for row in RANK_REFUSED} == (
        READERS.keys() | PASS_READERS.keys() | MODEL_READERS.keys() | FUSE_READERS.keys()
    )
