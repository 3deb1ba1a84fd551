"""A served model: what is sent, what is read, and `Ranker`'s rankings on the same logits."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from completions import MODEL, serving
from tiny import byte_tokenizer, make_run, random_lists

from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder
from alro_fast.ranking.ranker import Ranker
from alro_fast.ranking.served import RankingClient, read_logprobs

TOKENIZER = byte_tokenizer()
PROMPTS = PromptBuilder(TOKENIZER, "movies")


@pytest.fixture
def server():
    with serving() as server:
        yield server


def test_what_is_sent(server):
    entry = random_lists(1, 4)[0]
    list(RankingClient(server.url + "/v1/", "tuned", PROMPTS, api_key="k").stream([entry]))
    ((path, headers, body),) = server.requests
    prompt = PROMPTS.ranking(entry)
    assert path == "/v1/completions"
    assert headers["Authorization"] == "Bearer k"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "model": "tuned",
        "prompt": prompt.prompt_ids,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 4,
        "allowed_token_ids": prompt.candidate_ids,
        "logprob_token_ids": prompt.candidate_ids,
        "return_tokens_as_token_ids": True,
    }


@pytest.mark.parametrize("style", ["logprob_token_ids", "processed"])
def test_rankings_equal_those_of_the_ranker(server, style):
    server.style = style
    lists = [*random_lists(5, range(1, 9)), *random_lists(1, 60, seed=1)]
    options = {"shuffles": 2, "seed": 5, "merge_by": "mean"}
    found = list(RankingClient(server.url, "tuned", PROMPTS, parallel=2).stream(lists, **options))
    for one, two in zip(found, Ranker(MODEL, TOKENIZER, PROMPTS).rank(lists, **options), strict=True):
        assert one.list_id == two.list_id
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)
        assert one.order == two.order
        assert np.array_equal(one.presented, two.presented)


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("raw", r"left out the log-probabilities of \d of 6 identifiers; start it with --max-logprobs 52"),
        ("refuses", "answered 400: requested 60 logprobs, maximum is 20$"),
        ("text", "names tokens by text"),
        ("chat", "holds no log-probabilities"),
        ("html", "did not answer with JSON"),
        ("breaks off", r"broke off its answer or speaks no HTTP \(IncompleteRead"),
        ("no HTTP", r"broke off its answer or speaks no HTTP \(BadStatusLine: 220 mail ready\)"),
        ("NaN", r"list l0: .* gave log-probabilities that are no numbers \(NaN\)"),
    ],
)
def test_a_server_that_does_not_serve(server, style, message):
    server.style = style
    with pytest.raises(AlroFastError, match=message):
        list(RankingClient(server.url, "tuned", PROMPTS).stream(random_lists(2, 6)))


def test_a_server_that_drips_or_never_ends(server):
    server.style = "drips"
    start = time.monotonic()
    with pytest.raises(AlroFastError, match="cannot be reached: its answer did not end in time"):
        list(RankingClient(server.url, "tuned", PROMPTS, timeout=0.5).stream(random_lists(1, 3)))
    assert time.monotonic() - start < 5
    server.style = "never ends"
    with pytest.raises(AlroFastError, match="answer is longer than 16 MiB"):
        list(RankingClient(server.url, "tuned", PROMPTS).stream(random_lists(1, 3)))


@pytest.mark.parametrize("style", ["drips its head", "drips a complaint"])
def test_the_time_is_for_head_and_complaint_too(server, style):
    server.style = style
    start = time.monotonic()
    with pytest.raises(AlroFastError, match=r"did not end in time|answered 500: and broke off"):
        list(RankingClient(server.url, "tuned", PROMPTS, timeout=0.5).stream(random_lists(1, 3)))
    assert time.monotonic() - start < 5


def test_the_key_is_for_one_server(server):
    server.style = "redirects"
    with pytest.raises(AlroFastError, match="answered 302"):
        list(RankingClient(server.url, "tuned", PROMPTS, api_key="secret").stream(random_lists(1, 3)))
    assert len(server.requests) == 1
    for key in ("se\ncret", "sécret", ""):
        with pytest.raises(AlroFastError) as refused:
            RankingClient(server.url, "tuned", PROMPTS, api_key=key)
        assert "cret" not in str(refused.value)


def test_no_server_and_bad_options():
    client = RankingClient("http://127.0.0.1:9", "tuned", PROMPTS)
    with pytest.raises(AlroFastError, match="cannot be reached"):
        list(client.stream(random_lists(1, 3)))
    with pytest.raises(AlroFastError, match="shuffles is at least 1"):
        list(client.stream([], shuffles=0))
    with pytest.raises(AlroFastError, match="unknown merge"):
        list(client.stream([], merge_by="vote"))
    with pytest.raises(AlroFastError, match="seed is at least 0; given -1"):
        list(client.stream([], seed=-1))
    with pytest.raises(AlroFastError, match="parallel is above 0; given 0"):
        RankingClient("http://127.0.0.1:9", "tuned", PROMPTS, parallel=0)


def test_a_recorded_answer_is_read():
    """The shape of vLLM's answer to such a request, ids as it writes them."""
    recorded = json.loads(
        '{"id":"cmpl-8f0c","object":"text_completion","created":1763600000,"model":"tuned","choices":[{"index":0,'
        '"text":" B","logprobs":{"text_offset":[0],"token_logprobs":[-0.31],"tokens":["token_id:425"],"top_logprobs":'
        '[{"token_id:425":-0.31,"token_id:362":-1.42,"token_id:356":-4.5}]},"finish_reason":"length","stop_reason":null,'
        '"prompt_logprobs":null}],"usage":{"prompt_tokens":211,"total_tokens":212,"completion_tokens":1}}'
    )
    assert read_logprobs(recorded) == {425: -0.31, 362: -1.42, 356: -4.5}


def test_runs_that_cannot_be_served(tmp_path):
    make_run(tmp_path)
    with pytest.raises(AlroFastError, match="no such folder"):
        RankingClient.load(tmp_path / "missing", "http://127.0.0.1:9", "tuned")
    (tmp_path / "run" / "config.yaml").write_text("answer: ratings")
    with pytest.raises(AlroFastError, match="tuned to answer with grades"):
        RankingClient.load(tmp_path / "run", "http://127.0.0.1:9", "tuned")
    for options, said in (
        ("objective: recranker", "tuned on the three tasks of recranker, which the client does not ask"),
        ("objective: dmpo\npreference_answer: titles", "tuned on answers that are titles"),
        ("objective: sft_chosen", "tuned on answers that are titles"),
    ):
        (tmp_path / "run" / "config.yaml").write_text(options)
        with pytest.raises(AlroFastError, match=said) as raised:
            RankingClient.load(tmp_path / "run", "http://127.0.0.1:9", "tuned")
        assert "\n" not in str(raised.value)
