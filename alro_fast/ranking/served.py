"""Rankings from a model behind an OpenAI-compatible completions server (docs/serving.md has the commands for vLLM).

Asks for one token per presented list, with the log-probabilities of the identifiers; renormalised over the candidates
they are the scores of `Ranker`'s method `first`. Prompts travel as token ids, so that nobody re-tokenises them.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import math
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..errors import AlroFastError
from ..run_folder import run_options
from .orders import Ranking, check_presentations, make_ranking, presentations, slide, unlabelled

if TYPE_CHECKING:
    from ..data.records import RankingList
    from ..prompts import PromptBuilder

LONGEST = 16 << 20  # bytes of an answer to one request: a token and its log-probabilities
MOST_PARALLEL = 1024
CHUNK = 64  # lists asked for before the first of them is returned


class RankingClient:
    """Rankings from the completions endpoint `<url>/v1/completions` of a server that holds the adapter as `model`.

    prompts: the run's prompt format, the same the adapter was trained with. parallel: requests in flight at once (the
    server batches them). timeout: seconds until a request is given up, from the first byte sent to the last received.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompts: PromptBuilder,
        *,
        api_key: str | None = None,
        parallel: int = 16,
        timeout: float = 60.0,
    ) -> None:
        for name, value in (("parallel", parallel), ("timeout", timeout)):
            if not value > 0:
                raise AlroFastError(f"{name} is above 0; given {value}")
        if not parallel <= MOST_PARALLEL or not timeout <= threading.TIMEOUT_MAX:
            raise AlroFastError(f"parallel is at most {MOST_PARALLEL}, and timeout {threading.TIMEOUT_MAX:.0f} seconds")
        if api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", api_key):
            raise AlroFastError("the API key holds a character that no header has; give the key alone")
        self.url, self.model, self.prompts = checked_url(url), model, prompts
        self.api_key, self.parallel, self.timeout = api_key, parallel, timeout

    @classmethod
    def load(cls, folder: str | Path, url: str, model: str, **options: Any) -> RankingClient:
        """A client with the tokenizer and the prompt format of a run's folder; no weights are read."""
        from transformers import AutoTokenizer

        from ..objectives.base import TEXTS, learned_answers
        from ..prompts import PromptBuilder

        if not Path(folder).is_dir():
            raise AlroFastError(f"{folder}: no such folder; expected one written by alro_fast.train")
        learned = learned_answers(run_options(folder))
        if learned == "tasks":
            raise AlroFastError(
                f"{folder} was tuned on the three tasks of recranker, which the client does not ask; rank with "
                "alro_fast.rank"
            )
        if learned in TEXTS:
            raise AlroFastError(
                f"{folder} was tuned on answers that are titles, and the client reads identifiers; measure it with "
                "alro_fast.evaluate"
            )
        if learned == "ratings":
            raise AlroFastError(
                f"{folder} was tuned to answer with grades, and the client reads identifiers; rank with alro_fast.rank"
            )
        try:  # never a folder's code, nor an offer to run it
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer("a")  # settings of the wrong type are met when a text is read
        except Exception as error:  # the tokenizers library raises nothing narrower for a file that is damaged
            raise AlroFastError(f"{folder}: no tokenizer could be loaded ({_reason(str(error))})") from None
        return cls(url, model, PromptBuilder.load(folder, tokenizer), **options)

    def stream(
        self, lists: Sequence[RankingList], *, shuffles: int = 1, merge_by: str = "mean", seed: int = 0
    ) -> Iterator[Ranking]:
        """Rankings in the order of `lists`: presentations, merging and windows as `Ranker.stream(method="first")`.

        Raises AlroFastError when the server cannot be reached, refuses, or leaves out an identifier.
        """
        check_presentations(shuffles, merge_by, seed)
        source = iter(lists)
        with ThreadPoolExecutor(self.parallel) as pool:

            def direct(entries: list[RankingList]) -> list[Ranking]:
                shown = [presentations(entry, shuffles, seed) for entry in entries]
                flat = [entry for entry, orders in zip(entries, shown, strict=True) for _ in orders]
                prompts = self.prompts.rankings(flat, [order.tolist() for orders in shown for order in orders])
                scores = pool.map(self._scores, flat, prompts)
                return [
                    make_ranking(entry, orders, np.stack(list(islice(scores, len(orders)))), merge_by)
                    for entry, orders in zip(entries, shown, strict=True)
                ]

            while chunk := [unlabelled(entry) for entry in islice(source, CHUNK)]:
                most = self.prompts.max_candidates
                short = iter(direct([entry for entry in chunk if len(entry.candidates) <= most]))
                long = iter(slide([entry for entry in chunk if len(entry.candidates) > most], most, direct))
                yield from (next(short if len(entry.candidates) <= most else long) for entry in chunk)

    def request(self, prompt_ids: Sequence[int], candidate_ids: Sequence[int]) -> dict[str, Any]:
        """The body asked with: one token, drawn from the identifiers, and their log-probabilities by token id.

        Servers that know `logprob_token_ids` return exactly those; others the `logprobs` best, which are the
        identifiers when log-probabilities are taken after `allowed_token_ids` applies.
        """
        return {
            "model": self.model,
            "prompt": list(prompt_ids),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": len(candidate_ids),
            "allowed_token_ids": list(candidate_ids),
            "logprob_token_ids": list(candidate_ids),
            "return_tokens_as_token_ids": True,
        }

    def _scores(self, entry: RankingList, prompt: Any) -> np.ndarray:
        start = [*prompt.prompt_ids, *prompt.answer_ids[: prompt.slot_offsets[0]]]
        found = read_logprobs(self._post(self.request(start, prompt.candidate_ids)))
        if any(map(math.isnan, found.values())):
            raise AlroFastError(
                f"list {entry.list_id}: {self.url} gave log-probabilities that are no numbers (NaN); does the server "
                "compute the model rightly?"
            )
        missing = [token for token in prompt.candidate_ids if not math.isfinite(found.get(token, -math.inf))]
        if missing:
            raise AlroFastError(
                f"list {entry.list_id}: {self.url} left out the log-probabilities of {len(missing)} of "
                f"{len(prompt.candidate_ids)} identifiers; start it with --max-logprobs {self.prompts.max_candidates} "
                "--logprobs-mode processed_logprobs"
            )
        scores = np.array([found[token] for token in prompt.candidate_ids])
        return scores - np.logaddexp.reduce(scores)

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return json.loads(_whole(response))
        except urllib.error.HTTPError as error:
            raise AlroFastError(f"{self.url} answered {error.code}: {_complaint(error)}") from None
        except http.client.HTTPException as error:
            raise AlroFastError(
                f"{self.url} broke off its answer or speaks no HTTP ({type(error).__name__}: {_reason(str(error))})"
            ) from None
        except OSError as error:  # also urllib's, and time that ran out
            raise AlroFastError(f"{self.url} cannot be reached: {getattr(error, 'reason', error)}") from None
        except (ValueError, RecursionError) as error:
            raise AlroFastError(f"{self.url} did not answer with JSON: {error}") from None


