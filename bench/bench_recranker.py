"""RecRanker's questions about one user as a tree, beside the same prompts unshared.

`pytest bench/bench_recranker.py -s`. Pointwise over 20 candidates, and pairwise over 10 pairs in both orders: 20
prompts each, behind 50 liked or rated items. Ordinary: Hugging Face model with PEFT and SDPA, the prompts padded to one
batch, and no logits but those that are needed (the last position in inference, answer positions in training). Ours: one
tree, fused layers. Unshared: ours with rows of its own for every prompt, so that what sharing alone saves is seen. Same
model, same prompts, equal results to 1e-4; one thread; rounds alternate; ratios are medians over rounds of CPU seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alro_fast.data.records import Item, RankingList
from alro_fast.modeling.attention import tree_hidden_states, use_tree_attention
from alro_fast.modeling.layers import fuse_layers
from alro_fast.modeling.lm_head import head_of
from alro_fast.modeling.lora import fuse_lora
from alro_fast.modeling.memory import keep_freed_memory
from alro_fast.modeling.packing import Branch, PackedBatch, Tree, collate
from alro_fast.ops import linear_logprobs
from alro_fast.prompts.recranker.prompts import Ask, RecRankerPrompts

HISTORY, CANDIDATES, PAIRS, ROUNDS = 60, 20, 10, 3
VOCAB, HIDDEN, LAYERS = 32_000, 256, 4
WORDS = ["Night", "River", "Gold", "Echo", "North", "Glass", "Summer", "Stone", "Paper", "Winter", "Harbour", "Letter"]


def make_list() -> RankingList:
    """60 rated items, 50 of them liked; 20 candidates rated and hinted; titles of two to five words with a year."""
    draw = np.random.default_rng(0)
    shelf = [
        Item(i, f"m{i}", f"{' '.join(draw.choice(WORDS, draw.integers(2, 6)))} ({1950 + i % 70})")
        for i in range(HISTORY + CANDIDATES)
    ]
    past = [2.0 if h % 6 == 5 else 4.0 + (h % 3) / 2 for h in range(HISTORY)]
    ratings = [float(r) for r in (np.arange(CANDIDATES) % 10 + 1) / 2]
    hints = [float(h) for h in draw.uniform(1, 5, CANDIDATES)]
    return RankingList(
        "l", "u", tuple(shelf[:HISTORY]), tuple(past), tuple(shelf[HISTORY:]), tuple(ratings), tuple(hints)
    )


def make_tokenizer(entry: RankingList) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words, as a real model's would; digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    letters = [f" {chr(code)}" for code in range(65, 91)] * 100
    words = 'Would the viewer prefer over? Hint: Answer: Yes No Movie: "Movies rated, from awful to superb stars:'
    tokenizer.train_from_iterator([*letters, *[item.title for item in entry.history] * 5, *[words] * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def make_prompts(task: str) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids of the task's 20 questions about one user."""
    entry = make_list()
    prompts = RecRankerPrompts(make_tokenizer(entry), "movies")
    if task == "pointwise":
        made = prompts.encode([Ask(entry, points=range(CANDIDATES))])[0]
        return [(made.rated_ids + one.ids, one.answer_ids) for one in made.points]
    pairs = [(i, CANDIDATES - 1 - i) for i in range(PAIRS)]
    made = prompts.encode([Ask(entry, pairs=[way for pair in pairs for way in (pair, pair[::-1])])])[0]
    return [(made.liked_ids + one.ids, one.answer_ids) for one in made.pairs]


def make_model() -> torch.nn.Module:
    """4 layers of 256, LoRA of rank 16 on every linear layer of the trunk, some way from its start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


class Ours:
    """One tree in one stream; not shared: a tree for every prompt."""

    def __init__(self, prompts: list[tuple[list[int], list[int]]], shared: bool = True) -> None:
        self.model = make_model()
        use_tree_attention(self.model)
        fuse_layers(self.model)
        fuse_lora(self.model)
        self.learning, self.asking = (_stream(prompts, length, shared) for length in (None, 1))
        self.tokens = self.learning.unique_tokens

    def loss(self) -> torch.Tensor:
        head = head_of(self.model)
        hidden = tree_hidden_states(self.model, self.learning)
        return -linear_logprobs(hidden, head.weight, self.learning.labels)[0].mean()

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """Log-probability of each answer's first token."""
        hidden = tree_hidden_states(self.model, self.asking)
        return linear_logprobs(hidden, head_of(self.model).weight, self.asking.labels)[0]


