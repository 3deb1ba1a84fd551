"""Objective recranker from prepared lists to rankings, and what it can and cannot learn from its prompts."""

from __future__ import annotations

import contextlib
import html
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from places import ROOT
from tiny import byte_tokenizer, catalogue, save_base, tiny_llama

from alro_fast import evaluate, rank, train
from alro_fast.data.lists import TARGET_SCHEMA, open_prepared, write_prepared
from alro_fast.data.records import RankingList
from alro_fast.errors import AlroFastError
from alro_fast.prompts.recranker.prompts import Ask, RecRankerPrompts
from alro_fast.ranking.fusion import Fusion
from alro_fast.ranking.ranker import Ranker

NAN = math.nan
DOCUMENT = ROOT / "docs" / "recranker.md"
SCRATCH = (
    "--objective recranker --model_name_or_path scratch --use_peft false --scratch_hidden_size 64 --scratch_layers 2 "
    "--template compact --identifiers items --disable_tqdm true --save_strategy no"
)
STEPS = "--learning_rate 5e-3 --num_train_epochs 4 --tokens_per_batch 4096 --logging_steps 50"


def make_lists(count: int, split: str, seed: int, leak: float) -> list[RankingList]:
    """Ten random items a list, four liked by the toss of a coin; nothing but a hint can tell which.

    leak: how much of a hint is the candidate's own rating; 0: it is as random as the rest. Valid and test lists keep
    the rating of one liked item, their target.
    """
    draw = np.random.default_rng(seed)
    shelf, lists = catalogue(60), []
    for number in range(count):
        items = [shelf[i] for i in draw.choice(60, 16, replace=False)]
        ratings = draw.permutation([5.0] * 4 + [1.0] * 6)
        hints = leak * ratings + (1 - leak) * draw.uniform(1, 5, 10)
        if split != "train":
            target = draw.choice(np.flatnonzero(ratings == 5))
            hints = np.where(np.arange(10) == target, hints, np.where(ratings == 5, draw.uniform(1, 2, 10), hints))
            ratings = np.where(np.arange(10) == target, 5.0, NAN)
        past = tuple(map(float, draw.permutation([5.0, 4.0, 4.5, 1.0, 2.0, 1.5])))
        lists.append(
            RankingList(
                f"{split}-{number}", f"u{number}", tuple(items[:6]), past, tuple(items[6:]),
                tuple(map(float, ratings)), tuple(map(float, hints.round(1))),
            )
        )  # fmt: skip
    return lists


def prepare(path: Path, leak: float, **changes) -> Path:
    sizes = {"train": 250, "valid": 10, "test": 200}
    splits = {
        name: [replace(one, **changes) for one in make_lists(count, name, seed, leak)]
        for seed, (name, count) in enumerate(sizes.items())
    }
    targets = pl.DataFrame(
        [(split, one.user_id, one.candidates[0].index, 1) for split in ("valid", "test") for one in splits[split]],
        schema=TARGET_SCHEMA, orient="row",
    )  # fmt: skip
    options = {"dataset": "made", "options": {"like": 4.0, "dislike": 2.0}}
    write_prepared(path, catalogue(60), splits, options, targets)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on lists whose hints tell the truth."""
    folder = tmp_path_factory.mktemp("run")
    prepare(folder / "lists", leak=1.0)
    with contextlib.chdir(folder):  # what ranks later does so from another directory
        train.main(f"{SCRATCH} --data_dir lists --output_dir {folder / 'run'} {STEPS}".split())
    return folder / "run"


def hit_rate(folder: Path, row: str, metric: str = "hr@3") -> float:
    """Of a run's closing table."""
    return json.loads((folder / "results.json").read_text())[row][metric]


def test_a_hint_that_saw_the_rating_is_found_and_used(run):
    """The mistake that this project guards against, made on purpose: the hint is the candidate's own rating. The model
    learns to read it, so that the next test is one that can fail."""
    assert hit_rate(run, "random") == pytest.approx(0.3)
    assert hit_rate(run, "tuned") > 0.9
    assert hit_rate(run, "pairwise") > 0.7


