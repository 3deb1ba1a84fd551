"""The made catalogue and the shipped base model."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from places import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from alro_fast.data.demo import ADJECTIVES, GENRES, NOISE_SPREAD, NOUNS, make_demo, make_ratings, make_world
from alro_fast.data.lists import open_prepared
from alro_fast.data.oracle import read_oracle
from alro_fast.errors import AlroFastError
from alro_fast.evaluation.metrics import ndcg
from alro_fast.modeling.attention import use_tree_attention
from alro_fast.modeling.loading import DEMO_MODEL
from alro_fast.prompts import PromptBuilder
from alro_fast.ranking.ranker import Ranker


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo(folder, seed=0)
    return open_prepared(folder)


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def builder():
    return PromptBuilder(AutoTokenizer.from_pretrained(DEMO_MODEL), "demo")


@pytest.fixture(scope="module")
def script():
    """scripts/make_demo_model.py as a module."""
    path = ROOT / "scripts" / "make_demo_model.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def files_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class TestCatalogue:
    def test_same_seed_same_bytes_other_seed_other_lists(self, tmp_path):
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            make_demo(tmp_path / name, seed=seed, users=12, items=90)
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
        assert files_of(tmp_path / "a")["lists-test.parquet"] != files_of(tmp_path / "c")["lists-test.parquet"]

    def test_made_again_in_place(self, tmp_path):
        make_demo(tmp_path / "a", seed=3, users=12, items=90)
        before = files_of(tmp_path / "a")
        (tmp_path / "a" / ".oracle.parquet").touch()  # of one that was killed as it wrote
        make_demo(tmp_path / "a", seed=3, users=12, items=90)
        assert files_of(tmp_path / "a") == before

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        (tmp_path / "oracle.parquet").write_text("not ours")
        with pytest.raises(AlroFastError, match="something else"):
            make_demo(tmp_path, users=12, items=90)
        assert files_of(tmp_path) == {"thesis.txt": b"years of work", "oracle.parquet": b"not ours"}

    def test_titles_and_genres(self, demo):
        titles = [item.title for item in demo.items]
        assert len(set(titles)) == len(titles) == 240
        assert {item.category for item in demo.items} == set(GENRES)
        assert not set(ADJECTIVES) & set(NOUNS)

    def test_ratings_are_graded(self, demo):
        ratings = np.concatenate([one.ratings for one in demo.lists("test")])
        values, count = np.unique(ratings, return_counts=True)
        assert values.tolist() == [1, 2, 3, 4, 5]
        assert count.min() > 0.05 * len(ratings)
        assert demo.lists("test").all_equal.mean() < 0.02

    def test_every_user_has_every_split(self, demo):
        assert {split: len(demo.lists(split)) for split in ("train", "valid", "test")} == {
            "train": 1600,
            "valid": 400,
            "test": 400,
        }
        assert {len(one.candidates) for one in demo.lists("test")} == {10}
        assert {len(one.history) for one in demo.lists("train")} == {12}


class TestBestPossible:
    def test_expected_rating_is_the_mean_of_drawn_ratings(self):
        world = make_world(users=3, items=80, seed=1)
        user, item = np.repeat(np.arange(3), 80), np.tile(np.arange(80), 3)
        draw = np.random.default_rng(0)
        unrounded = world.centre(user, item) + NOISE_SPREAD * draw.standard_normal((20_000, 240))
        drawn = np.clip(np.rint(unrounded), 1, 5).mean(0)
        assert np.abs(drawn - world.expected_rating(user, item)).max() < 5 * 0.7 / math.sqrt(20_000)

    def test_oracle_lines_up_with_the_candidates(self, demo):
        oracle = read_oracle(demo.path / "oracle.parquet")
        for split in ("train", "valid", "test"):
            lists = demo.lists(split)
            error = [np.array(one.ratings) - oracle[one.list_id] for one in lists]
            assert np.abs(np.mean(error)) < 0.02
            assert np.std(error) < 0.6  # candidates in another order would be more than a star apart

    def test_no_ranker_beats_it(self, demo):
        lists = demo.lists("test")
        oracle = read_oracle(demo.path / "oracle.parquet")
        best = mean_ndcg(lists, [oracle[one.list_id] for one in lists])
        by_mean = mean_ndcg(lists, [demo.train_mean[[item.index for item in one.candidates]] for one in lists])
        by_count = mean_ndcg(lists, [demo.train_count[[item.index for item in one.candidates]] for one in lists])
        by_chance = mean_ndcg(lists, [np.zeros(10) for _ in lists])
        assert best > 0.9 > by_mean > by_count > by_chance + 0.02

    def test_popular_items_are_rated_more_often(self):
        world = make_world(users=300, items=100, seed=0)
        ratings = make_ratings(world, per_user=20, seed=0)
        assert np.corrcoef(np.bincount(ratings.item, minlength=100), world.popularity)[0, 1] > 0.9
        assert len(set(zip(ratings.user.tolist(), ratings.item.tolist()))) == 6000


def mean_ndcg(lists, scores):
    ratings = np.array([one.ratings for one in lists])
    return float(np.nanmean(ndcg(np.array(scores), ratings, 3)[~lists.all_equal]))


class TestShippedModel:
    def test_files_are_those_the_script_made(self):
        manifest = json.loads((DEMO_MODEL / "manifest.json").read_text())
        for name, digest in manifest["files"].items():
            assert hashlib.sha256((DEMO_MODEL / name).read_bytes()).hexdigest() == digest, name
        assert "model.safetensors" in manifest["files"]
        assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) < 4e6

    def test_page_is_encoded_as_it_was_taught(self, builder, demo):
        assert builder.max_candidates == 20
        one = demo.lists("test")[0]
        prompt = builder.ranking(one)
        tokenizer = builder._encoder.tokenizer
        text, answer = builder.text(one)
        assert tokenizer(text)["input_ids"] == prompt.prompt_ids
        assert tokenizer(text + answer)["input_ids"] == prompt.prompt_ids + prompt.answer_ids[:-1]
        assert tokenizer.unk_token_id not in prompt.prompt_ids
        assert builder.rate(one).grade_values == [1, 2, 3, 4, 5]

    def test_it_reads_the_page(self, script, base):
        taught = script.examine(base, script.make_tokenizer())
        assert min(taught[name] for name in ("tell_genres", "order_by_genre", "order_by_liking")) > 0.97
        assert taught["tell_stars_of_candidates"] > 0.9
        raw = script.examine(script.make_model(script.make_tokenizer()), script.make_tokenizer())
        assert max(raw.values()) < 0.4

    @pytest.mark.parametrize("answer, close", [("ranking", 0.04), ("ratings", 0.06)])
    def test_it_ranks_at_chance(self, base, builder, demo, answer, close):
        lists = demo.lists("test")
        model = use_tree_attention(copy.deepcopy(base))
        ranker = Ranker(model, builder._encoder.tokenizer, builder, answer=answer)
        untuned = mean_ndcg(lists, ranker.scores(lists))
        by_chance = mean_ndcg(lists, [np.zeros(10) for _ in lists])
        assert abs(untuned - by_chance) < close


class TestScript:
    def test_tokenizer_is_the_shipped_one(self, script, builder):
        made = json.loads(script.make_tokenizer().backend_tokenizer.to_str())
        assert made == json.loads(builder._encoder.tokenizer.backend_tokenizer.to_str())

    def test_same_weights_every_time_and_they_load(self, script, base, tmp_path):
        threads = torch.get_num_threads()
        try:
            for name in ("a", "b"):
                script.main(["--output_dir", str(tmp_path / name), "--steps", "2"])
        finally:
            torch.set_num_threads(threads)
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
        made, shipped = (json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "a", DEMO_MODEL))
        assert made.keys() == shipped.keys()
        assert made["files"].keys() == shipped["files"].keys()
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "a").state_dict()
        assert shapes(trained) == shapes(base.state_dict())
        raw = script.make_model(script.make_tokenizer()).state_dict()
        assert not any(torch.equal(trained[name], raw[name]) for name in trained)

    def test_an_answer_names_every_letter_once(self, script):
        draw = np.random.default_rng(0)
        for _ in range(30):
            page = script.draw_page(draw, 7, 5)
            for lesson in script.ORDERS:
                (_, asked), (answer, learned) = lesson(draw, page)
                letters = answer.removesuffix(script.EOS).split()
                assert (asked, learned, sorted(letters)) == (False, True, list("ABCDEFG"))
                if lesson is script.order_by_genre:
                    stars = [page.usual_stars[page.genres["ABCDEFG".index(letter)]] for letter in letters]
                    assert stars == sorted(stars, reverse=True)

    @pytest.mark.parametrize("options, said", [([], "--output_dir"), (["--output_dir", "x", "--steps", "0"], "steps")])
    def test_mistakes_are_told_before_any_work(self, script, options, said):
        with pytest.raises(AlroFastError, match=said):
            script.main(options)
