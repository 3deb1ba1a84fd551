"""What the folder of a run may hold, and where one can be made."""

from __future__ import annotations

import pytest

from alro_fast.errors import AlroFastError
from alro_fast.run_folder import adapter_config, check_writable, run_options


def test_folders_that_can_be_written_are_left_as_they_are(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "below")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(AlroFastError, match=f"output folder {folder} cannot be written .{file} is a file.; choose"):
            check_writable(folder)
    with pytest.raises(AlroFastError, match=r"cannot be written .File name too long.; choose another"):
        check_writable(tmp_path / ("x" * 300))


@pytest.mark.parametrize("text", [b"answer: [", b"- a", b"", b"\xff\xfe"])
def test_damaged_records_are_one_line(tmp_path, text):
    assert run_options(tmp_path) == {}
    for name, read in (("config.yaml", run_options), ("adapter_config.json", adapter_config)):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(AlroFastError, match=f"{name} is damaged: expected .*; restore the file"):
            read(tmp_path)
