"""What the folder of a run may hold, and where one can be made."""

from __future__ import annotations

import pytest

from alro_fast.data.lists import check_output_folder
from alro_fast.errors import AlroFastError
from alro_fast.run_folder import adapter_config, check_writable, contents, run_options
from alro_fast.training.checks.folders import begun, claim_folder
from alro_fast.training.config import parse


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


def test_what_a_kill_left_of_a_check_is_in_nobodys_way(tmp_path):
    """A folder that holds nothing else is empty, and one of a run that prepared its lists has yet to be begun."""
    (tmp_path / ".alro_fast-abcd").mkdir()
    (tmp_path / "study" / ".alro_fast-abcd").mkdir(parents=True)
    config = parse(["--output_dir", str(tmp_path), "--use_cpu", "true"])
    claim_folder(config, tmp_path / "study")
    check_output_folder(tmp_path / "study")
    run = tmp_path / "run"
    (run / ".data-abcd").mkdir(parents=True)
    (run / "config.yaml").write_text("alro_fast_version: 0\n")
    assert contents(run) == {"config.yaml"}
    assert not begun(run)
    claim_folder(config, run)
    (run / "notes.txt").touch()
    with pytest.raises(AlroFastError, match="holds an earlier run"):
        claim_folder(config, run)


@pytest.mark.parametrize("text", [b"answer: [", b"- a", b"", b"\xff\xfe"])
def test_damaged_records_are_one_line(tmp_path, text):
    assert run_options(tmp_path) == {}
    for name, read in (("config.yaml", run_options), ("adapter_config.json", adapter_config)):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(AlroFastError, match=f"{name} is damaged: expected .*; restore the file"):
            read(tmp_path)
