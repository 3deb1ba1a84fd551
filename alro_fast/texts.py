"""Text files as users bring them: read with a bound, decoded, and parsed without surprises.

YAML and JSON as `yaml.safe_load` and `json.loads` have them, but for what nobody means: a key twice, of which the
libraries keep the last without a word; nesting and references that unfold to more than a machine holds. Everything
raises AlroFastError with a reason that begins with the name of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .errors import AlroFastError

MOST_BYTES = 1 << 20  # of a file that people or runs write: a configuration, a study, a record
MOST_RECORD = 1 << 28  # of one that a run writes, with a token or a step a line
MOST_YAML = 1 << 18  # characters; pure Python reads them in seconds
MOST_NODES = 100_000  # of a YAML document, each reference counted as what it stands for
MOST_LEVELS = 50
_UNSEEN = re.compile(  # control characters but tab, marks that turn the direction of text, separators, lone surrogates
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_PIPES: dict[str, bytes] = {}  # what a pipe held, which can be read once


def printable(text: str) -> str:
    """`text` for a line of a terminal, with escapes for what would move its cursor, change its colours or break it."""
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def json_line(value: Any) -> str:
    """A JSON text on one line, with JSON's escapes for what `printable` escapes. ValueError for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_file(path: str | Path) -> bool:
    """Whether there is something to read at `path`: a file, or a pipe as a shell's <(...) makes one."""
    try:
        return Path(path).exists() and not Path(path).is_dir()
    except (OSError, ValueError):  # a name too long, or with a null character
        return False


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a file of at most `most` bytes, UTF-8."""
    return decoded(read_bytes(path, most), str(path))


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file of at most `most` bytes; a pipe is read once, and remembered."""
    path = Path(path)
    content = _PIPES.get(str(path))
    if content is None:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if not path.is_file() and len(content) <= most:
            _PIPES[str(path)] = content
    if len(content) > most:
        raise AlroFastError(f"{path} is larger than {most:,} bytes, as no file of its kind is")
    return content


def decoded(content: bytes, name: str) -> str:
    """Bytes of UTF-8 as text, without the mark that some editors begin it with; other encodings are named."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise AlroFastError(f"{name} is {encoding_of(content[:64])}") from None


def encoding_of(head: bytes) -> str:
    """What bytes are that are no UTF-8, and what to do, for an error."""
    return packed_or_wide(head) or "not UTF-8 text"


def packed_or_wide(head: bytes) -> str | None:
    """What a file is, and what to do, where its first bytes say that it is UTF-16 or gzip; else None."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 text, as some programs of Windows write it; save it as UTF-8"
    if head.startswith(b"\x1f\x8b"):
        return "packed by gzip; unpack it"
    return None


def from_json(text: str, name: str) -> Any:
    """A JSON value."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise AlroFastError(f"{name} is not JSON: {error}") from None
    except RepeatedKey as error:
        raise AlroFastError(f"{name} has the key {error.args[0]!r:.80} twice; leave one out") from None
    except ValueError:  # whole numbers of more digits than Python converts
        raise AlroFastError(f"{name} holds a number of thousands of digits") from None
    except RecursionError:
        raise AlroFastError(f"{name} is nested too deeply") from None


def read_json(path: str | Path, most: int = MOST_RECORD) -> Any:
    """The JSON value of a file that a run wrote, of at most `most` bytes; what is wrong with it is said as damage."""
    name = f"{path} is damaged: it"
    return from_json(decoded(read_bytes(path, most), name), name)


def from_yaml(text: str, name: str) -> Any:
    """What a YAML document holds, of plain types."""
    if len(text) > MOST_YAML:
        raise AlroFastError(f"{name} has more than {MOST_YAML:,} characters, as no YAML file here does")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except _TooMuch as error:
        raise AlroFastError(f"{name} {error}") from None
    except RepeatedKey as error:
        raise AlroFastError(f"{name} has the key {error.args[0]!r:.80} twice; leave one out") from None
    except RecursionError:
        raise AlroFastError(f"{name} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date or a number that is none
        reason = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        raise AlroFastError(f"{name} is not valid YAML ({place}{reason})") from None


class RepeatedKey(Exception):
    """A key that a mapping has twice."""


class _TooMuch(Exception):
    """More than a document holds that somebody wrote."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `json.loads(object_pairs_hook=once)` takes it; RepeatedKey for a key that it has twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RepeatedKey(name)
        found[name] = value
    return found


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader within MOST_LEVELS, and no key twice in a mapping; one of `<<` may be written again."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MOST_LEVELS:
            raise _TooMuch(f"is nested deeper than {MOST_LEVELS} levels")
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) >= MOST_LEVELS:
            raise _TooMuch(f"is nested deeper than {MOST_LEVELS} levels")
        return super().add_indent(column)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in seen:
                    raise RepeatedKey(key)
                seen.add(key)
        return super().construct_mapping(node, deep)


def _check_size(node: yaml.Node) -> None:
    """_TooMuch for a document of more than MOST_NODES, each as often as it is referred to, or beyond MOST_LEVELS."""
    left, stack = MOST_NODES, [(node, 1)]
    while stack:
        at, level = stack.pop()
        left -= 1
        if level > MOST_LEVELS:
            raise _TooMuch(f"is nested deeper than {MOST_LEVELS} levels, or refers to itself")
        if left < 0:
            raise _TooMuch(f"holds more than {MOST_NODES:,} values, its references written out")
        if isinstance(at, yaml.MappingNode):
            stack += [(each, level + 1) for pair in at.value for each in pair]
        elif isinstance(at, yaml.SequenceNode):
            stack += [(each, level + 1) for each in at.value]