def test_without_hint_and_history_nothing_beats_chance_on_random_labels(tmp_path):
    """Chance is 3 in 10, three standard errors of 200 lists allowed: no place and no candidate gives labels away."""
    lists = prepare(tmp_path / "lists", leak=0.0, hints=(NAN,) * 10, history=(), history_ratings=())
    train.main(f"{SCRATCH} --data_dir {lists} --output_dir {tmp_path / 'run'} {STEPS}".split())
    for row in ("pointwise", "pairwise", "listwise", "tuned"):
        assert hit_rate(tmp_path / "run", row) < 0.3 + 3 * math.sqrt(0.3 * 0.7 / 200)
    assert hit_rate(tmp_path / "run", "retriever") < 0.3 + 3 * math.sqrt(0.3 * 0.7 / 200)


def test_no_test_prompt_holds_the_targets_rating():
    """Every token of every question that a ranker asks is the same whatever is rated, and how."""
    tokenizer = byte_tokenizer()
    asked: list = []
    prompts = RecRankerPrompts(tokenizer, "movies")
    encode = prompts.encode
    prompts.encode = lambda asks: asked.append(encode(asks)) or asked[-1]
    ranker = Ranker(tiny_llama(len(tokenizer)), tokenizer, prompts, answer="tasks")
    (entry,) = make_lists(1, "test", 0, leak=0.0)
    for ratings in (
        entry.ratings,
        entry.ratings[::-1],
        (NAN,) * 10,
        tuple(1.0 if r == r else NAN for r in entry.ratings),
    ):
        ranker.rank([replace(entry, ratings=ratings)])
    assert all(other == asked[0] for other in asked)
    assert not any(one.answer_ids for made in asked[0] for one in [*made.points, *made.pairs, *made.listings])


def test_what_a_run_leaves(run):
    for name in ("recranker.json", "prompt_template.yaml", "config.yaml", "data_manifest.json", "predictions.jsonl"):
        assert (run / name).is_file()
    document = json.loads((run / "results.json").read_text())
    rows = ["random", "popularity", "mean_rating", "shrunk_mean", "biased_mf", "retriever", "hints"]
    assert list(document)[:-1] == [*rows, "untuned", "pointwise", "pairwise", "listwise", "tuned"]
    assert document["about"]["ceiling"] == 1.0
    conventions = document["about"]["conventions"]
    assert conventions["rankings"] == "method hybrid (code constants, pairing matching), seed 0"
    assert conventions["trec"] == "lists that hold their target alone, 1 for it and 0 for every other candidate"
    for said in conventions.values():
        assert html.escape(said) in (run / "report.html").read_text()
    assert "grades, Yes or No, and the best five" in (run / "README.md").read_text()
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert {"pointwise", "pairwise", "listwise", "sharing_ratio"} <= log[0].keys()
    assert Ranker.load(run).prompts.like == 4.0


def test_evaluate_measures_every_task_and_the_generated_answers(run, capsys):
    words = f"--adapter {run} --lists {run.parent / 'lists'} --bootstrap 50".split()
    evaluate.main([*words, "--limit", "12", "--generate"])
    document = json.loads((run / "evaluation" / "results.json").read_text())
    assert {"pointwise", "pairwise", "listwise", "tuned", "generate", "retriever"} <= document.keys()
    printed = capsys.readouterr().out
    assert document["about"]["conventions"]["rankings"] == "method hybrid (code constants, pairing matching), seed 0"
    assert "of the answers could not be read in full" in printed
    qrels = [line.split() for line in (run / "evaluation" / "qrels.trec").read_text().splitlines()]
    assert sorted(grade for *_, grade in qrels) == ["0"] * 108 + ["1"] * 12
    evaluate.main([*words, "--limit", "12", "--method", "hybrid", "--hybrid", "figure", "--pairing", "all"])
    printed = capsys.readouterr().out
    document = json.loads((run / "evaluation" / "results.json").read_text())
    assert document["about"]["conventions"]["rankings"].startswith("method hybrid (figure constants, pairing all)")
    assert "pointwise" not in printed


