"""Utilisation in the log, the profile of a run, and whose time is whose."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
from tiny import byte_tokenizer, random_lists, refused, tiny_llama

from alro_fast.errors import AlroFastError
from alro_fast.modeling.attention import answer_hidden_states
from alro_fast.modeling.lm_head import head_of
from alro_fast.objectives.base import build_objective
from alro_fast.options import ObjectiveArguments, RankerTrainingArguments
from alro_fast.prompts import PromptBuilder
from alro_fast.training.console import described
from alro_fast.training.plans.dataset import TreeDataset, build_batch
from alro_fast.training.speed.gemm_peak import gemm_peak
from alro_fast.training.speed.meter import Meter
from alro_fast.training.speed.profile import IDLE, OTHER, PARTS, VALIDATION, Table, _attention_marked, _Parts, part
from alro_fast.training.trainer import RankerTrainer

TOKENIZER = byte_tokenizer()
LISTS = random_lists(8, range(3, 6), seed=3, history=3)
CPU = torch.device("cpu")


def objective():
    prompts = PromptBuilder(TOKENIZER, "movies")
    return build_objective(ObjectiveArguments(objective="alro"), prompts, answer="ranking", seed=0)


def trainer(folder, **options):
    args = RankerTrainingArguments(
        output_dir=str(folder), use_cpu=True, logging_steps=2, save_strategy="no", disable_tqdm=True, **options
    )
    return RankerTrainer(tiny_llama(len(TOKENIZER)), args, objective(), TreeDataset(LISTS, objective()))


def test_the_peak_is_measured_once():
    peak = gemm_peak(CPU, torch.float32)
    assert 1e9 < peak < 1e14
    assert gemm_peak(CPU, torch.float32) == peak
    torch.set_num_threads(2)
    try:
        assert gemm_peak(CPU, torch.float32) != peak
    finally:
        torch.set_num_threads(1)


def test_the_log_tells_utilisation(tmp_path, capsys):
    """FLOPs of all steps since the last line, over their time and the peak; the last line is of the whole run."""
    run = trainer(tmp_path, max_steps=5, tokens_per_batch=1500)
    run.train()
    lines = [line for line in run.state.log_history if "utilisation" in line]
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    assert all(0 < line["utilisation"] < 1 for line in lines)
    laps = run.meter._laps
    assert len(laps) == 4  # one of them after the last line of a step
    assert sum(flops for flops, _ in laps) == pytest.approx(run.meter.flops().total)
    expected = laps[2][0] / laps[2][1] / gemm_peak(CPU, torch.float32)
    assert lines[2]["utilisation"] == pytest.approx(expected, abs=1e-3)
    whole = sum(flops for flops, _ in laps) / sum(seconds for _, seconds in laps) / gemm_peak(CPU, torch.float32)
    assert lines[3]["utilisation"] == pytest.approx(whole, abs=1e-3)
    assert "train_runtime" in lines[3]
    said = capsys.readouterr().out
    assert re.search(r"step 4/5: loss .* tokens/s, utilisation 0\.\d\d\n", said)
    assert re.search(r"step 5/5: trained in \d+ s, utilisation 0\.\d\d of the GEMM peak\n", said)


@pytest.mark.parametrize("eval_steps", [2, 3])
def test_validation_is_of_no_step(tmp_path, eval_steps):
    """Neither its forward passes nor its seconds count, on the steps of log lines and between them."""
    alone, validated = trainer(tmp_path / "alone", max_steps=6), trainer(tmp_path / "both", max_steps=6)
    validated.args.eval_strategy, validated.args.eval_steps = "steps", eval_steps
    validated.eval_dataset = validated.train_dataset
    slow = validated.get_eval_dataloader

    def slowly(*given):
        time.sleep(0.3)
        return slow(*given)

    validated.get_eval_dataloader = slowly
    for run in (alone, validated):
        run.train()
    assert sum("eval_loss" in line for line in validated.state.log_history) == 6 // eval_steps
    assert validated.meter.flops().total == pytest.approx(alone.meter.flops().total)
    runtime = validated.state.log_history[-1]["train_runtime"]
    steps = sum(seconds for _, seconds in validated.meter._laps)
    assert 0 < steps <= runtime - 0.3 * (6 // eval_steps)


def test_a_run_without_it_says_nothing_of_it():
    logs = {"loss": 1.0, "lists_per_second": 2.0, "unique_tokens_per_second": 3.0}
    assert described(logs) == "loss 1.0000, 2.0 lists/s, 3 tokens/s"
    assert described({"train_runtime": 3.0}) == ""


def test_profile(tmp_path):
    run = trainer(tmp_path, max_steps=5, tokens_per_batch=1500, profile=2)
    run.train()
    table = (tmp_path / "profile" / "table.md").read_text()
    assert table.startswith("# Steps 3 to 4\n")
    rows = {cells[1].strip(): cells for line in table.splitlines() if len(cells := line.split("|")) == 7}
    shares = {name: float(cells[3].split("%")[0]) for name, cells in rows.items() if name in (*PARTS, OTHER, IDLE)}
    assert list(shares) == [*PARTS, OTHER, IDLE]
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert all(shares[name] > 0 for name in PARTS)
    of_parts = [float(rows[name][4]) for name in ("trunk", "attention", "head")]
    assert float(rows["all"][4]) == pytest.approx(sum(of_parts), rel=0.02)
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"alro_fast part: {name}" for name in ("trunk", "attention", "loss", "collation")} <= names


def test_validation_is_not_profiled(tmp_path, monkeypatch):
    """A validation of a second between the profiled steps is no time of theirs."""
    run, given = trainer(tmp_path, max_steps=5, profile=2), []
    run.args.eval_strategy, run.args.eval_steps, run.eval_dataset = "steps", 3, run.train_dataset
    plain, table_of = run.get_eval_dataloader, Table.of
    monkeypatch.setattr(run, "get_eval_dataloader", lambda *args: time.sleep(1.0) or plain(*args))

    def noted(events, wall, *rest):
        given.append((events, wall, table_of(events, wall, *rest)))
        return given[-1][2]

    monkeypatch.setattr(Table, "of", noted)
    run.train()
    ((events, wall, table),) = given
    (validation,) = (event for event in events if event.name.endswith(f": {VALIDATION}"))
    assert table.wall == pytest.approx(wall - validation.time_range.elapsed_us() / 1e6)
    assert table.wall < wall - 1.0
    assert sum(table.seconds.values()) == pytest.approx(table.wall)
    within = sum(one.name == "alro_fast part: trunk" for one in events)
    assert within > 2  # validation had passes of its own
    sums = sum(event.self_cpu_time_total for event in events if event.thread == validation.thread) / 1e6
    assert sum(table.seconds.values()) - table.seconds[IDLE] < sums


def test_a_run_too_short_to_profile_is_refused(tmp_path):
    with pytest.raises(AlroFastError, match=r"--profile 4 needs 6 optimiser steps, .* this run has 5: lower it"):
        trainer(tmp_path, max_steps=5, profile=4).train()
    assert refused(["--profile", "0", "--output_dir", tmp_path]) == "--profile is 0; expected at least 1"


def test_backward_belongs_to_what_it_differentiates():
    """On one batch: every operation of the backward pass is in the part of its forward operation."""
    model, own = tiny_llama(len(TOKENIZER)), objective()
    batch = build_batch(own.examples(LISTS[:2], range(2), 0), own)
    with _attention_marked(), torch.profiler.profile(acc_events=True) as profile:
        with part("trunk"):
            hidden = answer_hidden_states(model, batch.packed)
        with part("loss"):
            terms = own.loss(hidden, head_of(model), batch.packed, batch.targets)
        sum(term.value for term in terms).backward()
    events = profile.events()
    parts = _Parts(events)
    found: dict[str, set[str]] = {}
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function: "):
            found.setdefault(event.name.split(": ")[1], set()).add(parts.of(event))
    attention = [name for name in found if "Attention" in name or "ScaledDot" in name or "Cascade" in name]
    assert attention
    assert all(found[name] == {"attention"} for name in attention)
    assert found["GeneratedBackwardFor_alro_fast_head_defaultBackward"] == {"head"}
    assert found["GeneratedBackwardFor_alro_fast_listwise_defaultBackward"] == {"loss"}
    assert found["EmbeddingBackward0"] == {"trunk"}
    wall = sum(event.self_cpu_time_total for event in events) / 1e6
    table = Table.of(events, wall, 1, None, Meter(model))
    assert sum(table.seconds.values()) == pytest.approx(wall)
    assert table.seconds["attention"] > 0 < table.seconds["head"]
    assert [one.seconds for one in table.operations] == sorted((one.seconds for one in table.operations), reverse=True)
