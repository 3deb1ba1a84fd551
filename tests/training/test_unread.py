"""Every option of `train`, in every kind of run: it changes the run, or it is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import typing

import pytest
import yaml
from tiny import byte_tokenizer, catalogue, random_lists, tiny_llama
from transformers import TrainingArguments
from transformers.utils import logging

from alro_fast import train
from alro_fast.data.lists import write_prepared
from alro_fast.errors import AlroFastError
from alro_fast.objectives.base import descriptions
from alro_fast.options import DataArguments, ModelArguments, ObjectiveArguments, RankerTrainingArguments
from alro_fast.training import kinds
from alro_fast.training.config import Config, parse, recipe_names
from alro_fast.training.unread import WITHOUT_MEANING, unread

RUNS = {  # kinds of run by the words that ask for them
    "alro": "--objective alro --model_name_or_path base --data_dir lists",
    "alro, made lists": "--objective alro --model_name_or_path base --dataset demo",
    "alro, lists to prepare": "--objective alro --model_name_or_path base --dataset ml-1m --raw_dir raw",
    "alro, grades": "--objective alro --model_name_or_path base --data_dir lists --answer ratings",
    "alro, no twins": "--objective alro --model_name_or_path base --data_dir lists --permutations 0",
    "alro, from scratch": "--objective alro --model_name_or_path scratch --data_dir lists --use_peft false",
    "alro, a later stage": "--objective alro --model_name_or_path base --data_dir lists --init_adapter first",
    "sft": "--objective sft --model_name_or_path base --data_dir lists",
    "sft on files": "--objective sft --model_name_or_path base --preferences p.json",
    "dmpo": "--objective dmpo --model_name_or_path base --data_dir lists",
    "dmpo on files": "--objective dmpo --model_name_or_path base --preferences p.json",
    "dmpo, no reference": "--objective dmpo --model_name_or_path base --data_dir lists --reference_free true",
    "dmpo, kept reference": "--objective dmpo --model_name_or_path base --data_dir lists "
    "--precompute_ref_log_probs true",
    "recranker": "--objective recranker --model_name_or_path base --data_dir lists",
    "stages": "--stages sft,dmpo --model_name_or_path base --data_dir lists",
}  # fmt: skip
MODEL = ["model_name_or_path", "use_peft", "init_adapter", "dtype", "trust_remote_code"]
LORA = ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"]
SCRATCH = ["scratch_hidden_size", "scratch_layers", "scratch_vocab_size"]
FITTED = ["max_length", "max_train_lists", "max_eval_lists", "max_test_lists"]
LISTS = ["data_dir", "template", "identifiers", *FITTED]
SCORES = ["gamma", "score", "score_space"]
TWINS = ["beta", "psl", "psl_space", "psl_detach"]
EMITTED = "psl_mask_emitted"
ALRO = [
    "objective",
    "backend",
    "answer",
    "baselines",
    "fuse",
    "alpha",
    "sigma",
    "permutations",
    *SCORES,
    *TWINS,
    EMITTED,
]
ANSWERS = ["preferences", "preference_answer", "num_negatives", "negatives", "negatives_from", "resample_negatives"]
OF_LISTS = {*ANSWERS} - {"preferences"}
DMPO = ["dpo_beta", "dmpo_variant", "reference_free", "ftx", "precompute_ref_log_probs"]
READ = {  # what each of them reads of our own options but those of the training: said apart from the code, on purpose
    "alro": [*MODEL, *LORA, *LISTS, *ALRO],
    "alro, made lists": [*MODEL, *LORA, *LISTS, "dataset", *ALRO],
    "alro, lists to prepare": [
        *MODEL, *LORA, *LISTS, "dataset", "raw_dir", "history_length", "list_size", "train_stride", *ALRO
    ],
    "alro, grades": [*MODEL, *LORA, *LISTS, *(set(ALRO) - {*SCORES, EMITTED})],
    "alro, no twins": [*MODEL, *LORA, *LISTS, *(set(ALRO) - {*TWINS, EMITTED})],
    "alro, from scratch": [*MODEL[:3], *SCRATCH, *LISTS, *ALRO],
    "alro, a later stage": [*MODEL, *LORA, "stage_adapter", *LISTS, *ALRO],
    "sft": [*MODEL, *LORA, *LISTS, "objective", "backend", "answer", "baselines", "fuse", "preferences"],
    "sft on files": [*MODEL, *LORA, *FITTED, "objective", "backend", *(set(ANSWERS) - OF_LISTS), "eval_preferences"],
    "dmpo": [*MODEL, *LORA, *LISTS, "objective", "backend", *ANSWERS, *DMPO],
    "dmpo on files": [
        *MODEL, *LORA, *FITTED, "objective", "backend", *(set(ANSWERS) - OF_LISTS), "eval_preferences", *DMPO,
        "num_negatives",
    ],
    "dmpo, no reference": [*MODEL, *LORA, *LISTS, "objective", "backend", *ANSWERS, *DMPO[:-1]],
    "dmpo, kept reference": [
        *MODEL, *LORA, *LISTS, "objective", "backend", *ANSWERS[:-1], *DMPO, "ref_log_probs"
    ],
    "recranker": [
        *MODEL, *LORA, *LISTS, "objective", "backend", "task_weights", "points_per_list", "pairs_per_list",
        "position_shifting", "hints", "hybrid", "baselines", "fuse",
    ],
    "stages": [*MODEL, *LORA, "stage_adapter", *LISTS, "objective", "backend", *ANSWERS, *DMPO],
}  # fmt: skip
PARTS = (ModelArguments, DataArguments, ObjectiveArguments)
OURS = [entry.name for part in PARTS for entry in dataclasses.fields(part)]
VALUES = {  # other values than the default, where a type does not tell one
    "psl": "ce",
    "objective": "sft", "lora_dropout": "0.5", "scratch_hidden_size": "64", "task_weights": "1,2,3", "dtype": "float32",
    "stages": "sft,alro", "stage_epochs": "1,2", "stage_learning_rates": "0.1,0.2", "lr_scheduler_type": "linear",
    "optim": "sgd", "eval_strategy": "epoch", "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
    "hub_strategy": "end", "ddp_backend": "gloo", "debug": "underflow_overflow", "log_level": "error",
    "log_level_replica": "error", "lr_scheduler_kwargs": '{"num_cycles": 1}', "adam_beta1": "0.5", "adam_beta2": "0.5",
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}', "fsdp_config": '{"min_num_params": 1}',
    "accelerator_config": '{"even_batches": false}',
    "train_sampling_strategy": "group_by_length", "torch_compile_backend": "inductor", "torch_compile_mode": "default",
    "dataloader_multiprocessing_context": "spawn", "liger_kernel_config": '{"rope": true}', "do_train": "false",
    "warmup_steps": "0.5", "dataloader_in_order": "false", "dataloader_pin_memory": "true", "optim_args": "a=1",
    "remove_unused_columns": "true", "resume_from_checkpoint": "elsewhere", "include_num_input_tokens_seen": "true",
    "eval_do_concat_batches": "true", "activation_checkpointing_kwargs": '{"use_reentrant": false}',
}  # fmt: skip


def known() -> dict[str, dataclasses.Field]:
    return {
        entry.name: entry
        for part in (*PARTS, RankerTrainingArguments)
        for entry in dataclasses.fields(part)
        if entry.init
    }


def another(entry: dataclasses.Field) -> str:
    """A value that is not the option's default."""
    if entry.name in VALUES:
        return VALUES[entry.name]
    default = None if entry.default is dataclasses.MISSING else entry.default
    if entry.metadata.get("choices"):
        return next(one for one in entry.metadata["choices"] if one != default)
    kind = str(entry.type)
    if isinstance(default, bool) or "bool" in kind:
        return str(not default).lower()
    if isinstance(default, int | float):
        return str(default + 1)
    return "3" if "int" in kind else "0.25" if "float" in kind else "other"


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.set_verbosity_warning()  # runs of other tests turn it down, and with it the default of --disable_tqdm


