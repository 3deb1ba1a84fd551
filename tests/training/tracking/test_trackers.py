"""What reaches the trackers of --report_to, read back from where each keeps it without a network."""

from __future__ import annotations

import json
import sqlite3
import struct

import pytest
from tiny import catalogue, random_lists, refused, save_base

from alro_fast import train
from alro_fast.data.lists import write_prepared
from alro_fast.training.tracking.closing import as_markdown, read_measured

STEPS = {
    "loss",
    "sft",
    "soft_lambda",
    "utilisation",
    "lists_per_second",
}  # as the Trainer's log has them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    save_base(folder / "base")
    lists = random_lists(16, range(3, 6), seed=3, history=3, items=40)
    splits = {"train": lists[:8], "valid": lists[8:11], "test": lists[11:]}
    write_prepared(folder / "data", catalogue(40), splits, {"dataset": "made", "tie_rule": "none needed"})
    return folder


def trained(folder, tracker, *more):
    """A run of two steps that reports to `tracker`; its output folder and its results."""
    words = {
        "--model_name_or_path": folder / "base", "--data_dir": folder / "data", "--output_dir": folder / tracker,
        "--max_steps": 2, "--logging_steps": 1, "--eval_strategy": "steps", "--eval_steps": 1, "--lora_r": 4,
        "--use_cpu": True, "--disable_tqdm": True, "--report_to": tracker, "--run_name": "a-run",
        "--baselines": "none",
    }  # fmt: skip
    train.main([str(word) for pair in words.items() for word in pair] + list(more))
    return folder / tracker, json.loads((folder / tracker / "results.json").read_text())


def test_tensorboard(folder):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output, results = trained(folder, "tensorboard")
    (run,) = (output / "runs").iterdir()  # the closing table lies beside the steps
    events = accumulators.EventAccumulator(str(run)).Reload()
    scalars = events.Tags()["scalars"]
    assert {f"train/{name}" for name in STEPS} <= set(scalars)
    assert {"eval/ndcg@3", "eval/loss"} <= set(scalars)
    assert len(events.Scalars("train/loss")) == 2
    (closing,) = events.Scalars("test/tuned/ndcg@3")
    assert closing.value == pytest.approx(results["tuned"]["ndcg@3"], abs=1e-6)
    assert "test/tuned/shown_kendall_tau" in scalars
    texts = [name for name in events.Tags()["tensors"] if name.startswith("report/")]
    assert len(texts) == len(list((output / "tables").glob("*.csv"))) > 0


def wandb_records(content):
    """Of a .wandb file: LevelDB's log format behind a header of seven bytes, records of protobuf."""
    Record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    block, header, at, whole = 32_768, 7, 7, b""
    while at + header <= len(content):
        left = block - at % block
        if left < header:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # full, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb(folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, results = trained(folder, "wandb")
    (kept,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    summary, logged = {}, set()
    for record in wandb_records(kept.read_bytes()):
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        logged |= {item.key or "/".join(item.nested_key) for item in record.history.item}
    assert {f"train/{name}" for name in STEPS} | {"eval/ndcg@3"} <= logged
    assert summary["test/tuned/ndcg@3"] == pytest.approx(results["tuned"]["ndcg@3"])
    assert list((kept.parent / "files" / "media" / "html").rglob("*.html"))
    assert list((kept.parent / "files" / "media" / "table").rglob("*.json"))


def test_mlflow(folder, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    _, results = trained(folder, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs(["0"])
    assert STEPS | {"eval_ndcg_3"} <= run.data.metrics.keys()
    assert run.data.metrics["test/tuned/ndcg_3"] == pytest.approx(results["tuned"]["ndcg@3"])
    assert run.info.status == "FINISHED"
    left = [one.path for one in client.list_artifacts(run.info.run_id, "report")]
    assert "report/report.html" in left
    assert any(path.endswith(".json") for path in left)


def test_trackio(folder, monkeypatch):
    kept = folder / "trackio-kept"
    monkeypatch.setenv("TRACKIO_DIR", str(kept))  # which is read when it is imported
    pytest.importorskip("trackio")
    _, results = trained(folder, "trackio", "--project", "ours")
    (file,) = kept.glob("ours*.db")
    with sqlite3.connect(file) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("select metrics from metrics order by id")]
    names = {name for row in rows for name in row}
    assert {f"train/{name}" for name in STEPS} | {"eval/ndcg@3"} <= names
    assert rows[-1]["test/tuned/ndcg@3"] == pytest.approx(results["tuned"]["ndcg@3"])
    assert any(name.startswith("report/") for name in rows[-1])


def test_a_tracker_that_is_not_there_is_one_line_before_work(folder):
    words = ["--data_dir", folder / "data", "--model_name_or_path", folder / "base", "--output_dir", folder / "none"]
    said = refused([*words, "--report_to", "clearml"])
    assert said.startswith("--report_to clearml is unknown, or not installed; expected none or ")
    assert not (folder / "none").exists()


def test_what_is_sent_is_what_the_folder_holds(tmp_path):
    results = {
        "tuned": {"ndcg@3": 0.5, "ndcg@3_interval": [0.4, 0.6], "mrr": None},
        "mean rating": {"ndcg@3": 0.4}, "about": {"lists": 3},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "rankers.csv").write_text("ranker,NDCG@3\ntuned,.5\n")
    measured = read_measured(tmp_path)
    assert measured.means == {"test/tuned/ndcg@3": 0.5, "test/mean_rating/ndcg@3": 0.4}
    assert measured.tables == {"rankers": [["ranker", "NDCG@3"], ["tuned", ".5"]]}
    assert measured.page is None
    assert as_markdown([["a|b", "c"], ["1", "2"]]) == "| a\\|b | c |\n| --- | --- |\n| 1 | 2 |"
    assert read_measured(tmp_path / "nothing").means == {}
