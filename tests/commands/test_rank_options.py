"""Every option of rank changes the run, or is refused.

A row for each option: words that set the stage, and words that give the option another value than its default. An
option of a command that has no row fails, and so does one with a `Reader` that no row sees refused.
"""

from __future__ import annotations

import pytest
from option_rows import RANK_READ, RANK_REFUSED, Read, check_refusal, options_of, refusal

from alro_fast import evaluate, rank
from alro_fast.ranking.options import FUSE_READERS, MODEL_READERS, READERS, TASK_METHODS


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
    assert {row.option for row in RANK_REFUSED} == READERS.keys() | MODEL_READERS.keys() | FUSE_READERS.keys()
