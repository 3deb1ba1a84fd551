"""The client against a local server: what is sent, what is read, and `Ranker`'s rankings on the same logits."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, make_run, random_lists, tiny_llama

from alro_fast import client as client_module
from alro_fast.errors import AlroFastError
from alro_fast.prompts import PromptBuilder
from alro_fast.ranking.decoding import ordinary_attention
from alro_fast.ranking.ranker import Ranker
from alro_fast.ranking.served import RankingClient, read_logprobs

TOKENIZER = byte_tokenizer()
PROMPTS = PromptBuilder(TOKENIZER, "movies")
MODEL = tiny_llama(len(TOKENIZER))


class Server(ThreadingHTTPServer):
    """Answers completions as vLLM does, from the tiny model. `style`: which of its log-probability rules applies."""

    style = "logprob_token_ids"
    requests: ClassVar[list] = []


class Handler(BaseHTTPRequestHandler):
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        style = self.server.style
        if style == "refuses":
            return self.reply(400, {"error": {"message": "requested 60 logprobs,\n maximum is 20"}})
        if style == "text":
            return self.reply(200, {"choices": [{"logprobs": {"top_logprobs": [{" A": -0.1}]}}]})
        if style == "chat":
            return self.reply(200, {"choices": [{"message": {"content": "A"}}]})
        if style == "html":
            return self.reply(200, "<html>")
        if style == "breaks off":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            return self.wfile.write(b'{"choices"')
        if style == "no HTTP":
            return self.wfile.write(b"220 mail ready\r\n")
        if style == "NaN":
            top = {f"token_id:{token}": math.nan for token in body["logprob_token_ids"]}
            return self.reply(200, {"choices": [{"logprobs": {"top_logprobs": [top]}}]})
        with self.lock, torch.no_grad(), ordinary_attention(MODEL.get_decoder()):
            logits = MODEL(torch.tensor([body["prompt"]])).logits[0, -1].double()
        if style == "processed":
            allowed = torch.full_like(logits, -torch.inf)
            allowed[body["allowed_token_ids"]] = logits[body["allowed_token_ids"]]
            logits = allowed
        logprobs = logits.log_softmax(-1)
        shown = logprobs.topk(body["logprobs"]).indices.tolist()
        if style == "logprob_token_ids":
            shown = body["logprob_token_ids"]
        top = {f"token_id:{token}": logprobs[token].item() for token in shown}
        return self.reply(200, {"choices": [{"index": 0, "text": " A", "logprobs": {"top_logprobs": [top]}}]})

    def reply(self, status, document):
        data = (document if isinstance(document, str) else json.dumps(document)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.requests.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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
        client_module.main(options.split())


def test_a_recorded_answer_is_read():
    """The shape of vLLM's answer to such a request, ids as it writes them."""
    recorded = json.loads(
        '{"id":"cmpl-8f0c","object":"text_completion","created":1763600000,"model":"tuned","choices":[{"index":0,'
        '"text":" B","logprobs":{"text_offset":[0],"token_logprobs":[-0.31],"tokens":["token_id:425"],"top_logprobs":'
        '[{"token_id:425":-0.31,"token_id:362":-1.42,"token_id:356":-4.5}]},"finish_reason":"length","stop_reason":null,'
        '"prompt_logprobs":null}],"usage":{"prompt_tokens":211,"total_tokens":212,"completion_tokens":1}}'
    )
    assert read_logprobs(recorded) == {425: -0.31, 362: -1.42, 356: -4.5}


def test_the_command(server, tmp_path, capsys):
    run = make_run(tmp_path)
    document = {"history": [], "candidates": [{"id": 1, "title": "One"}, {"title": "Two"}]}
    (tmp_path / "lists.json").write_text(json.dumps(document), encoding="utf-8")
    client_module.main(
        [
            "--adapter",
            str(run),
            "--url",
            server.url,
            "--model",
            "tuned",
            str(tmp_path / "lists.json"),
            "--shuffles",
            "2",
        ]
    )
    line = json.loads(capsys.readouterr().out)
    assert {entry["title"] for entry in line["ranking"]} == {"One", "Two"}
    assert len(server.requests) == 2
    with pytest.raises(AlroFastError, match="no such folder"):
        RankingClient.load(tmp_path / "missing", server.url, "tuned")
    (tmp_path / "config.yaml").write_text("answer: ratings")
    with pytest.raises(AlroFastError, match="tuned to answer with grades"):
        RankingClient.load(tmp_path, server.url, "tuned")
    for options, said in (
        ("objective: recranker", "tuned on the three tasks of recranker, which the client does not ask"),
        ("objective: dmpo\npreference_answer: titles", "tuned on answers that are titles"),
        ("objective: sft_chosen", "tuned on answers that are titles"),
    ):
        (tmp_path / "config.yaml").write_text(options)
        with pytest.raises(AlroFastError, match=said) as raised:
            RankingClient.load(tmp_path, server.url, "tuned")
        assert "\n" not in str(raised.value)
