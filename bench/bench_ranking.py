"""Ranking without text beside `generate` and parsing: `pytest bench/bench_ranking.py -s`.

One model with a LoRA adapter, the same 8 lists of 20 candidates behind 20 history items, the same prompts. `generate`
runs it as transformers and PEFT load it, `Ranker` as `Ranker.load` does. Rounds alternate; figures are medians of
wall-clock seconds per list and of CPU seconds per list (threads added up), which a busy machine disturbs less. The
answer takes one token per candidate, the least that generation can cost; `x 4` asks for four presentations of every
list, as `first, 4 shuffles` does.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alro_fast.data.records import Item, RankingList
from alro_fast.modeling.attention import use_tree_attention
from alro_fast.modeling.layers import fuse_layers
from alro_fast.modeling.lora import fuse_lora
from alro_fast.prompts import PromptBuilder
from alro_fast.ranking.generation import generate_and_parse
from alro_fast.ranking.orders import presentations
from alro_fast.ranking.ranker import Ranker

LISTS, CANDIDATES, HISTORY, ROUNDS = 8, 20, 20, 3
MODELS = {"4 x 128": (128, 4), "8 x 512": (512, 8)}  # layers x width
WORDS = ["Night", "River", "Gold", "Echo", "North", "Glass", "Summer", "Stone", "Paper", "Winter", "Harbour", "Letter"]


def make_lists() -> list[RankingList]:
    """Titles of two to five words with a year, three categories."""
    generator = np.random.default_rng(0)
    shelf = [
        Item(i, f"m{i}", f"{' '.join(generator.choice(WORDS, generator.integers(2, 6)))} ({1950 + i % 70})", "Drama")
        for i in range(400)
    ]
    lists = []
    for number in range(LISTS):
        drawn = [shelf[i] for i in generator.choice(len(shelf), HISTORY + CANDIDATES, replace=False)]
        ratings = tuple((generator.integers(1, 11, HISTORY + CANDIDATES) / 2).tolist())
        lists.append(
            RankingList(
                f"l{number}", "u", tuple(drawn[:HISTORY]), ratings[:HISTORY], tuple(drawn[HISTORY:]), ratings[HISTORY:]
            )
        )
    return lists


def presented(entry: RankingList) -> list[RankingList]:
    """The list in the four orders that `Ranker` shows."""
    return [
        replace(
            entry, candidates=tuple(entry.candidates[i] for i in order), ratings=tuple(entry.ratings[i] for i in order)
        )
        for order in presentations(entry, 4, seed=0).tolist()
    ]


def make_tokenizer(lists: list[RankingList]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words, as a real model's would."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    letters = [f" {chr(code)}" for code in range(65, 91)] * 100
    lines = [f"- {item.title} | {item.category} | 4.5 stars" for entry in lists for item in entry.candidates]
    rest = "Rank the candidates by how much this viewer will like them, the best first. Answer with their labels only."
    tokenizer.train_from_iterator([*letters, *lines, *[rest] * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def make_model(width: int, layers: int, fused: bool) -> PeftModel:
    """Random weights, a vocabulary of 32,000, an adapter of rank 16 on every linear layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        initializer_range=0.1,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config)
    use_tree_attention(model)
    if fused:
        fuse_layers(model)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, adapter).eval()
    if fused:
        fuse_lora(model)
    return model


def test_ranking_beside_generation():
    lists = make_lists()
    shuffled = [shown for entry in lists for shown in presented(entry)]
    tokenizer = make_tokenizer(lists)
    prompts = PromptBuilder(tokenizer, "movies")
    tokens = statistics.mean(len(prompt.prompt_ids) for prompt in prompts.rankings(lists))
    print(f"\n{LISTS} lists of {CANDIDATES}, {tokens:.0f} prompt tokens; {torch.get_num_threads()} threads")
    for name, (width, layers) in MODELS.items():
        ranker = Ranker(make_model(width, layers, fused=True), tokenizer, prompts)
        plain = Ranker(make_model(width, layers, fused=False), tokenizer, prompts)
        contestants = {
            "generate, batches of 1": lambda plain=plain: generate_and_parse(plain, lists, batch_size=1),
            "generate, batches of 8": lambda plain=plain: generate_and_parse(plain, lists, batch_size=8),
            "generate x 4, batches of 4": lambda plain=plain: generate_and_parse(plain, shuffled, batch_size=4),
            "first": lambda ranker=ranker: ranker.rank(lists),
            "first, 4 shuffles": lambda ranker=ranker: ranker.rank(lists, shuffles=4),
            "greedy": lambda ranker=ranker: ranker.rank(lists, method="greedy"),
        }
        wall, cpu = {key: [] for key in contestants}, {key: [] for key in contestants}
        for _ in range(ROUNDS):
            for key, contestant in contestants.items():
                started, used = time.perf_counter(), time.process_time()
                contestant()
                wall[key].append((time.perf_counter() - started) / LISTS)
                cpu[key].append((time.process_time() - used) / LISTS)
        wall, cpu = ({key: statistics.median(times) for key, times in table.items()} for table in (wall, cpu))
        invalid = generate_and_parse(ranker, lists).invalid_rate
        print(f"model {name}: {invalid:.0%} of the generated answers are no permutation")
        for key in contestants:
            speed = wall["generate, batches of 1"] / wall[key], cpu["generate, batches of 1"] / cpu[key]
            print(
                f"  {key:<28}{1000 * wall[key]:8.1f} ms/list {1000 * cpu[key]:8.1f} CPU ms/list"
                f"   {speed[0]:5.2f}x ({speed[1]:.2f}x CPU) of generate one by one"
            )
        assert all(sorted(found.order) == list(range(CANDIDATES)) for found in ranker.rank(lists, shuffles=4))
        assert cpu["first"] < min(cpu["generate, batches of 1"], cpu["generate, batches of 8"])