def test_fused_on_lists_of_one_target_takes_the_target_for_1_and_the_others_for_0(tmp_path):
    """Weights by hand from the predictions of the validation lists, the row from those of the test lists."""
    lists, folder = prepare(tmp_path / "lists", leak=1.0), tmp_path / "run"
    words = f"{SCRATCH} --data_dir {lists} --output_dir {folder} --max_steps 2 --max_test_lists 30 --fuse true"
    train.main(words.split())
    evaluate.main(f"--adapter {folder} --lists {lists} --split valid --fuse --output_dir {tmp_path / 'valid'}".split())
    rows = [json.loads(line) for line in (tmp_path / "valid" / "predictions.jsonl").read_text().splitlines()]
    valid = open_prepared(lists).lists("valid")
    graded = [replace(one, ratings=tuple(0.0 if math.isnan(r) else 1.0 for r in one.ratings)) for one in valid]
    scores = [np.array(row["rankings"]["tuned"]["scores"]) for row in rows]
    again, kept = Fusion.fit(graded, scores, ["hint"]), Fusion.load(folder)
    assert kept.signals == ("hint",)
    assert kept.weights == pytest.approx(again.weights, rel=1e-4, abs=1e-6)
    assert (kept.lists, kept.pairs) == (10, 90)
    for one, row, own in zip(valid, rows, scores, strict=True):
        assert row["rankings"]["fused"]["scores"] == pytest.approx(list(kept.scores(one, own)), abs=1e-6)
    results = json.loads((folder / "results.json").read_text())
    assert {"fused", "tuned", "retriever"} <= results.keys()


@pytest.mark.parametrize("identifiers", ["letters", "titles"])
def test_an_adapter_over_a_language_model(tmp_path, identifiers):
    """LoRA, letters or titles, and the untuned model beside it."""
    base = tmp_path / "base"
    save_base(base, max_position_embeddings=2048)
    lists = prepare(tmp_path / "lists", leak=0.5)
    train.main(
        f"--objective recranker --model_name_or_path {base} --template movies --identifiers {identifiers} "
        f"--data_dir {lists} --output_dir {tmp_path / 'run'} --max_steps 2 --max_train_lists 20 --max_eval_lists 4 "
        "--max_test_lists 8 --tokens_per_batch 8192 --task_weights 1,0.5,2 --hybrid figure --disable_tqdm true".split()
    )
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    evaluate.main(f"--adapter {tmp_path / 'run'} --lists {lists} --limit 8 --bootstrap 0".split())
    document = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert document["untuned"] != document["tuned"]
    assert document["about"]["conventions"]["rankings"].startswith("method hybrid (figure constants")
    assert {"pointwise", "pairwise", "listwise"} <= document.keys()


def test_a_run_without_hints_never_shows_them(tmp_path, capsys):
    """Trained, ranked and evaluated: lists whose hints are changed are ranked alike, though the lists have hints."""
    save_base(tmp_path / "base", max_position_embeddings=2048)
    lists = prepare(tmp_path / "lists", leak=1.0)
    short = "--max_steps 1 --max_train_lists 4 --max_eval_lists 2 --max_test_lists 2 --tokens_per_batch 8192"
    words = f"--model_name_or_path {tmp_path / 'base'} --data_dir {lists} --output_dir {tmp_path / 'run'} {short}"
    train.main(f"--objective recranker {words} --hints false --hybrid grade=1,win=2 --disable_tqdm true".split())
    assert "shown beside" not in capsys.readouterr().out
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (options["hints"], options["hybrid"]) == (False, "grade=1,win=2")
    ranker = Ranker.load(tmp_path / "run")
    assert ranker.described() == "method hybrid (grade=1,win=2 constants, pairing matching), seed 0"
    (entry,) = make_lists(1, "test", 0, leak=1.0)
    assert entry.hints
    one, other = ranker.rank([entry, replace(entry, hints=entry.hints[::-1])])
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
    with pytest.raises(AlroFastError, match="--hints has no meaning for --objective sft"):
        train.main(f"--objective sft {words} --hints false".split())
    with pytest.raises(AlroFastError, match="--hybrid paper is called figure now"):
        train.main(f"--objective recranker {words} --overwrite_output_dir true --hybrid paper".split())


def test_a_run_of_before_that_was_tuned_with_the_set_called_paper(tmp_path, run):
    """It ranks as figure, and its configuration can be given again."""
    shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*", "data"))
    file = tmp_path / "old" / "config.yaml"
    file.write_text(file.read_text().replace("hybrid: code", "hybrid: paper"))
    assert Ranker.load(tmp_path / "old").described().startswith("method hybrid (figure constants")
    assert train.parse(["--config", str(file)]).objective.hybrid == "figure"


