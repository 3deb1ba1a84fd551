"""Texts of users: bounded, decoded, no key twice, and shown without what a terminal would act on."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from alro_fast.errors import AlroFastError
from alro_fast.texts import (
    MOST_LEVELS,
    MOST_YAML,
    decoded,
    from_json,
    from_yaml,
    is_file,
    json_line,
    printable,
    read_bytes,
    read_text,
)

BOMB = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))


def test_what_a_terminal_would_act_on_is_escaped():
    assert printable("Amélie (2001) 東京 🎬\tä") == "Amélie (2001) 東京 🎬\tä"
    assert printable("\x1b[31mred\x07\x9b1m\r\n\u202e\u2028\ud800") == (
        "\\x1b[31mred\\x07\\x9b1m\\r\\n\\u202e\\u2028\\ud800"
    )
    value = {"title": "\x1b]0;owned\x07 \x9b \u202e é \x7f"}
    line = json_line(value)
    assert line.isprintable()
    assert json.loads(line) == value
    assert "é" in line


def test_a_text_is_utf8(tmp_path):
    assert decoded(b"\xef\xbb\xbfa", "x") == "a"
    for content, said in (
        ("a".encode("utf-16"), "x is UTF-16 text, .*; save it as UTF-8"),
        ("a".encode("utf-16-le") + b"\xff", "x is not UTF-8 text"),
        (b"\x1f\x8b\x08", "x is packed by gzip; unpack it"),
    ):
        with pytest.raises(AlroFastError, match=said):
            decoded(content, "x")
    (tmp_path / "a").write_text("abcd")
    assert read_text(tmp_path / "a", 4) == "abcd"
    with pytest.raises(AlroFastError, match="larger than 3 bytes"):
        read_text(tmp_path / "a", 3)
    assert is_file(tmp_path / "a")
    assert not any(map(is_file, (tmp_path, tmp_path / "b", "a\0b", "x" * 5000)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_read_once_and_remembered(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("alpha: 1"))
    writer.start()
    assert is_file(pipe)
    assert read_text(pipe) == "alpha: 1"
    writer.join()
    assert read_bytes(pipe) == b"alpha: 1"


def test_yaml_is_what_safe_load_has_but_no_key_twice():
    text = "a: [1, 2.5, x, null, true]\nb: {c: d}\ne: &e {f: 1}\ng: {<<: *e, f: 2}\n"
    assert from_yaml(text, "x") == {
        "a": [1, 2.5, "x", None, True], "b": {"c": "d"}, "e": {"f": 1}, "g": {"f": 2}
    }  # fmt: skip
    assert from_yaml("", "x") is None
    for twice in ("a: 1\na: 2", "b: [{a: 1, a: 2}]", "1: 1\n1: 2"):
        with pytest.raises(AlroFastError, match=r"x has the key .* twice; leave one out"):
            from_yaml(twice, "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "is nested deeper than"),
        ("- " * 100_000, "is nested deeper than"),
        ("a: &a [*a]", "is nested deeper than 50 levels, or refers to itself"),
        (
            "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)),
            "holds more than 100,000 values",
        ),
        ("#" * (MOST_YAML + 1), "has more than 262,144 characters"),
        ("a: [", r"is not valid YAML \(line 1: "),
        ("!!python/object/apply:os.mkdir [x]", "is not valid YAML"),
        ("a: 2024-13-45", r"is not valid YAML \(month must be in 1..12\)"),
        ("a: \0", "is not valid YAML"),
    ],
)
def test_yaml_that_nobody_writes(text, said):
    start = time.monotonic()
    with pytest.raises(AlroFastError, match=f"^x {said}") as refused:
        from_yaml(text, "x")
    assert "\n" not in str(refused.value)
    assert time.monotonic() - start < 5


def test_levels_below_the_limit_are_read():
    value = from_yaml("[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1), "x")
    assert json.dumps(value) == "[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('[{"b": {"a": 1, "a": 2}}]', "has the key 'a' twice"),
        ("9" * 5000, "holds a number of thousands of digits"),
        ("{", "is not JSON"),
    ],
)
def test_json_that_nobody_writes(text, said):
    with pytest.raises(AlroFastError, match=f"^x {said}"):
        from_json(text, "x")
    assert from_json('{"a": {"a": [1, null]}}', "x") == {"a": {"a": [1, None]}}


def test_a_key_twice_is_found_in_time_that_grows_with_the_text():
    """Four megabytes, the last key repeated: counting every key among all takes minutes."""
    text = "{" + "".join(f'"{i}":1,' for i in range(400_000)) + '"399999":1}'
    start = time.monotonic()
    with pytest.raises(AlroFastError, match=r"^x has the key '399999' twice"):
        from_json(text, "x")
    assert time.monotonic() - start < 10
