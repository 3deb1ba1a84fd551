"""Lists are answered while later ones are on their way, in a memory that does not grow with their number."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest
from tiny import make_run

from alro_fast.errors import AlroFastError
from alro_fast.ranking.documents import documents
from alro_fast.ranking.streams import Asked, Complaints, answers, in_chunks, read_lists

LIST = {"history": [{"title": "Heat", "rating": 4}], "candidates": [{"title": "Casino"}, {"title": "Clueless"}]}


def numbered(count):
    return (Asked(LIST | {"list_id": n}, n) for n in range(count))


def rank(entries):
    return [SimpleNamespace(order=(1, 0), scores=(0.0, float(entry))) for entry in entries]


def test_chunks_are_full_unless_the_input_pauses():
    assert list(map(len, in_chunks(range(10), 4, 5.0))) == [4, 4, 2]
    assert list(in_chunks([], 4, 5.0)) == []
    go = threading.Event()

    def typed():
        yield from (1, 2)
        go.wait(10)
        yield 3

    chunks = in_chunks(typed(), 4, 0.01)
    assert next(chunks) == [1, 2]  # before the third is there
    go.set()
    assert list(chunks) == [[3]]


def test_a_mistake_comes_after_what_was_read_before_it():
    def broken():
        yield from (1, 2)
        raise AlroFastError("no more")

    chunks = in_chunks(broken(), 4, 5.0)
    assert next(chunks) == [1, 2]
    with pytest.raises(AlroFastError, match="no more"):
        next(chunks)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_what_the_ranker_refuses_costs_its_own_list(on_error, capsys):
    def refuse(entries):
        if 70 in entries:
            raise AlroFastError("list 70 is too long")
        return rank(entries)

    found = answers(numbered(130), refuse, complaints := Complaints(on_error))
    if on_error == "stop":
        with pytest.raises(AlroFastError, match="list 70 is too long"):
            list(found)
        return
    assert [json.loads(line)["list_id"] for line in found] == [n for n in range(130) if n != 70]
    assert capsys.readouterr().err == "error: list 70 is too long; skipped\n"
    with pytest.raises(SystemExit) as ended:
        complaints.settle()
    assert ended.value.code == 1


def test_a_file_with_a_mistake_is_answered_nothing_of(tmp_path):
    file = tmp_path / "lists.jsonl"
    file.write_text("\n".join([json.dumps(LIST)] * 100 + ["{"]))
    with pytest.raises(AlroFastError, match="line 101 is not JSON"):
        read_lists(str(file), Complaints("stop"))
    with pytest.raises(AlroFastError, match="is a folder"):
        list(read_lists(str(tmp_path), Complaints("stop")))


def test_memory_is_flat(tmp_path):
    """20,000 lists of a kilobyte cost no more than 2,000 do."""
    line = json.dumps({"candidates": [{"title": f"movie {n} of the list"} for n in range(25)]}) + "\n"
    peaks = []
    for count in (2_000, 20_000):
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as out:
            out.writelines(itertools.repeat(line, count))
        tracemalloc.start()
        assert sum(1 for _ in documents(str(file))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000
    assert peaks[1] < 2_000_000


def test_one_text_over_several_lines_is_one_list(tmp_path):
    for value, count in ((LIST, 1), ([LIST, LIST], 2)):
        (tmp_path / "pretty.json").write_text(json.dumps(value, indent=2))
        assert len(list(documents(str(tmp_path / "pretty.json")))) == count


@pytest.mark.skipif(os.name == "nt", reason="pipes of a POSIX shell")
def test_typed_lists_are_answered_at_once_and_head_ends_quietly(tmp_path):
    """The second list is written when the first is answered; then who reads hangs up."""
    make_run(tmp_path)
    command = [sys.executable, "-m", "alro_fast.rank", "--adapter", str(tmp_path / "run"), "--device", "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
        for name in ("first", "second"):
            process.stdin.write(json.dumps(LIST | {"list_id": name}) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["list_id"] == name
        process.stdout.close()
        for _ in range(200):
            try:
                process.stdin.write(json.dumps(LIST) + "\n")
                time.sleep(0.02)
            except BrokenPipeError:
                break
            if process.poll() is not None:
                break
        assert process.wait(20) == 141
        assert process.stderr.read() == ""
