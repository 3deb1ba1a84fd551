"""What a command's failure looks like: one line, a status, no traceback."""

from __future__ import annotations

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
    with pytest.raises(AlroFastError, match=r"^unrecognized arguments: --shuff 3; p --help lists the options$"):
        parser.parse_args(["--shuff", "3"])