def words(run: str, *more: str) -> list[str]:
    return [*RUNS[run].split(), "--use_cpu", "true", "--output_dir", "out", *more]


def recorded(config: Config) -> dict:
    """What the run is made of: its own options as config.yaml has them, and transformers' as the Trainer gets them."""
    theirs = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    trainer = {name: value for name, value in config.training.to_dict().items() if name in theirs}
    return trainer | config.to_dict()


@pytest.mark.parametrize("run", RUNS)
def test_every_option_of_ours_changes_the_run_or_is_refused_by_name(run):
    before = recorded(parse(words(run)))
    for name in OURS:
        value = another(known()[name])
        if name in READ[run]:
            if f"--{name} " in RUNS[run] + " " or (name == "objective" and run == "stages"):
                continue  # what makes it this kind of run
            with contextlib.suppress(AlroFastError):  # two that do not go together: another matter, not silent
                after = recorded(parse(words(run, f"--{name}", value)))
                assert after[name] != before.get(name), name
        else:
            with pytest.raises(AlroFastError, match=rf"--{name} (is read|has no meaning|.* none of)") as caught:
                parse(words(run, f"--{name}", value))
            assert "\n" not in str(caught.value)
            assert name not in before, f"{name} is recorded and not read"


BESIDE = {  # what an option needs beside it
    "load_best_model_at_end": ["--eval_strategy", "steps"],
    "eval_steps": ["--eval_strategy", "steps"],
    "eval_delay": ["--eval_strategy", "steps"],
    "metric_for_best_model": ["--eval_strategy", "steps", "--load_best_model_at_end", "true"],
    "greater_is_better": ["--eval_strategy", "steps", "--load_best_model_at_end", "true"],
    "hub_model_id": ["--push_to_hub", "true"],
    "hub_strategy": ["--push_to_hub", "true"],
    "hub_private_repo": ["--push_to_hub", "true"],
    "hub_always_push": ["--push_to_hub", "true"],
    "hub_revision": ["--push_to_hub", "true"],
    "dataloader_prefetch_factor": ["--dataloader_num_workers", "1"],
}
MACHINE = (
    "tf32",
    "fp16",
    "ddp_backend",
    "fsdp",
    "deepspeed",
    "parallelism_config",
)  # refused where there is nothing for it
UNRECORDED = (
    "output_dir",
    "use_cpu",
    "hub_token",
    "report_to",
    "local_rank",
)  # given to every run here, or kept to itself


