"""Recipes, flags and the file that records them."""

from __future__ import annotations

import pytest
import yaml

from alro_fast.config import parse, recipe_names
from alro_fast.errors import AlroFastError


def test_the_command_line_wins_over_the_file(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("alpha: 0.25\nlora_target_modules: [q_proj, v_proj]\nlearning_rate: 1e-3\nuse_cpu: true\n")
    config = parse(["--config", str(recipe), "--alpha", "0.75", "--output_dir", str(tmp_path / "out")])
    assert config.objective.alpha == 0.75
    assert config.model.lora_target_modules == ["q_proj", "v_proj"]
    assert config.training.learning_rate == 1e-3
    assert config.recipe == "mine"


def test_the_recorded_configuration_parses_to_itself(tmp_path):
    config = parse(["--dataset", "demo", "--alpha", "0.3", "--use_cpu", "true", "--output_dir", str(tmp_path)])
    recorded = tmp_path / "recorded.yaml"
    recorded.write_text(yaml.safe_dump(config.to_dict()))
    assert parse(["--config", str(recorded)]).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", recipe_names())
def test_ready_recipes_parse(name, tmp_path):
    assert parse(["--config", name, "--output_dir", str(tmp_path)]).recipe == name


def test_the_demo_is_what_no_arguments_mean(tmp_path):
    assert parse(["--output_dir", str(tmp_path)]).recipe == "demo"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "did you mean learning_rate"),
        ("- a\n- b", "is not a configuration"),
        ("alpha: [", "is not a configuration"),
        ("alpha: much", "invalid float value"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(AlroFastError, match=said) as caught:
        parse(["--config", str(path)])
    assert "\n" not in str(caught.value)


def test_processes_that_would_not_train_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)  # such as one that processes cannot share
    with pytest.raises(AlroFastError, match=r"2 processes were launched, .* would train in 1 each; add --use_cpu true"):
        parse(["--output_dir", str(tmp_path)])
