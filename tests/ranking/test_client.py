"""The client command: options checked first, lists in, the server's rankings out."""

from __future__ import annotations

import json

import pytest
from completions import serving
from tiny import make_run

from alro_fast import client
from alro_fast.errors import AlroFastError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--parallel 0", "parallel is above 0; given 0"),
        ("--seed -1", "seed is at least 0; given -1"),
        ("--shuffles 0", "shuffles is at least 1; given 0"),
        ("--top_k 0", "--top_k is at least 1; given 0"),
        ("--top_k -1", "--top_k is at least 1; given -1"),
    ],
)
def test_bad_options_are_one_line(tmp_path, words, said):
    (tmp_path / "lists.json").write_text('{"candidates": [{"title": "One"}]}')
    options = f"--adapter {make_run(tmp_path)} --url http://127.0.0.1:9 --model m {tmp_path / 'lists.json'} {words}"
    with pytest.raises(AlroFastError, match=said):
        client.main(options.split())


def test_the_command(tmp_path, capsys):
    document = {"history": [], "candidates": [{"id": 1, "title": "One"}, {"title": "Two"}]}
    (tmp_path / "lists.json").write_text(json.dumps(document), encoding="utf-8")
    with serving() as server:
        words = (
            f"--adapter {make_run(tmp_path)} --url {server.url} --model tuned {tmp_path / 'lists.json'} --shuffles 2"
        )
        client.main(words.split())
    line = json.loads(capsys.readouterr().out)
    assert {entry["title"] for entry in line["ranking"]} == {"One", "Two"}
    assert len(server.requests) == 2
