"""The table and its files: on known scores, from the command, and re-scored by other libraries."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from peers import ranx_scores
from tiny import byte_tokenizer, catalogue, make_run, random_lists, save_base, tiny_llama

from alro_fast import evaluate
from alro_fast.data.lists import open_prepared, write_prepared
from alro_fast.errors import AlroFastError
from alro_fast.evaluation import metrics
from alro_fast.evaluation.baselines import baseline_scores
from alro_fast.evaluation.rankings import order_sensitivity
from alro_fast.evaluation.results import LABELS, _p, evaluate_lists, write_trec
from alro_fast.prompts import PromptBuilder, add_item_tokens
from alro_fast.ranking.orders import Ranking
from alro_fast.ranking.ranker import Ranker

CHEAP = ("random", "popularity", "mean_rating", "shrunk_mean", "biased_mf")


@pytest.fixture(scope="module")
def lists():
    made = random_lists(24, range(4, 9), seed=3)
    made[5] = replace(made[5], ratings=(3.0,) * len(made[5].ratings))
    made[6] = replace(made[6], ratings=(math.nan, *made[6].ratings[1:]))
    made[7] = replace(made[7], user_id="u8")
    return made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, lists):
    folder = tmp_path_factory.mktemp("data") / "lists"
    write_prepared(
        folder, catalogue(300), {"train": random_lists(40, 6, seed=4), "test": lists}, {"tie_rule": "seeded hash"}
    )
    return open_prepared(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def evaluated(adapter, prepared, tmp_path_factory):
    """The command, run once with two presentations: its output folder."""
    folder = tmp_path_factory.mktemp("out") / "evaluation"
    evaluate.main(
        f"--adapter {adapter} --lists {prepared.path} --output_dir {folder} --shuffles 2 --gain linear --bootstrap 200 "
        "--device cpu".split()
    )
    return folder


def test_means_leave_out_what_cannot_be_ranked(lists):
    perfect = [np.nan_to_num(entry.ratings) for entry in lists]
    found = evaluate_lists(lists, {"perfect": perfect, "worst": [-row for row in perfect]})
    assert (found.lists, found.all_equal, len(found.users)) == (24, 1, 23)
    assert found.mean("perfect", "ndcg@3") == 1.0
    assert found.mean("perfect", "mrr") == 1.0
    ranked = [entry for entry in lists if not entry.all_equal]
    graded = [[i for i, rating in enumerate(entry.ratings) if not math.isnan(rating)] for entry in ranked]
    by_hand = [
        metrics.ndcg(np.array([[-entry.ratings[i] for i in keep]]), np.array([[entry.ratings[i] for i in keep]]), 3)[0]
        for entry, keep in zip(ranked, graded)
    ]
    assert found.mean("worst", "ndcg@3") == pytest.approx(np.mean(by_hand), abs=1e-12)
    interval = found.interval("worst", "ndcg@3")
    assert interval == metrics.bootstrap_interval(np.array(by_hand), [entry.user_id for entry in ranked])
    assert found.compare("perfect", "worst", "ndcg@3").p_value < 0.01
    assert found.means("worst")["ndcg@3"] == interval.mean


def test_the_table_fits_a_terminal_and_says_who_is_ahead(lists, prepared):
    scorers = baseline_scores(prepared, lists) | {"tuned": lambda given: [np.arange(len(e.ratings)) for e in given]}
    scorers["untuned"] = [np.zeros(len(entry.ratings)) for entry in lists]
    found = evaluate_lists(lists, scorers, prepared=prepared)
    assert list(found.per_list) == [*CHEAP, "untuned", "tuned"]
    table = found.table()
    assert max(map(len, table.splitlines())) <= 80
    for words in ("test: 23 lists of 22 users", "NDCG@1", "NDCG@10", "lists/s: tuned ", "mean rating"):
        assert words in table, words
    sides = {"above": [], "not told apart from": [], "below": []}
    for other in (*CHEAP, "untuned"):
        change = found.compare("tuned", other, "ndcg@3")
        row = next(line for line in table.splitlines() if line.startswith(f"{LABELS.get(other, other):<15}"))
        assert row.split()[-2:] == [f"{change.difference:+.4f}", _p(change.p_value)]
        side = "not told apart from" if change.p_value >= 0.05 else "above" if change.difference > 0 else "below"
        sides[side].append(LABELS.get(other, other))
    said = "; ".join(f"{side} {', '.join(names)}" for side, names in sides.items() if names)
    assert f"NDCG@3, tuned - row, paired over users: tuned is {said} (p < .05)" in " ".join(table.split())
    conventions = " ".join(found.to_json()["about"]["conventions"].values())
    for words in ("2^rating - 1", "averaged", "1 of 24, set apart", "seeded hash", "bootstrap over users"):
        assert words in conventions, words
    # a constant scorer is worth exactly a random order
    assert found.per_list["untuned"]["ndcg@5"] == pytest.approx(found.per_list["random"]["ndcg@5"])


def test_the_random_row_is_the_mean_over_orders(lists, prepared):
    found = evaluate_lists(lists, {"random": baseline_scores(prepared, lists)["random"]})
    generator = np.random.default_rng(0)
    draws = [
        evaluate_lists(lists, {"draw": [generator.random(len(e.ratings)) for e in lists]}, bootstrap=0).means("draw")
        for _ in range(400)
    ]
    for name in ("ndcg@1", "ndcg@5", "hr@3", "mrr"):
        sample = np.array([draw[name] for draw in draws])
        assert found.mean("random", name) == pytest.approx(sample.mean(), abs=5 * sample.std() / 20)


def test_baselines_use_training_ratings_only(lists, prepared):
    scores = baseline_scores(prepared, lists)
    train = prepared.lists("train")
    entry = lists[0]
    for i, item in enumerate(entry.candidates):
        assert scores["popularity"][0][i] == prepared.train_count[item.index]
        if prepared.train_count[item.index]:
            assert scores["mean_rating"][0][i] == prepared.train_mean[item.index]
    rated = prepared.train_count > 0
    overall = (prepared.train_mean[rated] * prepared.train_count[rated]).sum() / prepared.train_count.sum()
    unseen = [
        scores["mean_rating"][at][i]
        for at, entry in enumerate(lists)
        for i, item in enumerate(entry.candidates)
        if not rated[item.index]
    ]
    assert unseen
    assert unseen == pytest.approx([overall] * len(unseen))
    assert len(train) == 40


def test_oracle_comes_from_its_file(lists, prepared, tmp_path):
    known = [np.random.default_rng(i).random(len(entry.ratings)) for i, entry in enumerate(lists)]
    frame = pl.DataFrame({"list_id": [entry.list_id for entry in lists], "scores": [row.tolist() for row in known]})
    stand_in = SimpleNamespace(path=tmp_path, train_count=prepared.train_count, train_mean=prepared.train_mean)
    frame[::-1].write_parquet(tmp_path / "oracle.parquet")
    found = baseline_scores(stand_in, lists, "none")["oracle"]
    for one, two in zip(found, known, strict=True):
        np.testing.assert_array_equal(one, two)
    names = list(evaluate_lists(lists, {"oracle": found, "tuned": known, "random": known}).per_list)
    assert names == ["random", "tuned", "oracle"]
    frame[:3].write_parquet(tmp_path / "oracle.parquet")  # speaks of other lists: no such row
    assert "oracle" not in baseline_scores(stand_in, lists, "none")
    frame.rename({"scores": "score"}).write_parquet(tmp_path / "oracle.parquet")
    with pytest.raises(AlroFastError, match="expected the columns list_id and scores"):
        baseline_scores(stand_in, lists, "none")


def test_scores_of_another_shape_are_refused(lists):
    with pytest.raises(AlroFastError, match="scorer 'x' gave scores for 1 lists; expected 24"):
        evaluate_lists(lists, {"x": [[1.0]]})
    with pytest.raises(AlroFastError, match="gave 1 scores for list l0"):
        evaluate_lists(lists, {"x": [[1.0]] * 24})


def test_results_json(lists, tmp_path):
    found = evaluate_lists(lists, {"tuned": [np.arange(len(e.ratings)) for e in lists]}, bootstrap=100)
    document = json.loads(found.save(tmp_path).read_text())
    assert document["tuned"]["ndcg@3"] == found.mean("tuned", "ndcg@3")
    low, high = document["tuned"]["ndcg@3_interval"]
    assert low < document["tuned"]["ndcg@3"] < high
    assert document["about"]["lists_all_equal"] == 1
    nothing = evaluate_lists([lists[5]], {"tuned": [np.arange(len(lists[5].ratings))]})
    assert json.loads(json.dumps(nothing.to_json(), allow_nan=False))["tuned"]["ndcg@3"] is None
    assert "nan" in nothing.table()


def test_the_command_writes_what_it_measured(evaluated, adapter, prepared, lists):
    document = json.loads((evaluated / "results.json").read_text())
    assert list(document) == [*CHEAP, "untuned", "tuned", "about"]
    assert document["about"]["conventions"]["gain"] == "the rating itself"
    assert "method first, 2 presentations merged by mean" in document["about"]["conventions"]["rankings"]
    assert "ratings x 2, as qrels.trec holds whole numbers" in document["about"]["conventions"]["trec"]
    assert "ratings x 2, as qrels.trec" in (evaluated / "report.html").read_text()
    assert -1 <= document["tuned"]["order_kendall_tau"] <= 1
    assert document["tuned"]["lists_per_second"] > 0
    assert document["tuned"]["ndcg@3"] != document["untuned"]["ndcg@3"]

    ranker = Ranker.load(adapter, device="cpu")
    again = ranker.rank(lists, shuffles=2)
    for line, entry, ranking in zip(
        (evaluated / "predictions.jsonl").read_text().splitlines(), prepared.lists("test"), again, strict=True
    ):
        prediction = json.loads(line)
        assert prediction["list_id"] == entry.list_id
        assert [c["id"] for c in prediction["candidates"]] == [item.item_id for item in entry.candidates]
        tuned = prediction["rankings"]["tuned"]
        np.testing.assert_allclose(tuned["scores"], ranking.scores, atol=1e-6)  # a reload gives the same scores
        assert tuned["order"] == list(ranking.order)
        assert len(tuned["presentations"]) == 2
        assert tuned["presentations"][1]["shown"] == ranking.presented[1].tolist()
    measured = evaluate_lists(lists, {"tuned": [ranking.scores for ranking in again]}, gain="linear", bootstrap=0)
    assert measured.mean("tuned", "ndcg@3") == pytest.approx(document["tuned"]["ndcg@3"], abs=1e-9)


def read_trec(folder: Path) -> tuple[dict, dict]:
    qrels, run = {}, {}
    for line in (folder / "qrels.trec").read_text().splitlines():
        query, _, item, rating = line.split()
        qrels.setdefault(query, {})[item] = int(rating)
    for line in (folder / "run.trec").read_text().splitlines():
        query, _, item, _, score, _ = line.split()
        run.setdefault(query, {})[item] = float(score)
    return qrels, run


def test_peers_give_our_numbers_from_our_files(evaluated):
    """Linear gain, one presentation's ties apart: ranx, pytrec_eval and ir_measures agree with results.json."""
    qrels, run = read_trec(evaluated)
    ours = json.loads((evaluated / "results.json").read_text())["tuned"]
    theirs = ranx_scores(qrels, run, ["ndcg@3", "ndcg@10"])
    assert len(theirs["ndcg@3"]) == 23
    for cutoff in (3, 10):
        assert np.mean(list(theirs[f"ndcg@{cutoff}"].values())) == pytest.approx(ours[f"ndcg@{cutoff}"], abs=1e-6)
    pytrec_eval = pytest.importorskip("pytrec_eval")
    scored = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.3,10"}).evaluate(run)
    for cutoff in (3, 10):
        assert np.mean([row[f"ndcg_cut_{cutoff}"] for row in scored.values()]) == pytest.approx(
            ours[f"ndcg@{cutoff}"], abs=1e-6
        )
    ir_measures = pytest.importorskip("ir_measures")
    mean = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 5],
        ir_measures.read_trec_qrels(str(evaluated / "qrels.trec")),
        ir_measures.read_trec_run(str(evaluated / "run.trec")),
    )
    assert mean[ir_measures.nDCG @ 5] == pytest.approx(ours["ndcg@5"], abs=1e-6)


