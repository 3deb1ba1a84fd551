"""What the benchmarks of this folder run: two published configurations with random weights, prompts of ml-latest-small,
and an ALRO step over them, ours and the ordinary way.

Prompts are those that `alro_fast.train` writes: template `movies`, histories of 20, lists of 10, answers by letters,
one re-ordering. Their tokens are those of a byte-level BPE of 8,192 that is learned from all titles: no tokenizer of
the two models is at hand. The data is read where tests find it (`../shared/data` or $ALRO_FAST_SHARED_DATA).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

from alro_fast.data.lists import open_prepared
from alro_fast.data.prepared import FileOptions, prepare_lists
from alro_fast.data.records import RankingList
from alro_fast.data.windows import ListOptions
from alro_fast.losses.alro import alro_loss_from_logits
from alro_fast.modeling import attention, cpp_attention
from alro_fast.modeling.attention import answer_hidden_states, use_tree_attention
from alro_fast.modeling.layers import fuse_layers
from alro_fast.modeling.lm_head import head_of
from alro_fast.modeling.loading import make_scratch
from alro_fast.modeling.lora import fuse_lora
from alro_fast.modeling.packing import collate
from alro_fast.objectives.base import Example, Objective, build_objective
from alro_fast.options import ModelArguments, ObjectiveArguments
from alro_fast.prompts import PromptBuilder
from alro_fast.training.plans.dataset import build_batch

DATA = Path(os.environ.get("ALRO_FAST_SHARED_DATA", Path(__file__).parents[2] / "../shared/data")) / "ml-latest-small"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MADE = {  # https://huggingface.co/Qwen/Qwen3-0.6B and meta-llama/Llama-3.2-1B: their config.json, fewer layers
    "Qwen3-0.6B": lambda layers: Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, head_dim=128,
        num_attention_heads=16, num_key_value_heads=8, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": lambda layers: LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=32, num_key_value_heads=8, rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    "8 x 512": lambda layers: LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "4 x 256": lambda layers: LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "tiny": lambda layers: LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    ),
}  # fmt: skip
LAYERS = {"Qwen3-0.6B": 28, "Llama-3.2-1B": 16, "8 x 512": 8, "4 x 256": 4, "tiny": 2}  # of the published models
LEVERS = {  # what `Ours` leaves out when told to, in words
    "sharing": "every branch rows of its own",
    "sharing over lists": "a trie of each list, not of the batch",
    "answer rows": "head over every row",
    "last layer": "the last layer over every row",
    "fused layers": "norms, activations, rotations and linears by torch",
    "fused LoRA": "PEFT's LoRA modules",
    "C++ attention": "attention by torch's kernel",
    "C++ head": "the head in plain torch, tiled",
}


def make_model(name: str, layers: int, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """LoRA of rank 16 on every linear layer of the trunk, some way from its start; the same weights at every call."""
    torch.manual_seed(0)
    made: PretrainedConfig = MADE[name](layers)
    made.update(config)
    base = AutoModelForCausalLM.from_config(made, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for weight_name, parameter in model.named_parameters():
        if "lora_B" in weight_name:
            nn.init.normal_(parameter, std=0.02)
    return model


@cache
def prepared(history: int = 20) -> tuple[list[RankingList], PreTrainedTokenizerFast]:
    """Training lists of ml-latest-small and a tokenizer learned from its titles."""
    with tempfile.TemporaryDirectory() as folder:
        files = FileOptions("ml-latest-small", Path(folder) / "lists", True, DATA, allow_altered=True)
        prepare_lists(files, ListOptions(history_length=history))
        data = open_prepared(Path(folder) / "lists")
        items, lists = data.items, [*data.lists("train")]
    sizes = ModelArguments(scratch_vocab_size=8192, scratch_hidden_size=32, scratch_layers=1)
    return lists, make_scratch(sizes, items, 0)[1]


def make_objective(answer: str = "ranking", history: int = 20, **options: Any) -> Objective:
    """ALRO as `alro_fast.train` has it."""
    _, tokenizer = prepared(history)
    arguments = ObjectiveArguments(objective="alro", **options)
    return build_objective(arguments, PromptBuilder(tokenizer, "movies"), answer=answer, seed=0)


def examples(objective: Objective, count: int, seed: int = 0, history: int = 20) -> list[Example]:
    """A seeded draw of training lists."""
    lists, _ = prepared(history)
    chosen = torch.randperm(len(lists), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return objective.examples([lists[i] for i in chosen], chosen, epoch=0)


class Ours:
    """The step of `alro_fast.train`; `without`: a lever of LEVERS that is not pulled."""

    def __init__(self, model: nn.Module, objective: Objective, chosen: Sequence[Example], without: str = "") -> None:
        self.model, self.objective, self.without = model, objective, without
        use_tree_attention(model, answer_rows_only=without not in ("last layer", "answer rows"))
        if without != "fused layers":
            fuse_layers(model)
        if without != "fused LoRA":
            fuse_lora(model)
        if without == "C++ head":
            self.objective = build_objective(
                replace(objective.arguments, backend="eager"), objective.builder, answer=objective.answer, seed=0
            )
        self.take(chosen)

    def take(self, chosen: Sequence[Example]) -> None:
        """Another batch."""
        share = {"sharing": "none", "sharing over lists": "list"}.get(self.without, "batch")
        self.batch = build_batch(chosen, self.objective, share)

    def loss(self) -> Tensor:
        packed, head = self.batch.packed, head_of(self.model)
        with self._attention():
            if self.without == "answer rows":
                return self._over_every_row()
            hidden = answer_hidden_states(self.model, packed).to(head.weight.dtype)
            terms = self.objective.loss(hidden, head, packed, self.batch.targets)
        return sum(term.weight * term.value for term in terms)

    def _over_every_row(self) -> Tensor:
        """The answer rows first, then all others, without a label."""
        packed, head = self.batch.packed, head_of(self.model)
        trunk = attention.trunk_of(self.model)
        hidden = attention._run(trunk, packed).to(head.weight.dtype)
        answers = packed.segments.distinct_rows
        others = torch.ones(len(hidden), dtype=torch.bool).index_fill(0, answers, False).nonzero()[:, 0]
        table = packed.label_table
        empty = table.new_full((len(others), *table.shape[1:]), -100)
        wide = _Relabelled(packed, torch.cat([table, empty]))
        terms = self.objective.loss(hidden[torch.cat([answers, others])], head, wide, self.batch.targets)
        return sum(term.weight * term.value for term in terms)

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        if self.without != "C++ attention":
            return contextlib.nullcontext()
        return mock.patch.object(cpp_attention, "serves", return_value=False)


class _Relabelled:
    """A packed batch whose rows have other labels."""

    def __init__(self, packed: Any, label_table: Tensor) -> None:
        self.packed, self.label_table = packed, label_table

    def __getattr__(self, name: str) -> Any:
        return getattr(self.packed, name)


class Ordinary:
    """Hugging Face and PEFT as they come: a padded batch and a forward per order, all logits, labels= for the
    cross-entropy; the other terms of the loss from the logits of the answer rows, by torch."""

    def __init__(self, model: nn.Module, objective: Objective, chosen: Sequence[Example]) -> None:
        self.model, self.objective = model, objective
        self.take(chosen)

    def take(self, chosen: Sequence[Example]) -> None:
        """Another batch."""
        plain = build_batch(chosen, self.objective, "none")  # where each branch's rows are its own, in order
        self.lists, self.labels = plain.targets.lists, plain.packed.labels
        self.views = []
        for view in range(len(chosen[0].views)):
            branches = [(example.tree.ids[view], example.tree.answer_starts[view]) for example in chosen]
            width = max(len(ids) for ids, _ in branches)
            ids, mask = (torch.zeros(len(branches), width, dtype=torch.long) for _ in range(2))
            labels = torch.full((len(branches), width), -100)
            for row, (tokens, start) in enumerate(branches):
                n = len(tokens)
                ids[row, :n], mask[row, :n] = torch.from_numpy(tokens), 1
                labels[row, start:n] = ids[row, start:n]
            predicting = (labels[:, 1:] != -100).nonzero(as_tuple=True)
            self.views.append((ids, mask, labels, predicting))
        counts = [[len(ids) - start for ids, start in zip(e.tree.ids, e.tree.answer_starts)] for e in chosen]
        firsts = torch.tensor(counts).T.flatten().cumsum(0).roll(1).index_fill(0, torch.tensor(0), 0)  # view by view
        firsts = firsts.view(len(self.views), len(chosen)).T.tolist()  # [list][view]
        order = [first + k for each, sizes in zip(firsts, counts) for first, n in zip(each, sizes) for k in range(n)]
        self.order = torch.tensor(order)  # of labels, which go list by list, among the rows of all views
        self.tokens = sum(ids.numel() for ids, *_ in self.views)

    def loss(self) -> Tensor:
        options, sft, rows = self.objective.arguments, [], []
        for ids, mask, labels, predicting in self.views:
            out = self.model(input_ids=ids, attention_mask=mask, labels=labels)
            sft.append(out.loss)
            rows.append(out.logits[predicting])
        terms = alro_loss_from_logits(
            torch.cat(rows)[self.order].float(), self.labels, self.lists, backend="eager",
            alpha=options.alpha, beta=options.beta, gamma=1.0, sigma=options.sigma,
        )  # fmt: skip
        return sum(sft) / len(sft) + options.alpha * terms.soft_lambda + options.beta * terms.permutation


def step(way: Ours | Ordinary, optimizer: torch.optim.Optimizer, autocast: bool) -> float:
    """Forward, backward and optimiser; the loss."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = way.loss()
    loss.backward()
    optimizer.step()
    return loss.item()


def adamw(model: nn.Module, learning_rate: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)


def token_arithmetic(chosen: Sequence[Example]) -> dict[str, int]:
    """What a batch takes: padded rows, tokens of all branches, rows of a trie per list, rows of one for the batch."""
    trees = [example.tree for example in chosen]
    rows = {share: collate(trees, range(len(trees)), share).unique_tokens for share in ("none", "list", "batch")}
    longest = [max(len(tree.ids[view]) for tree in trees) for view in range(len(trees[0].ids))]
    return {"padded": sum(longest) * len(trees)} | rows
