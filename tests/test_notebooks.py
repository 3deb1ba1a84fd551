"""The notebooks: their code cells in order, from an empty folder, as a kernel runs them, but on a few lists."""

from __future__ import annotations

import functools
import json

import pytest
from places import ROOT

from alro_fast import evaluate, train

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FEW = ["--max_train_lists", "8", "--max_eval_lists", "3", "--max_test_lists", "4"]


def shortened(main, more, words):
    main([*words, *more])


def test_there_is_one():
    assert [path.name for path in NOTEBOOKS] == ["demo.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order(path, tmp_path, monkeypatch, capfd):
    for module, more in ((train, FEW), (evaluate, ["--limit", "3"])):
        monkeypatch.setattr(module, "main", functools.partial(shortened, module.main, more))
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "notebook"}
    document = json.loads(path.read_text(encoding="utf-8"))
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # results are those of the reader's run
            exec(compile("".join(cell["source"]), str(path), "exec"), names)
    assert '"ranking"' in capfd.readouterr().out  # of the reader's own list
    assert "tuned" in json.dumps(names["results"])
