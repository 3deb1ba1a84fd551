"""Every option of client changes the run, or is refused.

A row for each option: words that set the stage, and words that give the option another value than its default. An
option of a command that has no row fails, and so does one with a `Reader` that no row sees refused.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from option_rows import Read, Refused, check_refusal, options_of, refusal

from alro_fast import client
from alro_fast.ranking.orders import Ranking

CLIENT_READ = [
    Read("adapter", "", "--adapter other"),
    Read("model", "", "--model other"),
    Read("url", "", "--url http://other"),
    Read("api_key", "", "--api_key k"),
    Read("parallel", "", "--parallel 2"),
    Read("timeout", "", "--timeout 2"),
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


def test_the_key_may_stand_in_the_environment(folder, served, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALRO_FAST_API_KEY", "secret")
    for words, key in (("", "secret"), ("--api_key other", "other")):
        served.clear()
        client.main(f"--adapter run --model tuned {words} lists.json".split())
        assert served[0][1]["api_key"] == key
        said = capsys.readouterr()
        assert "secret" not in said.out + said.err


def test_every_option_of_client_is_read(folder, served, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def outcome(words):
        served.clear()
        client.main(f"--adapter run --model tuned {words} lists.json".split())
        return served.copy(), capsys.readouterr().out

    assert {row.option for row in CLIENT_READ} == options_of(client) - {"on_error"}  # below
    for row in CLIENT_READ:
        assert outcome(row.stage) != outcome(f"{row.stage} {row.words}"), row


@pytest.mark.parametrize("row", CLIENT_REFUSED, ids=str)
def test_what_client_does_not_read_is_refused(folder, served, monkeypatch, capsys, row):
    monkeypatch.chdir(folder)
    check_refusal(client.main, row, f"--adapter run --model tuned {row.stage} {row.words} lists.json", capsys)
    assert served == []


def test_a_list_that_cannot_be_ranked_costs_a_line(folder, served, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    good = json.dumps({"candidates": [{"title": "A"}, {"title": "B"}]})
    (folder / "halved.jsonl").write_text(f"{good}\n{good[:20]}\n{good}\n")
    words = ["--adapter", "run", "--model", "tuned", "halved.jsonl"]
    assert "halved.jsonl, line 2 is not JSON" in refusal(client.main, " ".join(words), capsys)
    with pytest.raises(SystemExit) as ended:
        client.main([*words, "--on_error", "skip"])
    assert ended.value.code == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
