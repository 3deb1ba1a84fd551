"""A local server of completions, as vLLM answers them, from a tiny model."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import torch
from tiny import byte_tokenizer, tiny_llama

from alro_fast.ranking.decoding import ordinary_attention

MODEL = tiny_llama(len(byte_tokenizer()))


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
        if style == "redirects":
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/elsewhere")
            return self.end_headers()
        if style in ("drips its head", "drips a complaint"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: " if style == "drips its head" else b"HTTP/1.1 500 No\r\n\r\n")
            with suppress(OSError):
                for _ in range(600):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            return None
        if style == "breaks off":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            return self.wfile.write(b'{"choices"')
        if style in ("drips", "never ends"):
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # until the client hangs up
                for _ in range(600 if style == "drips" else 10**6):
                    self.wfile.write(b" " if style == "drips" else b" " * 2**20)
                    time.sleep(0.05 if style == "drips" else 0)
            return None
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


@contextmanager
def serving() -> Iterator[Server]:
    """A server at `url` for the length of the block."""
    server = Server(("127.0.0.1", 0), Handler)
    server.requests.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