def test_peers_with_exponential_gain_and_whole_stars(tmp_path):
    whole = [replace(e, ratings=tuple(math.ceil(r) for r in e.ratings)) for e in random_lists(20, 6, seed=7)]
    whole[2] = replace(whole[2], list_id="a list/with spaces", user_id="ü")
    scores = [np.random.default_rng(i).random(6) for i in range(20)]
    assert write_trec(tmp_path, whole, scores, tag="t") == 1
    qrels, run = read_trec(tmp_path)
    theirs = ranx_scores(qrels, run, ["ndcg_burges@3", "hit_rate@2-l5"])
    ours = evaluate_lists(whole, {"x": scores}, bootstrap=0)
    assert np.mean(list(theirs["ndcg_burges@3"].values())) == pytest.approx(ours.mean("x", "ndcg@3"), abs=1e-9)


def test_trec_files_hold_graded_candidates_of_rankable_lists(lists, tmp_path, caplog):
    scores = [np.arange(len(entry.ratings), dtype=float) for entry in lists]
    assert write_trec(tmp_path, lists, scores, tag="t") == 2  # half stars become whole numbers
    qrels, run = read_trec(tmp_path)
    assert set(qrels) == set(run) == {entry.list_id for entry in lists} - {"l5"}
    assert lists[6].candidates[0].item_id not in run["l6"]
    assert qrels["l0"] == {item.item_id: 2 * r for item, r in zip(lists[0].candidates, lists[0].ratings)}
    odd = [replace(lists[0], ratings=tuple(math.pi + i for i in range(len(lists[0].ratings))))]
    caplog.clear()
    assert write_trec(tmp_path, odd, scores[:1], tag="t") is None
    assert [record.message for record in caplog.records] == [
        "no run.trec and qrels.trec: they hold whole numbers, ratings here have over three decimals"
    ]
    assert not list(tmp_path.iterdir())  # nor those of the earlier lists


