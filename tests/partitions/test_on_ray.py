"""On a local cluster of two workers: the same files and the same answers as without Ray."""

from __future__ import annotations

import json

import pytest
from test_partitions import files_of, words, write_parts
from tiny import make_run, random_lists

from alro_fast import prepare
from alro_fast.data.partitions import build, on_ray
from alro_fast.errors import AlroFastError
from alro_fast.ranking.actor import RankLines
from alro_fast.ranking.documents import document_of

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(scope="module")
def cluster():
    """Two processors, 100 MB of objects, workers of one thread."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS"):
            patch.setenv(name, "1")
        ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


def test_partitions_are_prepared_by_workers(cluster, tmp_path, monkeypatch):
    (folder := tmp_path / "ratings").mkdir()
    write_parts(folder)
    prepare.main(words(folder, tmp_path / "alone", "--partitions", "2"))
    monkeypatch.setattr(
        prepare, "prepare_partitions", lambda *given: build.prepare_partitions(*given, each=on_ray.on_ray)
    )
    prepare.main(words(folder, tmp_path / "workers", "--partitions", "2"))
    assert files_of(tmp_path / "workers") == files_of(tmp_path / "alone")


def test_a_mistake_on_a_worker_is_a_mistake_here(cluster):
    def step(part: int) -> None:
        raise AlroFastError(f"partition {part} is none")

    with pytest.raises(AlroFastError, match="partition 7 is none"):
        on_ray.on_ray(step, [7])


def test_two_actors_rank_as_one_does(cluster, tmp_path):
    run = str(make_run(tmp_path))
    lines = [json.dumps(document_of(entry)) for entry in random_lists(24, 5, seed=2, history=3, items=40)]
    (tmp_path / "lists.jsonl").write_text("\n".join(lines))
    ranked = ray.data.read_text(str(tmp_path / "lists.jsonl"), override_num_blocks=2).map_batches(
        RankLines,
        fn_constructor_args=[run],
        fn_constructor_kwargs={"load": {"token_budget": 0, "device": "cpu"}},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=6,
        num_cpus=0.5,
    )
    found = {json.loads(row["text"])["list_id"]: row["text"] for row in ranked.take_all()}
    expected = RankLines(run, load={"token_budget": 0, "device": "cpu"})({"text": lines})["text"]
    assert found == {json.loads(line)["list_id"]: line for line in expected}
