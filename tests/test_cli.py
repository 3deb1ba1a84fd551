"""What a command's failure looks like: one line, a status, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alro_fast.cli import OneLineParser, run
from alro_fast.errors import AlroFastError


def outcome(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        run(main, [])
    return stopped.value.code, capsys.readouterr().err


def test_files_that_cannot_be_used(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for fails, path, reason in (
        (Path.read_text, tmp_path / "none", "No such file or directory"),
        (Path.read_text, file / "below", "Not a directory"),
        (Path.mkdir, file, "File exists"),
    ):
        assert outcome(lambda _, fails=fails, path=path: fails(path), capsys) == (2, f"error: {path}: {reason}\n")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
        (OSError("several lines\n  of a library"), 2, "error: several lines of a library\n"),
        (AlroFastError("wrong"), 2, "error: wrong\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_one_line_and_a_status(capsys, error, status, line):
    def main(_):
        raise error

    assert outcome(main, capsys) == (status, line)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda _: 1 / 0, [])


def test_options_are_written_in_full():
    parser = OneLineParser(prog="p")
    parser.add_argument("--shuffles", type=int)
    assert parser.parse_args(["--shuffles", "3"]).shuffles == 3
    with pytest.raises(
        AlroFastError,
        match=r"^unrecognized arguments: --shuff 3 \(did you mean --shuffles\?\); p --help lists the options$",
    ):
        parser.parse_args(["--shuff", "3"])


def shell(words: str, **more) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which $PYTHON is this Python."""
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(["bash", "-c", words], env=environment, capture_output=True, text=True, timeout=60, **more)


HELP = "$PYTHON -m alro_fast.cli --help"


@pytest.mark.parametrize(
    "words, status, line",
    [
        (f"{HELP} | true; exit ${{PIPESTATUS[0]}}", 141, ""),
        (f"{HELP} >/dev/full", 2, "error: [Errno 28] No space left on device\n"),
        ("$PYTHON -m alro_fast.cli rank --help >/dev/full", 2, "error: [Errno 28] No space left on device\n"),
        (f"{HELP} >&-", 2, "error: standard output is closed; give it a reader, or send it to a file\n"),
        ("$PYTHON -m alro_fast.rank --adapter . <&-", 2, "error: standard input is empty"),
        ("$PYTHON -m alro_fast.cli nonsense 2>&-", 2, ""),
        ("$PYTHON -m alro_fast tran", 2, "error: unknown command 'tran'; did you mean train?\n"),
        ("$PYTHON -m alro_fast.cli tran", 2, "error: unknown command 'tran'; did you mean train?\n"),
        ("$PYTHON -m alro_fast.cli --hlep", 2, "error: unknown command '--hlep'; did you mean --help?\n"),
        ("$PYTHON -m alro_fast.rank --adapter x --shufles", 2, "error: unrecognized arguments: --shufles (did you"),
    ],
)
def test_streams_and_starts(words, status, line):
    done = shell(words)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == bool(line)


@pytest.mark.parametrize(
    "words", ["alro_fast.cli train", "alro_fast.train", "alro_fast.report run", "alro_fast.evaluate"]
)
def test_an_interrupt_while_libraries_load(tmp_path, words):
    (tmp_path / "polars.py").write_text("raise KeyboardInterrupt")
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = shell(f"PYTHONPATH={tmp_path}:$PYTHONPATH $PYTHON -m {words}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