def test_order_sensitivity_is_the_mean_tau():
    def of(rows):
        rows = np.array(rows, dtype=float)
        return Ranking("l", (0, 1, 2), rows[0], np.tile(np.arange(3), (len(rows), 1)), rows)

    same, turned = of([[3, 2, 1], [30, 20, 10]]), of([[3, 2, 1], [1, 2, 3]])
    assert order_sensitivity([same]) == 1.0
    assert order_sensitivity([same, turned]) == 0.0
    assert order_sensitivity([of([[3, 2, 1], [2, 3, 1], [1, 2, 3]])]) == pytest.approx((1 / 3 - 1 - 1 / 3) / 3)
    assert math.isnan(order_sensitivity([of([[3, 2, 1]])]))
    # a model that ignores order: identifiers are blind to the page when the head reads nothing
    tokenizer = byte_tokenizer()
    model = tiny_llama(len(tokenizer))
    blind = Ranker(model, tokenizer, PromptBuilder(tokenizer, "movies"))
    tau = order_sensitivity(blind.rank(random_lists(6, 6), shuffles=3))
    assert tau < 0.9  # a random model clings to letters, not to items


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--split": "tset"}, "unknown split 'tset'"),
        ({"--split": "valid"}, "holds no valid lists"),
        ({"--lists": "nowhere"}, "not a prepared data folder"),
        ({"--limit": "0"}, "--limit is at least 1"),
        ({"--limit": "few"}, "argument --limit: invalid int value: 'few'; python -m alro_fast.evaluate --help"),
        ({"--method": "best"}, "unknown method 'best'"),
        ({"--gain": "log"}, "unknown gain 'log'"),
        ({"--adapter": "nowhere"}, "nowhere: no such folder"),
        ({"--bootstrap": "-1"}, "--bootstrap is at least 0"),
        ({"--seed": "-1"}, "seed is at least 0; given -1"),
        ({"--token_budget": "-5"}, "token_budget is at least 0; given -5"),
        ({"--device": "foo"}, "--device foo cannot be used here"),
        ({"--device": "cuda:99"}, "--device cuda:99 cannot be used here"),
        (
            {"--output_dir": f"{__file__}/out"},
            r"cannot be written \(.*test_evaluate.py is a file\)",
        ),
    ],
)
def test_bad_options_are_one_line(changed, message, adapter, prepared, tmp_path):
    options = {"--adapter": str(adapter), "--lists": str(prepared.path), "--output_dir": str(tmp_path)} | changed
    with pytest.raises(AlroFastError, match=message):
        evaluate.main([word for pair in options.items() for word in pair])
    assert not list(tmp_path.iterdir())