@pytest.mark.parametrize("name", [name for name in known() if name not in (*OURS, *UNRECORDED)])
def test_every_option_of_training_changes_the_run_or_is_refused_by_name(name):
    """Those of transformers too: the value given reaches the Trainer's arguments, or is refused."""
    value, run = another(known()[name]), "alro"
    if name in WITHOUT_MEANING or name in ("stage_epochs", "stage_learning_rates", "stage_preferences"):
        with pytest.raises(AlroFastError, match=f"--{name}(/| has no meaning| is read)"):
            parse(words(run, f"--{name}", value))
        return
    with contextlib.suppress(*((AlroFastError,) if name in MACHINE else ())):
        beside = words(run, *BESIDE.get(name, ()))
        before, after = recorded(parse(beside)), recorded(parse([*beside, f"--{name}", value]))
        assert after.get(name) != before.get(name), name


def test_an_option_is_refused_at_its_default_too_and_in_a_file(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("objective: dmpo\nalpha: 0.5\n")
    for argv in (["--objective", "dmpo", "--alpha", "0.5"], ["--config", str(recipe)]):
        with pytest.raises(
            AlroFastError, match="--alpha has no meaning for --objective dmpo; it is read by --objective a"
        ):
            parse([*argv, "--data_dir", "lists", "--output_dir", "out"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--max_steps 9 --num_train_epochs 2", "--num_train_epochs is read without --max_steps, which ends training"),
        (
            "--stages sft,dmpo --stage_epochs 1,2 --num_train_epochs 2",
            "--num_train_epochs is read without --max_steps,",
        ),
        (
            "--stages sft,dmpo --stage_epochs 1,2 --max_steps 9",
            "--stage_epochs is read with --stages, and without --max",
        ),
        (
            "--config dmpo --num_train_epochs 2",
            "--num_train_epochs is read without --max_steps, .* without --stage_epoc",
        ),
    ],
)
def test_epochs_that_steps_or_stages_would_override_are_refused(argv, said):
    with pytest.raises(AlroFastError, match=said):
        parse([*argv.split(), "--data_dir", "lists", "--model_name_or_path", "base", "--output_dir", "out"])


def test_epochs_of_a_recipe_give_way_to_steps_and_stages(tmp_path):
    config = parse(["--config", "demo", "--max_steps", "7", "--output_dir", "out"])
    assert config.training.max_steps == 7
    assert "num_train_epochs" not in config.to_dict()
    again = tmp_path / "config.yaml"
    again.write_text(yaml.safe_dump({"alro_fast_version": "0.1.0", **config.to_dict(), "num_train_epochs": 3.0}))
    assert parse(["--config", str(again), "--output_dir", "out"]).training.max_steps == 7  # as version 0.1.0 recorded
    argv = f"--config demo --stages sft,alro --stage_epochs 2,5 --output_dir {tmp_path / 'out'}".split()
    made = list(kinds.stages(parse(argv), argv))
    assert [stage.training.num_train_epochs for stage in made] == [2.0, 5.0]
    assert [stage.to_dict()["num_train_epochs"] for stage in made] == [2.0, 5.0]


def test_dpos_beta_is_named_where_another_is_meant():
    with pytest.raises(AlroFastError, match=r"--beta has no meaning for --objective dmpo; .* alro: give --dpo_beta$"):
        parse(words("dmpo", "--beta", "0.1"))


def test_what_the_command_line_decides_about_a_file_is_left_out(tmp_path):
    """A recipe's options for another objective, base or data than the one the command line names."""
    config = parse(["--config", "demo", "--objective", "dmpo", "--output_dir", "out"])
    assert "alpha" not in config.to_dict()
    mine = tmp_path / "mine.yaml"
    mine.write_text("dataset: ml-latest-small\nraw_dir: data\nhistory_length: 9\n")
    config = parse(["--config", str(mine), "--data_dir", "lists", "--output_dir", "out"])
    assert config.data.dataset == "demo"
    more = "--model_name_or_path NAME --use_peft true --template movies --identifiers letters --data_dir lists"
    assert parse(["--config", "recranker", *more.split()]).model.scratch_hidden_size == 128


@pytest.mark.parametrize("name", ["eval_steps", "eval_delay", "metric_for_best_model", "hub_model_id"])
def test_what_another_option_would_switch_on_is_refused_without_it(name):
    with pytest.raises(AlroFastError, match=f"--{name} is read with "):
        parse(words("alro", f"--{name}", another(known()[name])))


def test_a_file_of_the_version_before_leaves_out_what_its_run_did_not_read(tmp_path):
    """It recorded every option; written by hand, the same file is refused."""
    for version, refused in (("alro_fast_version: 0.1.0\n", False), ("", True)):
        file = tmp_path / "config.yaml"
        file.write_text(version + "objective: alro\nstage_adapter: stacked\nscratch_hidden_size: 128\n")
        if refused:
            with pytest.raises(AlroFastError, match=r"--\w+ is read with"):
                parse(["--config", str(file), "--output_dir", "out"])
        else:
            assert parse(["--config", str(file), "--output_dir", "out"]).objective.objective == "alro"


@pytest.mark.parametrize("argv", [["--config", ""], ["--data_dir", ""], ["--output_dir", ""], ["--init_adapter", ""]])
def test_empty_values_are_refused_by_name(argv):
    with pytest.raises(AlroFastError, match=f"^{argv[0]} is (given an empty value|empty); "):
        parse(argv)


def test_stages_resume_by_their_own_checkpoints(tmp_path):
    config = parse(words("stages", "--resume_from_checkpoint", "nope", "--output_dir", str(tmp_path / "none")))
    with pytest.raises(AlroFastError, match=r"--resume_from_checkpoint nope with --stages: .* give true or auto"):
        list(kinds.stages(config, []))


def test_emitted_candidates_are_masked_where_the_permutation_loss_is_read_slot_by_slot():
    given = ["--psl_mask_emitted", "true"]
    assert parse(words("alro", *given)).to_dict()["psl_mask_emitted"] is True
    for more in (["--beta", "0"], ["--psl_space", "vocab"], ["--permutations", "0"], ["--answer", "ratings"]):
        with pytest.raises(AlroFastError, match="--psl_mask_emitted is read with --answer ranking, --psl_space candid"):
            parse(words("alro", *given, *more))


def test_files_of_stages_stand_in_the_place_of_one():
    """They make it a run on files; beside --preferences they are refused."""
    run = ["--stages", "sft,dmpo", "--model_name_or_path", "base", "--stage_preferences", "a.json, b.json"]
    config = parse([*run, "--eval_preferences", "e.json", "--num_negatives", "2", "--output_dir", "out"])
    assert config.data.preferences is None
    with pytest.raises(AlroFastError, match="--data_dir is read without --preferences"):
        parse([*run, "--data_dir", "lists"])
    both = parse([*run, "--preferences", "c.json", "--output_dir", "out"])
    with pytest.raises(AlroFastError, match="--stage_preferences names the file of every stage; leave --preferences"):
        list(kinds.stages(both, run))
    with pytest.raises(AlroFastError, match="--stage_preferences is read with --stages"):
        parse([*run[2:], "--objective", "dmpo"])


def test_stages_take_what_one_of_them_reads():
    assert parse(words("stages", "--dpo_beta", "0.2")).objective.dpo_beta == 0.2
    with pytest.raises(AlroFastError, match="--alpha has no meaning for --objective sft on answers, dmpo"):
        parse(words("stages", "--alpha", "0.2"))
    with pytest.raises(AlroFastError, match="--objective alro is none of --stages sft,dmpo"):
        parse(words("stages", "--objective", "alro"))


def test_switching_off_by_its_other_name_is_giving_it():
    with pytest.raises(AlroFastError, match="--psl_detach has no meaning for --objective dmpo"):
        parse(words("dmpo", "--no_psl_detach"))


def test_grades_that_preferences_never_train_are_refused():
    with pytest.raises(AlroFastError, match="--answer has no meaning for --objective dmpo"):
        parse(words("dmpo", "--preference_answer", "identifiers", "--answer", "ratings"))


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_hold_what_their_runs_read(name):
    """Asked with the data that their first lines name."""
    more = ["--preferences", "p.json", "--model_name_or_path", "base"] if name.startswith("dmpo") else []
    assert parse(["--config", name, *more, "--output_dir", "out"]).recipe == name


def test_a_recorded_configuration_is_a_file_for_another_run(tmp_path):
    for run in RUNS:
        config = parse(words(run))
        file = tmp_path / "recorded.yaml"
        more = {"alro_fast_version": "0", "learned_answers": "ranking"}
        file.write_text(yaml.safe_dump(more | config.to_dict()))
        assert parse(["--config", str(file)]).to_dict() == config.to_dict(), run


# ---- what is declared as read is read

LOOKED_AT: set[str] = set()


def watched(part: type) -> type:
    """The class, noting in LOOKED_AT which of its fields are asked for."""
    names = {entry.name for entry in dataclasses.fields(part)}

    class Watched(part):
        def __getattribute__(self, name: str) -> typing.Any:
            if name in names:
                LOOKED_AT.add(name)
            return super().__getattribute__(name)

    return Watched


WATCHED = {part: watched(part) for part in PARTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter over it, prepared lists, raw ratings and a preference file."""
    folder = tmp_path_factory.mktemp("unread")
    tokenizer = byte_tokenizer()
    tiny_llama(len(tokenizer), num_hidden_layers=1).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lists = random_lists(9, 4, seed=3, history=3, items=60)
    splits = {"train": lists[:3], "valid": lists[3:6], "test": lists[6:]}
    write_prepared(folder / "lists", catalogue(60), splits, {"dataset": "made", "tie_rule": "none needed"})
    (folder / "p.json").write_text('[{"prompt": "a", "chosen": " N", "rejected": [" E", " G"]}]')
    with contextlib.chdir(folder):
        train.main(words("alro", *STEP.split(), "--output_dir", "first"))
    return folder


STEP = "--max_steps 1 --save_strategy no --disable_tqdm true --tokens_per_batch 6000 --report_to none"
TRAINED = [run for run in RUNS if run not in ("alro, made lists", "alro, lists to prepare", "stages")]


@pytest.mark.parametrize("run", TRAINED)
def test_what_is_declared_as_read_is_read(folder, tmp_path, monkeypatch, run):
    """One step of training, its options watched: none that is declared is left unlooked at."""
    monkeypatch.chdir(folder)
    more = ["--init_adapter", str(folder / "first")] if "stage" in run else []
    config = parse(words(run, *STEP.split(), *more, "--output_dir", str(tmp_path / "run")))
    for part in (config.model, config.data, config.objective):
        part.__class__ = WATCHED[type(part)]
    recording, flat = Config.to_dict, Config.flat

    def unseen(take):
        def taken(self):
            before = set(LOOKED_AT)
            found = take(self)
            LOOKED_AT.intersection_update(before)
            return found

        return taken

    monkeypatch.setattr(Config, "to_dict", unseen(recording))  # writing options down is not reading them
    monkeypatch.setattr(Config, "flat", unseen(flat))
    LOOKED_AT.clear()
    train.run_for(config).train()
    declared = {name for name in OURS if unread(name, flat(config)) is None}
    elsewhere = {"hybrid": "", "trust_remote_code": "", "eval_preferences": ""}
    missed = declared - LOOKED_AT - set(elsewhere) - {"preferences"}
    assert not missed


def test_every_option_of_objectives_has_a_reader():
    named = {name for one in descriptions().values() for name in one.reads}
    common = {entry.name for entry in dataclasses.fields(ObjectiveArguments)} - named
    assert common == {"objective", "backend"}