def checked_url(url: str) -> str:
    """The address of a server without its /v1; AlroFastError for what is none, or holds a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, fine = None, False
    if parts is None or not fine or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise AlroFastError(f"--url {url!r} is no address; expected one such as http://localhost:8000")
    if parts.username is not None or parts.password is not None:
        raise AlroFastError("--url holds a name or a password; give the address alone, and a key as --api_key")
    return url.rstrip("/").removesuffix("/v1")


def read_logprobs(response: Any) -> dict[int, float]:
    """{token id: log-probability} of the first generated token in a completions response."""
    try:
        top = response["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(name.removeprefix("token_id:")): float(value) for name, value in top.items()}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise AlroFastError(
            f"the server's answer holds no log-probabilities; is it a completions endpoint? {json.dumps(response)[:99]}"
        ) from None
    except ValueError:
        raise AlroFastError(
            "the server names tokens by text, which cannot tell identifiers apart from look-alikes; it must know "
            "return_tokens_as_token_ids (vLLM does)"
        ) from None


def _whole(response: Any) -> bytes:
    """The body; AlroFastError past LONGEST."""
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if sum(map(len, parts)) > LONGEST:
            raise AlroFastError(
                f"the server's answer is longer than {LONGEST >> 20} MiB; is it a completions endpoint?"
            )
    if response.length:  # what was announced and did not come
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _complaint(error: urllib.error.HTTPError) -> str:
    """What the body of an error says, as far as it comes."""
    try:
        return _reason(error.read(1 << 16).decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return "and broke off"


class _Until(io.RawIOBase):
    """What comes from a socket until a moment; TimeoutError then, however steadily it drips."""

    def __init__(self, sock: socket.socket, file: Any) -> None:
        self.sock, self.file = sock, file
        self.until = time.monotonic() + (sock.gettimeout() or threading.TIMEOUT_MAX)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("its answer did not end in time")
        self.sock.settimeout(left)
        try:
            return cast("int | None", self.file.readinto1(buffer))
        except TimeoutError:
            raise TimeoutError("its answer did not end in time") from None

    def close(self) -> None:
        self.file.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer whose head and body come before the timeout that its connection was opened with has passed."""

    def __init__(self, sock: socket.socket, *given: Any, **options: Any) -> None:
        super().__init__(sock, *given, **options)
        self.fp = io.BufferedReader(_Until(sock, self.fp))


class _Plain(http.client.HTTPConnection):
    response_class = _Response


class _Secure(http.client.HTTPSConnection):
    response_class = _Response


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Plain, request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Secure, request, context=_secured())


_secured = functools.cache(ssl.create_default_context)


class _Stay(urllib.request.HTTPRedirectHandler):
    """An answer that sends elsewhere is an error: the key, and the users' histories, are for one server."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Handler, _Stay)


def _reason(text: str) -> str:
    """What an error response says, on one line."""
    try:
        document = json.loads(text)
        said = document.get("message") or document["error"]["message"]
        text = said if isinstance(said, str) else text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:200]