def test_lists_of_one_rating_each_are_refused_as_training_refuses_them(adapter, lists, tmp_path):
    one = [replace(entry, ratings=(1.0,) * len(entry.ratings)) for entry in lists[:3]]
    write_prepared(tmp_path / "clicks", catalogue(300), {"test": one})
    write_prepared(tmp_path / "some", catalogue(300), {"test": [*one, lists[3]]})
    command = f"--adapter {adapter} --bootstrap 0 --device cpu --baselines none --output_dir {tmp_path / 'out'} --lists"
    with pytest.raises(AlroFastError, match=r"clicks: no test list has candidates with .*--negatives N --ungraded as"):
        evaluate.main([*command.split(), str(tmp_path / "clicks")])
    with pytest.raises(AlroFastError, match=r"some: none of the first 3 test lists has .*; give a larger --limit"):
        evaluate.main([*command.split(), str(tmp_path / "some"), "--limit", "3"])
    assert not (tmp_path / "out").exists()
    evaluate.main([*command.split(), str(tmp_path / "some"), "--limit", "4"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["about"]["lists_ranked"] == 1


def test_a_folder_that_holds_something_else_is_left_alone(adapter, prepared, evaluated, tmp_path):
    """The folder of a run has results.json too: the run's own."""
    run, earlier = shutil.copytree(adapter, tmp_path / "run"), shutil.copytree(evaluated, tmp_path / "evaluation")
    command = f"--adapter {adapter} --lists {prepared.path} --limit 2 --bootstrap 0 --device cpu --output_dir"
    (run / "results.json").write_text("the run's own")
    with pytest.raises(AlroFastError, match=r"run holds README.md, which no evaluation wrote; give another folder"):
        evaluate.main([*command.split(), str(run)])
    assert (run / "results.json").read_text() == "the run's own"
    evaluate.main([*command.split(), str(earlier)])  # an earlier evaluation is replaced
    assert json.loads((earlier / "results.json").read_text())["about"]["lists"] == 2


def test_without_its_options_a_model_is_not_guessed_at(adapter, prepared, tmp_path):
    """Which answers it was tuned to give, grades or an order, stands in config.yaml alone."""
    shutil.copytree(adapter, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(AlroFastError, match=r"run: no config.yaml, which says what answers .*; copy it from the run"):
        evaluate.main(f"--adapter {tmp_path / 'run'} --lists {prepared.path} --device cpu".split())
    assert not (tmp_path / "run" / "evaluation").exists()


def test_limit_and_a_model_without_adapter(adapter, prepared, tmp_path, capsys):
    full = tmp_path / "full"
    tokenizer = save_base(full)
    PromptBuilder(tokenizer, "movies").save(full)
    (full / "config.yaml").write_text("answer: ranking\n")
    evaluate.main(f"--adapter {full} --lists {prepared.path} --limit 5 --bootstrap 0 --generate".split())
    assert not (full / "results.json").exists()  # the training run's own stays what it was
    document = json.loads((full / "evaluation" / "results.json").read_text())
    assert list(document) == [*CHEAP, "generate", "tuned", "about"]
    assert 0 <= document["about"]["generate_invalid_rate"] <= 1
    assert "untuned" not in document
    assert document["about"]["lists"] == 5
    assert document["tuned"]["ndcg@3_interval"] == [None, None]
    printed = capsys.readouterr().out
    assert "predictions.jsonl" in printed
    assert "% of the answers were no permutation" in printed
    assert len((full / "evaluation" / "predictions.jsonl").read_text().splitlines()) == 5


def test_ratings_with_many_decimals_are_measured_without_trec_files(adapter, lists, tmp_path, capsys):
    odd = [replace(entry, ratings=tuple(rating + math.pi for rating in entry.ratings)) for entry in lists[:3]]
    write_prepared(tmp_path / "data", catalogue(300), {"test": odd})
    out = tmp_path / "out"
    evaluate.main(f"--adapter {adapter} --lists {tmp_path / 'data'} --output_dir {out} --bootstrap 0".split())
    assert {"results.json", "predictions.jsonl"} <= {path.name for path in out.iterdir()}
    assert not list(out.glob("*.trec"))
    assert f"written to {out}: results.json, predictions.jsonl\n" in capsys.readouterr().out


def test_a_base_alone_is_measured_zero_shot(adapter, prepared, tmp_path, capsys):
    """The same scores as the untuned row beside its adapter, judged against every baseline."""
    out, base = tmp_path / "out", adapter.parent / "base"
    words = f"--model_name_or_path {base} --lists {prepared.path} --template movies --output_dir {out} --device cpu"
    evaluate.main(words.split())
    printed = capsys.readouterr().out
    assert "NDCG@3, untuned - row, paired over users: untuned is " in " ".join(printed.split())
    document = json.loads((out / "results.json").read_text())
    assert list(document) == [*CHEAP, "untuned", "about"]
    assert {change["first"] for change in document["about"]["comparisons"]} == {"untuned"}
    evaluate.main(f"--adapter {adapter} --lists {prepared.path} --output_dir {tmp_path / 'tuned'} --device cpu".split())
    beside = json.loads((tmp_path / "tuned" / "results.json").read_text())["untuned"]
    assert {name: value for name, value in document["untuned"].items() if name != "lists_per_second"} == {
        name: value for name, value in beside.items() if name != "lists_per_second"
    }
    assert (out / "run.trec").is_file()
    words = f"--model_name_or_path {base} --lists {prepared.path} --output_dir {tmp_path / 'more'} --answer ratings"
    evaluate.main(f"{words} --template compact --limit 3 --bootstrap 0 --baselines none --device cpu".split())
    document = json.loads((tmp_path / "more" / "results.json").read_text())
    assert list(document) == ["random", "untuned", "about"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lists x", "give --adapter DIR for a tuned model, or --model_name_or_path BASE"),
        ("--lists x --adapter a --model_name_or_path b", "nothing to measure, or two things"),
        ("--lists x --adapter a --template movies", "--template is no option of --adapter, whose folder records it"),
        ("--preferences x --model_name_or_path b", "--preferences is no option of --model_name_or_path, a base"),
        ("--lists x --adapter a --baselines many", "--baselines 'many': expected one of cheap, all, none"),
    ],
)
def test_what_to_measure_is_checked_first(words, said):
    with pytest.raises(AlroFastError, match=said):
        evaluate.main(words.split())


def test_item_tokens_of_another_catalogue_are_refused(tmp_path):
    tokenizer, shelf, run = byte_tokenizer(), catalogue(9), tmp_path / "run"
    add_item_tokens(tokenizer, len(shelf))
    save_base(run, tokenizer)
    PromptBuilder(tokenizer, "movies", identifiers="items", items=shelf).save(run)
    (run / "config.yaml").write_text("answer: ranking\n")
    entries = {"test": random_lists(2, 3, history=2, items=9)}
    write_prepared(tmp_path / "own", shelf, entries)
    write_prepared(tmp_path / "other", [item._replace(title=f"Not {item.title}") for item in shelf], entries)
    own, other = (
        f"--adapter {run} --lists {tmp_path / name} --bootstrap 0 --device cpu".split() for name in ("own", "other")
    )
    with pytest.raises(AlroFastError, match=r"its data_manifest.json, .* is gone"):
        evaluate.main(own)
    (run / "data_manifest.json").write_text((tmp_path / "own" / "manifest.json").read_text())
    with pytest.raises(AlroFastError, match="other holds other items than it was trained on"):
        evaluate.main(other)
    assert not (run / "evaluation").exists()
    evaluate.main(own)
    assert (run / "evaluation" / "results.json").is_file()
