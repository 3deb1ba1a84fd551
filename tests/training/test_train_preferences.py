"""Preference runs end to end on a tiny base: stages, what they write, references kept on disk, every answer form."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import byte_tokenizer, catalogue, chat_tokenizer, random_lists, refused, save_base, tiny_llama
from transformers import LlamaForCausalLM

from alro_fast import evaluate, train
from alro_fast.data.lists import write_prepared
from alro_fast.data.negatives import positive
from alro_fast.data.preferences import read_preferences
from alro_fast.errors import AlroFastError
from alro_fast.evaluation.preferences import score_preferences
from alro_fast.modeling.loading import load_for_inference
from alro_fast.prompts.preference import PreferencePrompts
from alro_fast.ranking.ranker import Ranker
from alro_fast.training import kinds
from alro_fast.training.run_preferences import PreferenceRun
from alro_fast.training.stages import stack_adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, preference files of two domains, prepared lists, and a finished run of two stages."""
    folder = tmp_path_factory.mktemp("preferences")
    tokenizer = byte_tokenizer()
    for name, seed in (("base", 0), ("other", 1)):
        save_base(folder / name, tokenizer, seed=seed)
    for name, good in (("movies", "North"), ("games", "Glass")):
        rows = [
            {"prompt": f"User {u} of {name}. Next:", "chosen": f" {good} {u}", "rejected": [f" Echo {u}", f" Gold {u}"]}
            for u in range(8)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    lists = random_lists(14, range(3, 6), seed=3, history=3, items=60)
    splits = {"train": lists[:6], "valid": lists[6:9], "test": lists[9:]}
    write_prepared(folder / "data", catalogue(60), splits, {"dataset": "made", "tie_rule": "none needed"})
    train.main(staged(folder, "staged"))
    return folder


def staged(folder, output, *more):
    return options(
        folder, output, "--preferences", folder / "movies.json", "--eval_preferences", folder / "movies.json",
        folder / "games.json", "--stages", "sft,dmpo", "--stage_epochs", "3,4", "--stage_learning_rates",
        "0.003,0.01", "--warmup_steps", 0, "--dpo_beta", 0.5, "--eval_strategy", "epoch",
        *more,
    )  # fmt: skip


def options(folder, output, *more):
    words = {
        "--model_name_or_path": folder / "base", "--output_dir": folder / output, "--tokens_per_batch": 400,
        "--num_train_epochs": 1, "--learning_rate": 0.01, "--lora_r": 4, "--lora_alpha": 8, "--use_cpu": True,
        "--disable_tqdm": True, "--logging_steps": 1, "--save_strategy": "no",
    }  # fmt: skip
    if {"--max_steps", "--stage_epochs"} & set(map(str, more)):
        del words["--num_train_epochs"]
    if "--use_peft" in more:  # false, wherever it is given here
        del words["--lora_r"], words["--lora_alpha"]
    return [str(word) for pair in words.items() for word in pair] + [str(word) for word in more]


def scores(folder, file, **more):
    """Of the saved adapter, loaded as anybody would."""
    model, tokenizer = load_for_inference(folder, device="cpu", **more)
    found = score_preferences(model, PreferencePrompts(tokenizer), read_preferences(file))
    return np.concatenate([np.concatenate([one.chosen, one.rejected]) for one in found])


def test_stages_leave_an_adapter_each_and_the_second_prefers(folder):
    assert {path.name for path in (folder / "staged").iterdir()} == {"1-sft", "2-dmpo"}
    learned = load_file(folder / "staged" / "1-sft" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 1e-3 for name, tensor in learned.items() if "lora_B" in name)
    results = json.loads((folder / "staged" / "2-dmpo" / "preference_results.json").read_text())
    assert results["movies"]["tuned"]["pair_accuracy"] == 1.0
    assert results["movies"]["earlier stage"]["pair_accuracy"] < 1.0
    assert results.keys() == {"movies", "games"}
    config = yaml.safe_load((folder / "staged" / "2-dmpo" / "config.yaml").read_text())
    assert (config["objective"], config["num_train_epochs"], config["learning_rate"]) == ("dmpo", 4.0, 0.01)
    history = json.loads((folder / "staged" / "2-dmpo" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["preference"] == pytest.approx(np.log(2), abs=1e-6)  # the reference is the stage before
    assert any("eval_hit@1" in entry for entry in history)


def test_the_stacked_adapter_is_both_stages_in_one(folder):
    """Plain PEFT of rank 4 + 4 over the original base; its scores are those the run measured in memory."""
    config = json.loads((folder / "staged" / "2-dmpo" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["base_model_name_or_path"] == str(folder / "base")
    weights = load_file(folder / "staged" / "2-dmpo" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name} == {8}
    model, tokenizer = load_for_inference(folder / "staged" / "2-dmpo", device="cpu")
    people = read_preferences(folder / "games.json")
    found = score_preferences(model, PreferencePrompts(tokenizer), people)
    results = json.loads((folder / "staged" / "2-dmpo" / "preference_results.json").read_text())
    assert results["games"]["tuned"]["pair_accuracy"] == pytest.approx(
        np.mean(np.concatenate([one.wins() for one in found]))
    )


def test_stacked_and_merged_say_the_same(folder):
    """The same second stage written both ways: equal scores, and neither is the first stage's.

    The first has another rank and scale, and adapts other layers.
    """
    first, shape = folder / "first", ["--lora_r", 2, "--lora_alpha", 16, "--lora_target_modules", "q_proj", "v_proj"]
    argv = ["--preferences", folder / "movies.json", "--objective", "sft", *shape]
    train.main(options(folder, first, *argv, "--num_train_epochs", 3, "--warmup_steps", 0))
    for way in ("stacked", "merged"):
        more = ["--objective", "dmpo", "--preferences", folder / "movies.json", "--init_adapter", first]
        more += ["--lora_target_modules", "v_proj", "o_proj", "up_proj", "--stage_adapter", way]
        train.main(options(folder, way, *more, "--num_train_epochs", 2, "--warmup_steps", 0))
    file = folder / "movies.json"
    one, other, before = (scores(each, file) for each in (folder / "stacked", folder / "merged", first))
    np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-5)
    assert np.abs(one - before).max() > 0.1
    rewritten, base = (load_file(folder / path / "model.safetensors") for path in ("merged/merged_base", "base"))
    moved = {name.rsplit(".", 2)[1] for name, weight in base.items() if not weight.equal(rewritten[name])}
    assert moved == {"q_proj", "v_proj"}


@pytest.mark.parametrize("layers", [("all-linear", ["q_proj"]), (["q_proj", "up_proj"], ["q_proj", "o_proj"])])
@pytest.mark.parametrize("turned", [False, True])
def test_stacking_is_exact_whatever_the_ranks_scales_and_layers(tmp_path, layers, turned):
    """Random adapters: one of both over the base says what the second says over the base with the first merged in."""
    tiny_llama(60).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(4)
    kinds = [LoraConfig(r=2, lora_alpha=1, target_modules=layers[turned], init_lora_weights=False),
             LoraConfig(r=3, lora_alpha=6, target_modules=layers[not turned], init_lora_weights=False)]  # fmt: skip
    tokens = torch.arange(24).view(2, 12)
    says = []
    for name, kind in zip(("first", "second"), kinds):
        tuned = get_peft_model(model, kind)
        says.append(tuned(input_ids=tokens).logits)
        tuned.save_pretrained(tmp_path / name)
        model = tuned.merge_and_unload()
    stack_adapters(tmp_path / "first", tmp_path / "second")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    stacked = PeftModel.from_pretrained(base, tmp_path / "second")
    torch.testing.assert_close(stacked(input_ids=tokens).logits, says[1], rtol=1e-4, atol=1e-4)
    assert (says[1] - says[0]).abs().max() > 0.1
    assert stacked.peft_config["default"].r == 5


def test_a_resumed_run_skips_finished_stages(folder, capsys):
    before = (folder / "staged" / "2-dmpo" / "adapter_model.safetensors").stat().st_mtime_ns
    train.main(staged(folder, "staged", "--resume_from_checkpoint", "true"))
    assert capsys.readouterr().out.count("finished before") == 2
    assert (folder / "staged" / "2-dmpo" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_resumed_run_begins_a_stage_anew_that_has_no_whole_checkpoint(folder, capsys):
    """The first stage is finished, the second was killed while it saved its first checkpoint."""
    shutil.copytree(folder / "staged", folder / "cut")
    shutil.rmtree(folder / "cut" / "2-dmpo")
    (folder / "cut" / "2-dmpo" / "checkpoint-1").mkdir(parents=True)
    shutil.copy(folder / "staged" / "2-dmpo" / "config.yaml", folder / "cut" / "2-dmpo")
    train.main(staged(folder, "cut", "--resume_from_checkpoint", "true"))
    assert "checkpoint-1 is skipped: it has no config.yaml" in capsys.readouterr().out
    assert (folder / "cut" / "2-dmpo" / "adapter_model.safetensors").is_file()


def test_evaluate_measures_any_file_across_domains(folder, capsys, tmp_path):
    argv = ["--adapter", folder / "staged" / "2-dmpo", "--preferences", folder / "movies.json", folder / "games.json"]
    evaluate.main([*map(str, argv), "--output_dir", str(tmp_path), "--device", "cpu"])
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "preference_results.json").read_text())
    for domain in ("movies", "games"):
        assert f"{domain}, records: 8\n  untuned " in table
        assert results[domain]["tuned"]["records"] == 8
    assert results["movies"]["tuned"]["pair_accuracy"] == 1.0
    written = json.loads((folder / "staged" / "2-dmpo" / "preference_results.json").read_text())
    assert results["games"]["tuned"] == written["games"]["tuned"]
    both = [*argv, "--lists", folder / "data"]
    for wrong, said in ((["--adapter", folder], "nothing to measure on"), (both, "give one of them")):
        with pytest.raises(AlroFastError, match=said):
            evaluate.main([str(word) for word in wrong])


@pytest.mark.parametrize(
    "more",
    [
        ["--preference_answer", "titles", "--negatives", "popularity"],
        ["--preference_answer", "pairs", "--negatives_from", "candidates", "--num_negatives", 2],
        ["--preference_answer", "identifiers", "--negatives", "hardest", "--num_negatives", 3, "--num_train_epochs", 2],
    ],
)
def test_lists_train_in_every_form(folder, more, tmp_path):
    argv = ["--data_dir", folder / "data", "--objective", "dmpo", "--tokens_per_batch", 4000]
    train.main(options(tmp_path, "run", *argv, "--model_name_or_path", folder / "base", *more))
    results = json.loads((tmp_path / "run" / "preference_results.json").read_text())
    assert 0 <= results["made"]["tuned"]["user_auc"] <= 1
    if "titles" in more:  # the command draws the same contests, and so says the same
        argv = ["--adapter", tmp_path / "run", "--lists", folder / "data", "--output_dir", tmp_path / "measured"]
        evaluate.main([*map(str, argv), "--device", "cpu"])
        again = json.loads((tmp_path / "measured" / "preference_results.json").read_text())
        assert again["made"]["tuned"] == results["made"]["tuned"]
        with pytest.raises(AlroFastError, match="was tuned on answers that are titles"):
            Ranker.load(tmp_path / "run", device="cpu")
    if "identifiers" in more:  # such an adapter ranks lists as any other
        rankings = Ranker.load(tmp_path / "run", device="cpu").rank(random_lists(2, 4, items=60))
        assert all(sorted(ranking.order) == [0, 1, 2, 3] for ranking in rankings)


@pytest.mark.parametrize("form", ["titles", "identifiers"])
def test_mining_takes_the_hardest_of_the_pool(folder, tmp_path, form):
    """Every mined negative is at least as near to beating the positive as every one of its pool that was left.

    The pool of 28 is shown seven at a time, as training shows them.
    """
    argv = ["--data_dir", folder / "data", "--objective", "dmpo", "--negatives", "hardest", "--num_negatives", 7]
    argv += ["--preference_answer", form, "--model_name_or_path", folder / "base", "--tokens_per_batch", 4000]
    run = train.run_for(train.parse(options(tmp_path, "run", *argv)))
    run.mine(0)
    for i in range(3):
        one = run.lists["train"][i]
        pool, margin = run.negatives.pool(one, 0), {}
        for part in (pool[:7], pool[7:14], pool[14:21], pool[21:]):
            contest = run.negatives.shown(one, part, 0)
            [found] = score_preferences(run.model, run.prompts, [contest])
            best = positive(contest)
            others = [item for place, item in enumerate(contest.candidates) if place != best]
            margin |= dict(zip(others, found.rejected - found.chosen))
        mined = run.negatives.mined[one.list_id]
        assert len(mined) == 7
        assert len(margin) == 28
        assert min(margin[item] for item in mined) >= max(v for item, v in margin.items() if item not in mined)


def test_every_epoch_mines_anew_and_a_resumed_one_goes_on(folder, tmp_path, monkeypatch):
    """Resumed within the second epoch: its negatives are those it began with, and the run ends in the same weights."""
    mined, mine = {}, PreferenceRun.mine

    def note(run, epoch):
        mine(run, epoch)
        mined[epoch] = dict(run.negatives.mined)

    monkeypatch.setattr(PreferenceRun, "mine", note)
    argv = ["--data_dir", folder / "data", "--objective", "dmpo", "--negatives", "hardest", "--num_negatives", 2]
    argv += ["--model_name_or_path", folder / "base", "--tokens_per_batch", 600, "--num_train_epochs", 3]
    argv += ["--learning_rate", 0.05, "--warmup_steps", 0, "--save_strategy", "steps", "--save_steps", 1]
    argv += ["--save_total_limit", 20]
    train.main(options(tmp_path, "run", *argv))
    assert sorted(mined) == [0, 1, 2]
    assert mined[0] != mined[1] != mined[2]
    whole, weights = dict(mined), load_file(tmp_path / "run" / "adapter_model.safetensors")
    steps = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"]
    assert steps >= 6
    middle = steps // 3 + 1
    for step in range(middle + 1, steps + 1):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    mined.clear()
    train.main(options(tmp_path, "run", *argv, "--resume_from_checkpoint", tmp_path / "run" / f"checkpoint-{middle}"))
    assert mined == {1: whole[1], 2: whole[2]}
    again = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(weight.equal(again[name]) for name, weight in weights.items())


def test_references_are_computed_once_and_checked(folder, tmp_path):
    argv = ["--preferences", folder / "movies.json", "--objective", "dmpo", "--precompute_ref_log_probs", "true"]
    kept = ["--ref_log_probs", tmp_path / "kept.safetensors"]
    train.main(options(folder, "once", *argv, *kept))
    written = (tmp_path / "kept.safetensors").stat().st_mtime_ns
    train.main(options(folder, "twice", *argv, *kept))
    assert (tmp_path / "kept.safetensors").stat().st_mtime_ns == written
    train.main(options(folder, "live", *argv[:-2]))
    file = folder / "movies.json"
    np.testing.assert_allclose(scores(folder / "twice", file), scores(folder / "live", file), atol=1e-4)
    assert "of another model than this run's" in refused(
        [*options(folder, "wrong", *argv, *kept), "--model_name_or_path", folder / "other"]
    )
    assert "of other data or prompts" in refused(
        [*options(folder, "wrong", *argv, *kept), "--preferences", folder / "games.json"]
    )


def test_references_are_computed_in_the_precision_of_the_run(folder, tmp_path):
    """Under --bf16 the policy's own numbers: the first loss is log 2, and a file of a float32 run is refused."""
    argv = ["--preferences", folder / "movies.json", "--objective", "dmpo", "--precompute_ref_log_probs", "true"]
    argv += ["--max_steps", 1, "--dpo_beta", 1, "--model_name_or_path", folder / "base", "--ref_log_probs"]
    train.main(options(tmp_path, "half", *argv, tmp_path / "half.st", "--bf16", True))
    history = json.loads((tmp_path / "half" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["preference"] == pytest.approx(np.log(2), abs=1e-3)
    train.main(options(tmp_path, "full", *argv, tmp_path / "full.st"))
    half, full = (load_file(tmp_path / name)["log_probs"] for name in ("half.st", "full.st"))
    assert (half - full).abs().max() > 0.01
    words = options(tmp_path, "wrong", *argv, tmp_path / "full.st", "--bf16", True)
    assert "of another precision than this run's" in refused(words)


def test_every_weight_can_be_tuned_against_kept_references(folder):
    argv = ["--preferences", folder / "movies.json", "--objective", "dmpo", "--use_peft", "false"]
    assert "--use_peft false leaves no reference" in refused(options(folder, "full", *argv))
    train.main(options(folder, "full", *argv, "--precompute_ref_log_probs", "true"))
    assert (folder / "full" / "model.safetensors").is_file()
    history = json.loads((folder / "full" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["preference"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objective", "alro"], "--preferences has no meaning for --objective alro"),
        (["--stages", "sft,dmpo", "--stage_epochs", "1"], "has 1 values for 2 stages"),
        (["--stages", ","], "names no objective"),
        (["--objective", "dmpo", "--init_adapter", "FOLDER"], "no adapter_config.json there"),
        (["--objective", "dmpo", "--init_adapter", "ADAPTER", "--model_name_or_path", "OTHER"], "was trained over"),
        (["--objective", "dmpo", "--eval_strategy", "epoch"], "has nothing to evaluate"),
        (["--objective", "dmpo", "--max_length", "9"], "more than --max_length 9"),
        (["--objective", "dmpo", "--tokens_per_batch", "20"], "more than --tokens_per_batch 20"),
        (["--objective", "dmpo", "--model_name_or_path", "scratch", "--use_peft", "false"], "leaves no reference"),
    ],
)
def test_mistakes_get_one_line(folder, more, said, tmp_path):
    places = {"FOLDER": folder, "ADAPTER": folder / "staged" / "1-sft", "OTHER": folder / "other"}
    more = [places.get(word, word) for word in more]
    assert said in refused(options(folder, tmp_path / "mistake", "--preferences", folder / "movies.json", *more))


def test_dry_run_of_stages_writes_nothing(folder, capsys, tmp_path):
    train.main(
        options(
            folder, tmp_path / "dry", "--preferences", folder / "movies.json", "--stages", "sft,dmpo", "--dry_run", True
        )
    )
    plan = capsys.readouterr().out
    assert "sft on answers, answers as given" in plan
    assert "dmpo, answers as given" in plan
    assert not (tmp_path / "dry").exists()


def test_stages_with_files_of_their_own(folder, tmp_path):
    """Chosen answers of one file, preferences of another, of which each user's first negative; one record a batch."""
    taught = [{"instruction": "User 1. Next:", "input": "", "output": " North 1"}] * 2
    taught.append({"instruction": "User 2. Next:", "input": "", "output": " North 2"})
    (tmp_path / "taught.json").write_text(json.dumps(taught))
    files = f"{tmp_path / 'taught.json'},{folder / 'movies.json'}"
    argv = ["--stages", "sft,dmpo", "--stage_preferences", files, "--num_negatives", 1, "--lists_per_batch", 1]
    train.main(options(folder, tmp_path / "run", *argv))
    steps, configs = [], []
    for stage in ("1-sft", "2-dmpo"):
        steps.append(json.loads((tmp_path / "run" / stage / "trainer_state.json").read_text())["global_step"])
        configs.append(yaml.safe_load((tmp_path / "run" / stage / "config.yaml").read_text()))
    assert steps == [2, 8]
    assert [config["preferences"] for config in configs] == files.split(",")
    assert "num_negatives" not in configs[0]
    assert configs[1]["num_negatives"] == 1
    for more, said in (
        (["--num_negatives", 3], "movies-0 has 2 rejected answers, fewer than --num_negatives 3"),
        (["--stage_preferences", f"{folder / 'movies.json'},{tmp_path / 'taught.json'}"], "no rejected answer"),
        (["--stage_preferences", str(folder / "movies.json")], "has 1 values for 2 stages"),
        (["--preferences", folder / "movies.json"], "leave --preferences out"),
    ):
        assert said in refused(options(folder, tmp_path / "refused", *argv, *more))


def test_the_first_negatives_of_a_file_train_as_a_file_of_them(folder, tmp_path):
    rows = [row | {"rejected": row["rejected"][:1]} for row in json.loads((folder / "movies.json").read_text())]
    (tmp_path / "movies.json").write_text(json.dumps(rows))
    found = []
    for name, argv in (("few", [tmp_path / "movies.json"]), ("first", [folder / "movies.json", "--num_negatives", 1])):
        train.main(options(folder, tmp_path / name, "--objective", "dmpo", "--preferences", *argv))
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_recipes_name_the_release_and_the_paper():
    release, paper = (train.parse(["--config", name]).objective for name in ("dmpo-release", "dmpo"))
    assert (release.dmpo_variant, release.reference_free, release.ftx, release.dpo_beta) == (
        "mean_outside",
        True,
        1,
        0.1,
    )
    steps = train.parse(["--config", "dmpo-release"]).training
    assert steps.lists_per_batch * steps.gradient_accumulation_steps == 8
    assert (paper.dmpo_variant, paper.reference_free, paper.ftx) == ("dmpo", False, 0)


def test_the_release_tunes_on_its_own_rows_in_eights(folder, tmp_path, shared_data):
    """A hundred rows of supervised tuning, then a hundred users of three pairs: thirteen steps an epoch each."""
    stem = shared_data / "dmpo-prompts" / "rec_Amazon_Movie"
    files = [f"{stem}_sft_ranking.json", f"{stem}_dpo_ranking_3.json"]
    save_base(tmp_path / "chat", chat_tokenizer())
    argv = ["--config", "dmpo-release", "--model_name_or_path", tmp_path / "chat", "--output_dir", tmp_path / "run"]
    argv += ["--stage_preferences", ",".join(files), "--tokens_per_batch", 8192, "--use_cpu", "true"]
    argv = [str(word) for word in argv]
    planned = []
    for stage in kinds.stages(train.parse(argv), argv):
        stage.model.init_adapter = None  # the stage before is not trained here
        run = kinds.run_for(stage)
        planned.append((len(run.lists["train"]), run.trainer.planned_steps(), run.trainer.args.num_train_epochs))
    assert planned == [(100, 65, 5), (100, 39, 3)]


@pytest.mark.parametrize("data", ["data_ml_1m", "Amazon_Movie"])
def test_the_authors_files_train_and_evaluate(folder, tmp_path, shared_data, data):
    """Every k, a few users each, the release's own switches; then another domain's evaluation rows."""
    files = shared_data / "dmpo-prompts"
    chat = chat_tokenizer()
    save_base(tmp_path / "chat", chat)
    measured = [files / f"rec_{data}_eval_ranking.json", files / "rec_Amazon_Movie_sft_ranking.json"]
    for k in range(1, 6):
        argv = [
            "--config", "dmpo-release", "--stages", "dmpo", "--max_steps", 1,
            "--preferences", files / f"rec_{data}_dpo_ranking_{k}.json", "--eval_preferences", *measured,
            "--max_train_lists", 3, "--max_eval_lists", 3, "--max_test_lists", 3, "--tokens_per_batch", 8000,
            "--model_name_or_path", tmp_path / "chat",
        ]  # fmt: skip
        train.main(options(tmp_path, f"{data}-{k}", *argv))
        results = json.loads((tmp_path / f"{data}-{k}" / "1-dmpo" / "preference_results.json").read_text())
        assert results[f"rec_{data}_eval_ranking"]["tuned"]["valid"] == 1.0
