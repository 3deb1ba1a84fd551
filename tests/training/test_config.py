"""Recipes, flags and the file that records them."""

from __future__ import annotations

import json

import pytest
import yaml

from alro_fast.errors import AlroFastError
from alro_fast.prompts.template import TEMPLATES
from alro_fast.training.config import parse, recipe_names
from alro_fast.training.unread import WITHOUT_MEANING


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
        ("psl: js", "--psl 'js': expected one of kl, ce, symmetric"),
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning_rate -1", "--learning_rate is -1; expected at least 0"),
        ("--learning_rate nan", "--learning_rate is nan; expected at least 0, and finite"),
        ("--warmup_steps nan", "--warmup_steps is nan"),
        ("--num_train_epochs nan", "--num_train_epochs is nan; expected more than 0"),
        ("--num_train_epochs inf", "--num_train_epochs is inf; expected more than 0"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps is 0; expected at least 1"),
        ("--eval_tokens_per_batch 0", "--eval_tokens_per_batch is 0; expected at least 1"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers is -1; expected at least 0"),
        ("--weight_decay -0.1", "--weight_decay is -0.1; expected at least 0"),
        ("--adam_epsilon -1", "--adam_epsilon is -1; expected at least 0"),
        ("--adam_beta2 1", "--adam_beta2 is 1; expected at least 0, and below 1"),
        ("--seed -1", "--seed is -1; expected at least 0"),
        ("--seed 4294967296", "--seed is 4294967296; expected at least 0, and below 4,294,967,296"),
        ("--data_seed -1", "--data_seed is -1"),
        ("--gamma inf", "--gamma is inf; expected more than 0, and finite"),
        ("--gamma nan", "--gamma is nan"),
        ("--sigma nan", "--sigma is nan"),
        ("--alpha nan", "--alpha is nan; expected at least 0, and finite"),
        ("--beta inf", "--beta is inf; expected at least 0, and finite"),
        ("--objective dmpo --ftx -1", "--ftx is -1"),
        ("--objective dmpo --dpo_beta nan", "--dpo_beta is nan"),
        ("--lora_dropout nan", "--lora_dropout is nan"),
        ("--report_to nothing_there", "--report_to nothing_there is unknown, or not installed; expected none or"),
        ("--deepspeed zero.json", "--deepspeed needs the package deepspeed"),
    ],
)
def test_numbers_and_names_that_would_fail_later_are_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.setattr("alro_fast.options.is_deepspeed_available", lambda: False)
    with pytest.raises(AlroFastError) as caught:
        parse(["--output_dir", str(tmp_path), *words.split()])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--template novels", "no prompt template 'novels'"),
        ("--objective recranker --template demo", "--template demo is for --objective (alro|dmpo|sft), not recranker; "
         "give one of books, compact, items, movies, products, or a YAML file"),
        ("--template {tasks}", "--template .*movies.yaml is for --objective recranker, not alro; give one of books"),
        ("--stages sft,dmpo --template {tasks}", "is for --objective recranker, not"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_the_objective_is_found_while_parsing(words, said, tmp_path):
    words = words.format(tasks=TEMPLATES / "recranker" / "movies.yaml")
    with pytest.raises(AlroFastError, match=said):
        parse([*words.split(), "--data_dir", "lists", "--model_name_or_path", "base", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("manifest", "objective", "template"),
    [
        ({"dataset": "amazon-2023"}, "alro", "products"),
        ({"dataset": "csv", "rating_values": [1.0]}, "sft", "clicks"),
        ({"dataset": "csv", "rating_values": [1.0]}, "recranker", "items"),
        ({"dataset": "book-crossing"}, "recranker", "books"),
    ],
)
def test_the_template_follows_the_data_and_is_recorded(manifest, objective, template, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "alro_fast ranking lists", **manifest}))
    words = ["--objective", objective, "--model_name_or_path", "base", "--output_dir", "out", "--data_dir"]
    assert parse([*words, str(tmp_path)]).to_dict()["template"] == template
    assert parse([*words, str(tmp_path), "--template", "movies"]).to_dict()["template"] == "movies"
    assert parse([*words, str(tmp_path / "none")]).data.template is None  # what is no folder is said when it is opened


@pytest.mark.parametrize("name", sorted(WITHOUT_MEANING.keys() - {"liger_kernel_config"}))  # the last: no flag says it
def test_options_without_meaning_are_refused_wherever_they_stand(name, tmp_path):
    value = {
        "train_sampling_strategy": "group_by_length", "torch_compile_backend": "inductor",
        "torch_compile_mode": "default", "label_smoothing_factor": "0.1", "neftune_noise_alpha": "5",
        "per_device_train_batch_size": "8", "per_device_eval_batch_size": "8", "do_train": "false",
        "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": "false", "eval_accumulation_steps": "2",
        "average_tokens_across_devices": "false",
    }.get(name, "true")  # fmt: skip
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"{name}: {value}\n")
    for words in ([f"--{name}", value], [f"--{name.replace('_', '-')}={value}"], ["--config", str(recipe)]):
        with pytest.raises(AlroFastError, match=f"--{name} has no meaning here: .*;") as caught:
            parse([*words, "--output_dir", str(tmp_path)])
        assert "\n" not in str(caught.value)


def test_options_without_meaning_may_be_switched_off(tmp_path):
    words = ["--torch_compile", "false", "--label_smoothing_factor", "0", "--include_num_input_tokens_seen", "false"]
    assert not parse([*words, "--output_dir", str(tmp_path)]).training.torch_compile


def test_two_files_are_refused():
    with pytest.raises(AlroFastError, match=r"--config is given 2 times \(demo, mine.yaml\); give one"):
        parse(["--config", "demo", "--config=mine.yaml"])


def test_bfloat16_without_a_gpu_is_refused_by_the_name_of_its_flag(tmp_path, monkeypatch):
    monkeypatch.setattr("alro_fast.options.is_torch_bf16_gpu_available", lambda: False)
    words = ["--bf16", "true", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(AlroFastError, match=r"--bf16 true needs a GPU .* add --use_cpu true"):
        parse(words)
    assert parse([*words, "--use_cpu", "true"]).training.bf16
