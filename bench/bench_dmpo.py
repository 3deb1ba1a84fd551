"""One DMPO step at 1:10 beside the ordinary ways, in one process: `pytest bench/bench_dmpo.py -s`.

Same model, LoRA, users and reference (the adapter switched off); prompts of 400 tokens, answers of 20.

    ours     each user's prompt once, 11 answers as branches; one packed forward for the policy, one for the reference
    padded   the same loss, 11 full padded sequences a user, logits of every position
    trl      TRL's DPOTrainer on the pairs a user expands to: 20 full padded sequences (absent if not installed)

Rounds alternate; figures are medians of ratios within a round. Losses and gradients are compared before anything is
timed; pairs train the mean outside the sigmoid, so ours is compared with TRL in that variant. Memory: peak resident
bytes over the built model (Linux), each way in a process of its own.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from alro_fast.losses.preference import dmpo_loss
from alro_fast.modeling.attention import answer_hidden_states, use_tree_attention
from alro_fast.modeling.layers import fuse_layers
from alro_fast.modeling.lm_head import head_of
from alro_fast.modeling.lora import fuse_lora
from alro_fast.modeling.packing import Tree, collate
from alro_fast.objectives.base import Batch, Example
from alro_fast.objectives.dmpo import DMPOObjective, branches_of
from alro_fast.options import ObjectiveArguments
from alro_fast.prompts.preference import AnswerIds, PreferenceIds

USERS, NEGATIVES, PROMPT, ANSWER = 2, 10, 400, 20
VOCAB, HIDDEN, LAYERS = 16_000, 256, 2
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
BETA, ROUNDS = 0.1, 3
AT_LEAST = {"padded": 15, "trl": 30}  # times their users per second
ROOT = Path(__file__).parents[1]


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=768, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def move_adapter(model: torch.nn.Module) -> None:
    """The same place some way from the start, so that policy and reference differ."""
    torch.manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def make_users(seed: int = 2) -> list[PreferenceIds]:
    draw = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(100, VOCAB, (count,), generator=draw).tolist()

    users = []
    for _ in range(USERS):
        prompt = tokens(PROMPT)
        branches = [AnswerIds(prompt, tokens(ANSWER)) for _ in range(1 + NEGATIVES)]
        users.append(PreferenceIds(branches, [0], list(range(1, 1 + NEGATIVES)), False, 0))
    return users


class Ours:
    """Objective dmpo over packed trees."""

    def __init__(self, variant: str = "dmpo") -> None:
        self.model = get_peft_model(make_base(), LORA)
        move_adapter(self.model)
        use_tree_attention(self.model)
        fuse_layers(self.model)
        fuse_lora(self.model)
        self.objective = DMPOObjective(ObjectiveArguments(dmpo_variant=variant, dpo_beta=BETA), None)
        users = make_users()
        examples = [Example(Tree(branches_of(ids)), (ids,), None) for ids in users]
        packed = collate([example.tree for example in examples], range(USERS))
        targets, counts = self.objective.targets(packed, examples)
        self.batch = Batch(packed, targets, counts, USERS, [])

    def step(self) -> float:
        batch = self.objective.complete(self.model, self.batch, lambda packed: answer_hidden_states(self.model, packed))
        hidden = answer_hidden_states(self.model, batch.packed)
        terms = self.objective.loss(hidden, head_of(self.model), batch.packed, batch.targets)
        terms[0].value.backward()
        return terms[0].value.item()


class Padded:
    """11 full sequences a user, one user at a time."""

    def __init__(self) -> None:
        self.model = get_peft_model(make_base(), LORA)
        move_adapter(self.model)
        self.users = [torch.tensor([b.prompt_ids + b.answer_ids for b in ids.branches]) for ids in make_users()]

    def sums(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return logps[:, PROMPT - 1 :].sum(1)

    def step(self) -> float:
        total = 0.0
        for ids in self.users:
            with torch.no_grad(), self.model.disable_adapter():
                reference = self.sums(ids)
            policy = self.sums(ids)
            loss = dmpo_loss(policy[:1], policy[None, 1:], reference[:1], reference[None, 1:], beta=BETA).loss / USERS
            loss.backward()
            total += loss.item()
        return total


class TRL:
    """DPOTrainer's own training step on the pairs of one user at a time."""

    def __init__(self) -> None:
        from datasets import Dataset
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="a")),
            eos_token="</s>", pad_token="<pad>",
        )  # fmt: skip
        args = DPOConfig(
            output_dir=tempfile.mkdtemp(), beta=BETA, use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to="none", per_device_train_batch_size=NEGATIVES, gradient_accumulation_steps=USERS,
            disable_tqdm=True,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a a"}] * NEGATIVES)
        self.trainer = DPOTrainer(
            make_base(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=LORA
        )
        self.trainer.current_gradient_accumulation_steps = USERS
        self.model = self.trainer.model
        move_adapter(self.model)
        self.batches = [
            self.trainer.data_collator(
                [
                    {
                        "prompt_ids": ids.branches[0].prompt_ids,
                        "chosen_ids": ids.branches[0].answer_ids,
                        "rejected_ids": ids.branches[b].answer_ids,
                    }
                    for b in ids.rejected
                ]
            )
            for ids in make_users()
        ]

    def step(self) -> float:
        return sum(self.trainer.training_step(self.model, batch).item() for batch in self.batches)


WAYS = {"ours": Ours, "padded": Padded, "trl": TRL}


def gradients(way: Any) -> dict[str, torch.Tensor]:
    """LoRA gradients of one step by short names, and none left behind."""
    found = {
        name.split("base_model.model.")[-1]: parameter.grad.clone()
        for name, parameter in way.model.named_parameters()
        if parameter.grad is not None
    }
    way.model.zero_grad(set_to_none=True)
    return found


def agree(one: Any, other: Any) -> None:
    """Losses and gradients of one step are equal but for rounding."""
    losses = one.step(), other.step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    mine, theirs = gradients(one), gradients(other)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def peak_memory(name: str) -> int:
    """Peak resident bytes that a step adds over the built model, in a process of its own."""
    code = f"from bench.bench_dmpo import measure_memory; measure_memory({name!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.splitlines()[-1])


def measure_memory(name: str) -> None:
    """Linux: the high-water mark is set back after building (getrusage's would begin with that of the parent)."""
    way = WAYS[name]()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    way.step()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.benchmark(group="dmpo step")
def test_dmpo_step(benchmark) -> None:
    """Equal losses and gradients, then users per second of every way, interleaved, and peak memory."""
    ways: dict[str, Any] = {"ours": Ours(), "padded": Padded()}
    agree(ways["ours"], ways["padded"])
    try:
        ways["trl"] = TRL()
    except ImportError as missing:
        benchmark.extra_info["trl"] = f"absent: {missing}"
    else:
        agree(Ours("mean_outside"), ways["trl"])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            way.step()
            seconds[name].append(time.perf_counter() - started)
            way.model.zero_grad(set_to_none=True)
    memory = {name: peak_memory(name) for name in ways}
    for name in ways:
        benchmark.extra_info[f"{name}_users_per_second"] = USERS / statistics.median(seconds[name])
        benchmark.extra_info[f"{name}_peak_bytes"] = memory[name]
        if name != "ours":
            ratio = statistics.median(other / mine for mine, other in zip(seconds["ours"], seconds[name]))
            benchmark.extra_info[f"times_{name}"] = ratio
            assert ratio >= AT_LEAST[name]
            assert memory["ours"] <= memory[name]
    benchmark.extra_info |= {
        "unique_tokens": ways["ours"].batch.packed.unique_tokens,
        "threads": torch.get_num_threads(),
    }
    for key, value in benchmark.extra_info.items():
        print(f"{key}: {value:,.2f}" if isinstance(value, float) else f"{key}: {value}")
    benchmark.pedantic(ways["ours"].step, rounds=3)
