"""Tokenizers of every kind prompts must work with, built here (no hub, no network), and lists to put into prompts."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from itertools import takewhile

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alro_fast.data.records import Item, RankingList, Signal
from alro_fast.prompts import PromptBuilder, add_item_tokens
from alro_fast.prompts.template import TEMPLATES

NAN = math.nan


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


CORPUS = [path.read_text() for path in sorted(TEMPLATES.glob("*.yaml"))]


CORPUS += [f" {c} {d}\n" for c in LETTERS for d in "0123456789"] * 4 + ["Toy Story (1995) Heat Movie Comedy"] * 9


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(specials, split=None):
    tokenizer = Tokenizer(models.BPE(ignore_merges=split is not None))
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_bpe(specials, prepend, corpus=CORPUS):
    """BPE over whole text with word-start marks, unknown characters as bytes: as Llama 2 (prepend) and Gemma."""
    words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    words.pre_tokenizer = pre_tokenizers.Metaspace()  # while training only
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1100, special_tokens=[*specials, *bytes_], show_progress=False, initial_alphabet=list("▁")
    )
    words.train_from_iterator([line for text in corpus for line in text.split()], trainer)
    content = json.loads(words.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in specials]
    content["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def starts_with(tokenizer, bos):
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


@cache
def tokenizer_backend(kind):
    if kind == "gpt2":
        return byte_level(["<|endoftext|>"])
    if kind == "qwen":
        return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], GPT4_SPLIT)
    if kind == "llama3":
        names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return starts_with(byte_level(names, GPT4_SPLIT), "<|begin_of_text|>")
    if kind in {"llama2", "llama2-chat"}:
        return starts_with(sentencepiece_bpe(["<unk>", "<s>", "</s>"], prepend=True), "<s>")
    if kind == "gemma":
        names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        tokenizer = sentencepiece_bpe(names, prepend=False)
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "\n\n", "▁▁", "<b>")])
        return starts_with(tokenizer, "<bos>")
    if kind == "unigram":
        pieces = {"<unk>": 0.0, "</s>": 0.0} | {f"▁{word}": -4.0 - len(word) / 9 for word in " ".join(CORPUS).split()}
        pieces |= {f"▁{c}": -3.0 for c in LETTERS} | dict.fromkeys([*LETTERS, *"0123456789.:|-()▁\n<>/"], -6.0)
        pieces |= {f"<0x{value:02X}>": 0.0 for value in range(256)}
        tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0, byte_fallback=True))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer
    if kind == "words":
        words = " ".join(CORPUS).split() + list(LETTERS) + list(".:|-()")
        vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "</s>", *words]))}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer
    if kind == "characters":
        characters = dict.fromkeys(["<unk>", "</s>", *"".join(CORPUS), *LETTERS, "\n"])
        tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        return tokenizer
    raise KeyError(kind)


WRAP = {
    "gpt2": {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": LLAMA3},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "llama2-chat": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA2},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "chat_template": GEMMA},
    "unigram": {"eos_token": "</s>", "unk_token": "<unk>"},
    "words": {"eos_token": "</s>", "unk_token": "<unk>"},
    "characters": {"eos_token": "</s>", "unk_token": "<unk>"},
}  # fmt: skip


KINDS = sorted(WRAP)


END = {"qwen": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "gpt2": "<|endoftext|>"}


def new_tokenizer(kind, item_tokens=0, **settings):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_backend(kind).to_str()), **{**WRAP[kind], **settings}
    )
    if kind == "qwen":
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", "<tool_call>")])
    add_item_tokens(tokenizer, item_tokens)
    return tokenizer


tokenizer_of = cache(new_tokenizer)


@cache
def builder_of(kind, identifiers="letters", template="movies", max_length=None):
    tokenizer = tokenizer_of(kind, 64 if identifiers == "items" else 0)
    return PromptBuilder(tokenizer, template, identifiers=identifiers, max_length=max_length)


def make_item(index, title=None, category="Comedy|Drama"):
    return Item(index, f"id{index:03d}", f"Movie {index} ({1950 + index})" if title is None else title, category)


def with_signals(one):
    """The list with an average and a count beside every item, a hint beside candidates, some of them unknown."""

    def numbers(items, start):
        return tuple(NAN if i % 4 == 3 else start + 0.7 * i % 4 for i in range(len(items)))

    def counts(items):
        return tuple(NAN if i % 4 == 3 else float(7**i) for i in range(len(items)))

    signals = (
        Signal("average", numbers(one.history, 1.2), numbers(one.candidates, 0.8)),
        Signal("count", counts(one.history), counts(one.candidates)),
    )
    return dataclasses.replace(one, hints=(*numbers(one.candidates[:-1], 2.0), 3.25), signals=signals)


def make_list(m=5, history=4, ratings=None, titles=()):
    past = tuple(make_item(40 + i, category="" if i % 2 else "Sci-Fi") for i in range(history))
    candidates = tuple(make_item(i, titles[i] if i < len(titles) else None) for i in range(m))
    ratings = tuple(1 + 0.5 * ((3 * i) % 8) for i in range(m)) if ratings is None else ratings
    return RankingList("list-7", "user-3", past, tuple(0.5 + i % 10 / 2 for i in range(history)), candidates, ratings)


def common_prefix(first, second):
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second))))