def _stream(prompts: list[tuple[list[int], list[int]]], length: int | None, shared: bool) -> PackedBatch:
    """Prompts with the first `length` tokens of their answers."""
    branches = [Branch(prompt + answer[:length], len(prompt)) for prompt, answer in prompts]
    return collate([Tree(branches)], [0], "batch" if shared else "none")


class Ordinary:
    """Twenty rows, padded."""

    def __init__(self, prompts: list[tuple[list[int], list[int]]]) -> None:
        self.model = make_model()
        width = max(len(prompt) + len(answer) for prompt, answer in prompts)
        self.ids, self.mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width)
        labels = torch.full((len(prompts), width), -100)
        longest = max(len(prompt) for prompt, _ in prompts)
        self.left_ids, self.left_mask = self.ids[:, :longest].clone(), self.mask[:, :longest].clone()
        for row, (prompt, answer) in enumerate(prompts):
            n = len(prompt) + len(answer)
            self.ids[row, :n], self.mask[row, :n] = torch.tensor(prompt + answer), 1
            labels[row, len(prompt) : n] = torch.tensor(answer)
            self.left_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.left_mask[row, longest - len(prompt) :] = 1
        self.rows = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        self.labels = labels[:, 1:][self.rows]
        self.first = torch.tensor([answer[0] for _, answer in prompts])
        self.tokens = self.ids.numel()

    def loss(self) -> torch.Tensor:
        causal = self.model.get_base_model()
        hidden = causal.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).last_hidden_state
        return torch.nn.functional.cross_entropy(causal.lm_head(hidden[self.rows]), self.labels)

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        places = (self.left_mask.cumsum(1) - 1).clamp(min=0).long()
        out = self.model(
            input_ids=self.left_ids, attention_mask=self.left_mask, position_ids=places, logits_to_keep=1,
            use_cache=False,
        )  # fmt: skip
        return out.logits[:, -1].log_softmax(-1).gather(1, self.first[:, None])[:, 0]


def stepper(way: Ours | Ordinary) -> Callable[[], None]:
    """One training step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in way.model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        way.loss().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("task", ["pointwise", "pairwise"])
@pytest.mark.benchmark(group="recranker")
def test_tasks_of_one_user(benchmark, task) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    prompts = make_prompts(task)
    ways = {"ours": Ours(prompts), "unshared": Ours(prompts, shared=False), "ordinary": Ordinary(prompts)}
    ours = ways["ours"]
    for other in list(ways.values())[1:]:
        torch.testing.assert_close(ours.read(), other.read(), rtol=1e-4, atol=1e-4)
        assert ours.loss().item() == pytest.approx(other.loss().item(), rel=1e-4)
    tokens = ", ".join(f"{name} {way.tokens:,}" for name, way in ways.items())
    print(f"\n{task}, {len(prompts)} prompts; tokens: {tokens}")
    runs = {
        "training": {name: stepper(way) for name, way in ways.items()},
        "inference": {name: way.read for name, way in ways.items()},
    }
    for kind, contestants in runs.items():
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS + 1):  # the first round warms up
            for name, run in contestants.items():
                before = time.process_time()
                run()
                taken[name].append(time.process_time() - before)
        seconds = {name: statistics.median(times[1:]) for name, times in taken.items()}
        print(
            f"  {kind}: " + ", ".join(f"{name} {1000 * median:,.0f} ms" for name, median in seconds.items()), end=": "
        )
        for other in ("unshared", "ordinary"):
            ratio = statistics.median(theirs / mine for mine, theirs in zip(taken["ours"][1:], taken[other][1:]))
            benchmark.extra_info |= {f"{kind}_over_{other}": ratio, f"{kind}_{other}_s": seconds[other]}
            print(f"{ratio:.1f}x {other}", end="  ")
            assert ratio >= 7
        benchmark.extra_info[f"{kind}_ours_s"] = seconds["ours"]
        print()
    benchmark.pedantic(ours.read, rounds=3)
