"""Valid files made hostile: bytes, lines, fields and JSON values changed by a seeded hand."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

TOKENS = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"\xc3", b"\r", b"\n", b'"', b"'", b",", b":", b"::", b"|"),
    *(b"nan", b"inf", b"-1", b"1e999", b"1e308", b"9" * 400, b"9" * 5000, b"0x10", b"null", b"true", b"[", b"{", b"}"),
    *(b"{{", b"}}", b"{t}", b"{x!r}", b"{0.__class__}", b"{% for i in range(10**9) %}x{% endfor %}", b"{{ 9**9**9 }}"),
    *(b"&a [*a, *a]", b"\t", b"*a", b"!!python/object/apply:os.getcwd []", b"? ", b"- ", b"%YAML 9", b"\\u0000"),
    *(b"<<: *a", b"\\ud800", "\u202e".encode(), "\u2028".encode(), b"../../etc/passwd", b"[" * 3000, b"{\"a\":" * 3000),
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.5, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "\0",
        "\ud800",
        "\u202e",
        "a" * 20_000,
        "../..",
        "{title}",
        "{{ 9**9 }}",
    ),
    *([], {}, [[]], [None], [1, "a"], {"a": 1}, {"": None}, [{}] * 50),
)


def mutated(draw: random.Random, content: bytes) -> bytes:
    """One to four changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        content = draw.choice((_bytes, _bytes, _lines, _values, _values))(draw, content)
    return content


def _bytes(draw: random.Random, content: bytes) -> bytes:
    at, until = sorted(draw.choices(range(len(content) + 1), k=2))
    kind = draw.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[min(until, at + draw.randint(1, 30)) :]
    if kind == 2:
        return content[:at] + draw.choice(TOKENS) + content[at:]
    if kind == 3:
        return content[:at] + draw.randbytes(draw.randint(1, 20)) + content[at:]
    if kind == 4:
        return content[:until] + content[at:until][:1000] + content[until:]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 30))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _lines(draw: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(5)
    if kind == 0:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 1:
        del lines[one]
    elif kind == 2:
        lines[one:one] = [lines[one]] * draw.choice((1, 3, 300))
    elif kind == 3:
        lines[one] = b""
    else:
        separator = draw.choice((b",", b"::", b"|", b"\t", b": ", b" "))
        cells = lines[one].split(separator)
        cells[draw.randrange(len(cells))] = draw.choice((b"", *TOKENS, *lines[other].split(separator)))
        lines[one] = separator.join(cells)
    return b"\n".join(lines)


def _values(draw: random.Random, content: bytes) -> bytes:
    """A value within a JSON text, or within one of its lines; what is no JSON, by bytes."""
    whole = _json(content)
    if whole is not None:
        return _text(draw, _changed(draw, whole))
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    value = _json(lines[at])
    if not isinstance(value, dict | list):
        return _bytes(draw, content)
    lines[at] = _text(draw, _changed(draw, value))
    return b"\n".join(lines)


def _json(content: bytes) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(content)
    return None


def _text(draw: random.Random, value: Any) -> bytes:
    with contextlib.suppress(ValueError):
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
        if draw.random() < 0.1 and text.startswith("{"):
            text = '{"history": 1, "files": {}, ' + text[1:]
        return text.encode(errors="surrogatepass")
    return b"9" * 5000  # a number that Python writes no more


def _changed(draw: random.Random, value: Any) -> Any:
    """The value with another at a random place within, or without one of its parts."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice((*VALUES, _deep(draw, value)))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    kind = draw.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.15 and isinstance(value, dict):
        value[draw.choice(("", "x", "__class__", str(key) + "s", "a" * 300))] = value.pop(key)
    elif kind < 0.2:
        other = draw.choice(keys)
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = _changed(draw, value[key])
    return value


def _deep(draw: random.Random, value: Any) -> Any:
    for _ in range(draw.choice((3, 60, 400))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value
