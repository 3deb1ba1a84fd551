"""A tokenizer, random models and random lists, small enough to build inside a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alro_fast import train
from alro_fast.data.records import Item, RankingList
from alro_fast.errors import AlroFastError
from alro_fast.modeling.attention import use_tree_attention
from alro_fast.prompts import PromptBuilder

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def refused(argv) -> str:
    """The message of the one-line error that the train command ends with."""
    with pytest.raises(AlroFastError) as caught:
        train.main([str(word) for word in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a token per letter with the space before it."""
    letters = [chr(code) for code in (*range(65, 91), *range(97, 123))]
    space = "Ġ"
    pieces = ["</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(space + letter for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, [(space, letter) for letter in letters]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", name_or_path="test-bytes"
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a chat template, whose marks are tokens of their own."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_llama(vocab_size: int, seed: int = 0, **overrides) -> LlamaForCausalLM:
    """Random weights, large enough that scores are far from ties; on tree attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        }
        | overrides
    )
    model = LlamaForCausalLM(config).eval()
    use_tree_attention(model)
    return model


def save_base(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options) -> PreTrainedTokenizerFast:
    """A model of random weights and its tokenizer (bytes, unless given) as files of a folder; returns the tokenizer.

    options: those of `tiny_llama`.
    """
    tokenizer = tokenizer or byte_tokenizer()
    tiny_llama(len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_run(folder: Path, *, answer: str = "ranking", seed: int = 0) -> Path:
    """A base model and, over it, the folder a training run leaves: a LoRA adapter that changes the scores."""
    tokenizer = byte_tokenizer()
    base = tiny_llama(len(tokenizer), seed)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    torch.manual_seed(seed + 1)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, r=4)
    get_peft_model(base, lora).save_pretrained(folder / "run")
    tokenizer.save_pretrained(folder / "run")
    PromptBuilder(tokenizer, "movies").save(folder / "run")
    (folder / "run" / "config.yaml").write_text(f"answer: {answer}\ngamma: null\n", encoding="utf-8")
    return folder / "run"


def catalogue(count: int) -> list[Item]:
    """Items with titles of different lengths, some of them alike."""
    words = ["Night", "River", "Gold", "Echo", "North", "Glass"]
    return [
        Item(i, f"m{i}", " ".join(words[(i * k) % 6] for k in range(1, 2 + i % 3)), ["", "Drama", "Comedy"][i % 3])
        for i in range(count)
    ]


def random_lists(count: int, sizes, seed: int = 0, history: int = 5, items: int = 300) -> list[RankingList]:
    """`sizes`: candidates per list, a number or a range to draw from."""
    generator = np.random.default_rng(seed)
    shelf = catalogue(items)
    lists = []
    for number in range(count):
        size = sizes if isinstance(sizes, int) else int(generator.integers(sizes.start, sizes.stop))
        drawn = [shelf[i] for i in generator.choice(items, size + history, replace=False)]
        grades = generator.integers(1, 11, size + history) / 2
        lists.append(
            RankingList(
                f"l{number}", f"u{number}", tuple(drawn[:history]), tuple(map(float, grades[:history])),
                tuple(drawn[history:]), tuple(map(float, grades[history:])),
            )
        )  # fmt: skip
    return lists
