"""A stranger's chat template costs seconds, not hours, and no memory of ours."""

from __future__ import annotations

import os
import time

import pytest
from tiny import CHAT, chat_tokenizer

from alro_fast.errors import AlroFastError
from alro_fast.prompts.bounded import bounded
from alro_fast.prompts.encoding import Encoder
from alro_fast.prompts.turns import find_turns


def test_a_text_comes_back_as_it_is():
    assert bounded(lambda: "é\n" * 1000) == "é\n" * 1000
    assert bounded(lambda: "") == ""
    with pytest.raises(ValueError, match=r"^no$"):
        bounded(_raises)


def _raises() -> str:
    raise TypeError("no")


def test_nothing_of_it_happens_here():
    before = os.getpid()
    assert bounded(lambda: str(os.getpid())) != str(before)


@pytest.mark.parametrize(
    "hostile",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ ('a' * 10 ** 9) | length }}",
        "{% set x = range(99999) | list * 100000 %}",  # more than the process may hold free from before
    ],
)
def test_a_template_that_never_ends_is_stopped(hostile):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = hostile + CHAT
    start = time.monotonic()
    with pytest.raises(AlroFastError, match="chat template of tokenizer 'test-bytes' cannot be rendered: it took more"):
        find_turns(Encoder(tokenizer), "")
    assert time.monotonic() - start < 25  # of a busy machine; two seconds of computing


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ 1 / 0 }}", "division by zero"), ("{% bad", "unknown tag"), ("{{ raise_exception('no') }}", "no$")],
)
def test_what_a_template_raises_is_told(template, said):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(AlroFastError, match=f"cannot be rendered: .*{said}"):
        find_turns(Encoder(tokenizer), "")
