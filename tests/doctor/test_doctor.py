"""What the doctor finds, says and asks to be mended."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from packaging.requirements import Requirement
from tiny import tiny_llama
from transformers import GPT2Config, GptOssConfig, LlamaConfig, MambaConfig

from alro_fast import doctor
from alro_fast.doctor import machine
from alro_fast.doctor.fused import fused_parts, small
from alro_fast.errors import AlroFastError


def said(capsys, *words: str) -> tuple[int, str]:
    try:
        doctor.main(words)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr().out


def test_rows_of_80_columns_and_one_object_of_json(capsys):
    status, text = said(capsys, "--model_name_or_path", "demo")
    lines = text.splitlines()
    assert max(map(len, lines)) < 80
    rows = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert rows[:7] == ["versions", "extras", "trackers", "backends", "cpu", "gpus", "compilers"]
    assert "torch 2." in text
    document = json.loads(said(capsys, "--json")[1])
    assert status == (2 if document["problems"] else 0)
    assert document["versions"]["torch"] == torch.__version__
    assert "eager" in document["backends"]["cpu"]
    assert document["cpu"]["threads"] == torch.get_num_threads()


def test_it_starts_by_its_name():
    done = subprocess.run([sys.executable, "-m", "alro_fast.doctor", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model_name_or_path" in done.stdout


def test_what_is_declared_and_not_there_is_a_problem_with_its_cure():
    wanted = ["torch>=2.11", "torch<1", "no-such-thing>=2", "absent; extra == 'plots'", "gone; python_version < '3'"]
    old, none = machine.unmet(map(Requirement, wanted))
    assert old.startswith("torch is version 2.")
    assert "expected <1" in old
    assert none == "no-such-thing is not installed; expected >=2: pip install 'no-such-thing>=2'"


def test_slow_backends_and_refused_models_are_problems(monkeypatch, capsys):
    monkeypatch.setattr(machine, "_requirements", list)
    assert machine.problems({"backends": {"cpu": ["cpp", "eager"]}}) == []
    (slow,) = machine.problems({"backends": {"cpu": ["eager"]}})
    assert slow.startswith("backend cpp does not serve cpu")
    assert slow.endswith("the slower eager does; install a C++ compiler and then alro_fast again")
    assert machine.problems({"backends": {}, "model": {"refused": "sinks"}}) == ["sinks"]


def saved(config, folder) -> str:
    config.save_pretrained(folder)
    return str(folder)


def test_what_is_fused_is_found_by_the_configuration_alone(tmp_path):
    rows = fused_parts(saved(LlamaConfig(architectures=["LlamaForCausalLM"]), tmp_path / "llama"))
    assert rows["fused"] == "tree attention, LM head, norms, MLPs, rotations, LoRA"
    assert rows["not fused"] == "nothing"
    rows = fused_parts(saved(GPT2Config(architectures=["GPT2LMHeadModel"]), tmp_path / "gpt2"))
    assert rows["fused"] == "tree attention, LM head"
    assert "5 of 5 norms, 2 of 2 MLPs" in rows["not fused"]
    assert "LoRA modules, the last layer" in rows["not fused"]
    quantised = LlamaConfig(architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised linears" in fused_parts(saved(quantised, tmp_path / "quantised"))["not fused"]


def test_models_that_cannot_be_trained_and_names_of_none(tmp_path, capsys):
    folder = saved(GptOssConfig(architectures=["GptOssForCausalLM"]), tmp_path / "sinks")
    status, text = said(capsys, "--model_name_or_path", folder)
    assert status == 2
    assert "problem    GptOssAttention uses attention sinks" in text
    with pytest.raises(AlroFastError, match=r"--model_name_or_path .*nowhere: no causal LM can be made"):
        fused_parts(str(tmp_path / "nowhere"))
    folder = saved(MambaConfig(architectures=["MambaForCausalLM"]), tmp_path / "mamba")
    assert "layers of type linear_attention" in fused_parts(folder)["refused"]


def test_a_small_model_leaves_its_configuration_alone():
    config = tiny_llama(100).config
    before = config.to_dict()
    model = small(config)
    assert config.to_dict() == before
    assert sum(p.numel() for p in model.parameters()) < 200_000