def test_rank_takes_hints_and_methods(run, tmp_path, capsys):
    (entry,) = make_lists(1, "test", 9, leak=0.0)
    past = zip(entry.history, entry.history_ratings)
    shown = enumerate(entry.candidates)
    document = {
        "history": [{"id": item.item_id, "title": item.title, "rating": rating} for item, rating in past],
        "candidates": [{"id": one.item_id, "title": one.title, "hint": 5.0 if i == 7 else 1.0} for i, one in shown],
    }
    (tmp_path / "one.json").write_text(json.dumps(document))
    orders = {}
    for options in ("", "--method pairwise --pairing all", "--hybrid figure", "--hybrid win=2", "--method listwise"):
        rank.main(f"--adapter {run} {tmp_path / 'one.json'} {options}".split())
        orders[options] = [row["id"] for row in json.loads(capsys.readouterr().out)["ranking"]]
        assert sorted(orders[options]) == sorted(item.item_id for item in entry.candidates)
    assert entry.candidates[7].item_id in orders["--method pairwise --pairing all"][:3]
    for words, said in (
        ("--hybrid paper", "--hybrid paper is called figure now"),
        ("--hybrid grade=1,lists=2", "'lists=2' names no constant"),
        ("--pairing none", "--pairing 'none' is unknown"),
        ("--method first", "asks otherwise than this model was tuned to answer"),
    ):
        with pytest.raises(AlroFastError, match=said):
            rank.main(f"--adapter {run} {tmp_path / 'one.json'} {words}".split())


def test_ratings_up_to_ten_need_a_template_of_their_own(tmp_path):
    """The refusal names the way out, and the documented one works."""
    tokenizer, (entry,) = byte_tokenizer(), make_lists(1, "train", 0, leak=0.0)
    entry = replace(entry, ratings=tuple(map(float, range(1, 11))), history_ratings=(10.0,) * 6)
    with pytest.raises(AlroFastError, match=r"rated 6, which is none .*; give --template a YAML file of your own"):
        RecRankerPrompts(tokenizer, "compact").text(Ask(entry, points=[5]))
    commands = [block for block in re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), re.S) if "ten.yaml" in block]
    subprocess.run(["bash", "-c", commands[0].replace("ten.yaml", str(tmp_path / "ten.yaml"))], cwd=ROOT, check=True)
    prompts = RecRankerPrompts(tokenizer, tmp_path / "ten.yaml")
    assert prompts.grade_values == list(range(1, 11))
    assert (prompts.like, prompts.dislike) == (8, 4)
    answers = [answer for _, answer in prompts.text(Ask(entry, points=range(10)))]
    assert answers == [f" {grade}</s>" for grade in range(10)] or answers == [f"{grade}</s>" for grade in range(10)]


def test_mistakes_before_any_work(tmp_path):
    lists = prepare(tmp_path / "lists", leak=0.0, ratings=(NAN,) * 10)
    for words, said in (
        ("", "holds no training list with a rated candidate"),
        ("--task_weights 1,1", "--task_weights '1,1': expected three numbers"),
        ("--answer ratings", "--answer has no meaning for --objective recranker"),
        ("--template film", "no prompt template 'film' for objective recranker: expected one of books, compact"),
        ("--points_per_list -1", "--points_per_list is -1"),
    ):
        with pytest.raises(AlroFastError, match=said):
            train.main(f"{SCRATCH} --data_dir {lists} --output_dir {tmp_path / 'run'} {words}".split())
    with pytest.raises(AlroFastError, match="expected letters or items"):
        train.main(f"--data_dir {lists} --objective sft --identifiers titles --output_dir {tmp_path / 'run'}".split())
    assert open_prepared(lists).lists("train")[0].hints


def test_the_movielens_script_runs_from_ratings_to_evaluation(shared_data, tmp_path):
    """scripts/recranker-ml-latest-small.sh, cut to a few steps and lists."""
    pytest.importorskip("implicit", reason="the retriever needs the extra `recranker`")
    script, short = ROOT / "scripts" / "recranker-ml-latest-small.sh", ["--max_steps", "2", "--max_test_lists", "40"]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "SAMPLES": "40", "LIMIT": "40",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(script), str(shared_data / "ml-latest-small"), str(tmp_path), *short, "--max_eval_lists", "20"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("retriever", "hints", "pointwise", "pairwise", "listwise", "tuned", "ceiling"):
        assert done.stdout.count(f"\n{row} ") >= 2
    about = json.loads((tmp_path / "evaluation" / "results.json").read_text())["about"]
    assert about["conventions"]["rankings"].startswith("method hybrid (code constants, pairing all")
    prompts = (tmp_path / "run" / "recranker.json").read_text()
    assert json.loads(prompts)["options"]["like"] == 4.0
