# ruff: noqa
"""Make the small base model of the default recipe: `python scripts/make_demo_model.py --output_dir alro_fast/demo_model`.

It teaches a transformer of 0.7 M weights, from scratch, to read the page of alro_fast/templates/demo.yaml: which letter
stands for which candidate, that an answer names every letter once, what a history line says, and to order a list by a
rule that the page states in full. The one rule it is given no meaning for is the demo's own, "liking": there every
answer in its lessons is a random order (and every grade a random grade), so the untuned model ranks at chance. The pages
are drawn at random, never from the demo's catalogue: titles are shuffled words, genres are mere symbols whose stars are
redrawn on every page.

Fixed seeds and one thread: the same machine and library versions give the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, LlamaConfig, LlamaForCausalLM

from alro_fast.data.demo import ADJECTIVES, GENRES, NOUNS

PAD, EOS, UNK = SPECIAL = ("<pad>", "</s>", "<unk>")
LETTERS = [chr(ord("A") + i) for i in range(20)]
DIGITS = [str(i) for i in range(10)]
SYMBOLS = (*GENRES, "adventure", "animation", "documentary", "musical", "mystery", "satire", "thriller", "war")
PAGE = "History Candidates Ranking Order Grade Genre Letter Number Stars by for genre letter last number liking".split()
MARKS = ["\n", ":", "|", ".", ",", "-", "'", "(", ")", "&", "/", "!", "?", "<", ">"]
WORDS = (*ADJECTIVES, *NOUNS)
LARGEST = 10  # candidates on a page, and at most this many + 5 history lines
IGNORE = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, digit, mark or newline; a word it does not know is <unk>."""
    vocabulary = list(dict.fromkeys([*SPECIAL, *MARKS, *DIGITS, *LETTERS, *PAGE, *SYMBOLS, *WORDS]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    pattern = Regex(r"\n|\p{N}|[^\s\p{P}\p{S}\p{N}]+|[\p{P}\p{S}]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def make_model(
    vocabulary: int, kinds, seed: int, width: int = 128, layers: int = 4, heads: int = 4, qk: float = 2.5
) -> LlamaForCausalLM:
    """A Llama whose attention starts near what reading a page takes, which random weights find only after long training.

    Layer 0: head h looks h + 1 tokens back, by its rotary biases. Layer 1: even heads look for an earlier place that
    follows the token at hand, odd ones for the token itself. Later layers: even heads copy the token before the one they
    look at. Everything is trained from there.
    """
    base = 1e5
    config = LlamaConfig(
        attention_bias=True,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    size, half = width // heads, width // 2
    frequency = base ** (-torch.arange(0, size, 2) / size)
    slow = (frequency < 0.02).nonzero().flatten()
    slow = torch.cat([slow, slow + size // 2])  # channels that hardly turn over a page: contents can be compared there
    gist = torch.zeros(size, width)  # of a token: what stands in the lower half of its channels, in `size` numbers
    gist[:, :half] = _orthonormal(size, half)
    before = torch.zeros(size, width)  # the gist of the token before
    before[:, half : half + size] = torch.eye(size)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.normal_(0, half**-0.5)
        embedding[:, half:] = 0
        is_digit = torch.nn.functional.normalize(torch.randn(half), dim=0)
        embedding[kinds[1], :half] += 0.7 * is_digit
        embedding[kinds[1], :half] += half**-0.5 * 0.5 * torch.randn(half) * (torch.arange(10)[:, None] - 3)
        for number, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for h in range(heads):
                rows = slice(h * size, (h + 1) * size)
                query, key = attention.q_proj.weight[rows], attention.k_proj.weight[rows]
                source, target = gist, gist
                if number == 0:
                    turn = frequency * (h + 1)
                    attention.q_proj.bias[rows] = 4 * torch.cat([turn.cos(), -turn.sin()])
                    attention.k_proj.bias[rows] = 4 * torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
                    if h == 0:
                        target = before
                    else:
                        target = torch.zeros(size, width)
                        target[:, half + size :] = 0.6 * _orthonormal(size, half - size) if half - size >= size else 0
                        source = torch.zeros(size, width)
                        source[:, :half] = _orthonormal(size, half)
                elif number == 1 and h < 2:
                    query[:], key[:] = 0, 0
                    query[slow] = 1.9 * gist[: len(slow)]
                    key[slow] = 1.9 * before[: len(slow)]
                    query[slow[-1]], key[slow[-1]] = 0, 0
                    key[slow[-1], :half] = 1.5 * is_digit
                    attention.q_proj.bias[rows][slow[-1]] = 4
                    if h:
                        source = torch.zeros(size, width)
                        source[:, :half] = _orthonormal(size, half)
                        target = source
                elif number == 1:
                    source = torch.zeros(size, width)
                    source[:, :half] = _orthonormal(size, half)
                    target = source
                else:
                    query *= qk
                    key *= qk
                    if number == 2 or h < 2:
                        source = before
                attention.v_proj.weight[rows] = source
                attention.o_proj.weight[:, rows] = (1 / 8 if number == 0 else 1 / 8) * target.T
    return model


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(columns, rows))[0].T.contiguous()


class Page(NamedTuple):
    """A page as (text, what is learned from it): "no", "yes", or "sure" where only one continuation is right."""

    pieces: list[tuple[str, str]]


class Drawn(NamedTuple):
    """What stands on one page."""

    titles: list[str]
    genres: list[str]
    numbers: list[int] | None  # stated beside the candidates, or not
    usual: dict | None
    stars: Callable[[str], int]  # a draw of the stars of a genre on this page


def draw_page(draw: np.random.Generator, candidates: int, history: int, only_telling: bool = False) -> Page:
    """Draw a history, candidates and three questions with their answers."""
    symbols = draw.choice(SYMBOLS, draw.integers(3, 13), replace=False).tolist()
    usual = dict(zip(SYMBOLS, draw.integers(1, 6, len(SYMBOLS)).tolist()))

    def stars(genre: str) -> int:
        off = int(draw.integers(-1, 2)) if draw.random() < 0.25 else 0
        return min(5, max(1, usual[genre] + off))

    table = draw.random() < 0.75
    if table:
        pieces = [("Genre:\n" + "".join(f"{g} {usual[g]}\n" for g in symbols), "no")]
    else:
        pieces = [("History:\n", "no")]
    for _ in range(0 if table else history):
        genre = str(draw.choice(symbols))
        pieces += [(f"{draw_title(draw)} | {genre} ", "no"), (f"{stars(genre)}\n", "yes")]
    drawn = Drawn(
        titles=[draw_title(draw) for _ in range(candidates)],
        genres=[str(draw.choice(symbols)) for _ in range(candidates)],
        numbers=draw.integers(1, 6, candidates).tolist() if not table and draw.random() < 0 else None,
        usual=usual if table else None,
        stars=stars,
    )
    pieces.append(("Candidates:\n", "no"))
    for i, (letter, genre, title) in enumerate(zip(LETTERS, drawn.genres, drawn.titles)):
        number = "" if drawn.numbers is None else f" {drawn.numbers[i]}"
        pieces.append((f"{letter} {genre}{number} | {title}\n", "no"))
    if only_telling:
        lessons = [tell_genres, tell_stars, tell_stars_of_candidates]
    else:
        ask = order_by_genre if table else order_by_liking
        others = (
            [tell_genres, tell_stars_of_candidates]
            if table
            else [tell_genres, tell_stars, tell_stars_of_candidates, grade_by_liking]
        )
        if table and draw.random() < 0.2:
            ask = order_by_liking
        lessons = [ask, *(others[k] for k in draw.permutation(len(others))[:2].tolist())]
        if draw.random() < 0.3:
            lessons = lessons[1:] + lessons[:1]
    for lesson in lessons:
        pieces += lesson(draw, drawn)
    return Page(pieces)


def draw_title(draw: np.random.Generator) -> str:
    """One to three words, two most often."""
    last = NOUNS[draw.integers(len(NOUNS))]
    words = draw.choice(4, p=[0.0, 0.15, 0.7, 0.15]) - 1
    return " ".join([*(ADJECTIVES[k] for k in draw.integers(0, len(ADJECTIVES), words)), last])


def ordered(rule: str, order: list[int], learn: str) -> list[tuple[str, str]]:
    """The question and answer of an order."""
    return [(f"Order by {rule}\nRanking:", "no"), (" ".join(LETTERS[i] for i in order) + EOS, learn)]


def order_by_liking(draw, drawn):
    """The demo's own question: any order, at random."""
    return ordered("liking", draw.permutation(len(drawn.titles)).tolist(), "yes")


def order_by_letter(draw, drawn):
    return ordered("letter", list(range(len(drawn.titles))), "sure")


def order_by_last(draw, drawn):
    return ordered("last letter", list(range(len(drawn.titles)))[::-1], "sure")


def order_by_number(draw, drawn):
    """Higher first; ties at random."""
    shuffled = draw.permutation(len(drawn.titles)).tolist()
    return ordered("number", sorted(shuffled, key=lambda i: -drawn.numbers[i]), "yes")


def order_by_genre(draw, drawn):
    """By the number that the page's table gives the genre, higher first; ties at random."""
    shuffled = draw.permutation(len(drawn.titles)).tolist()
    return ordered("genre", sorted(shuffled, key=lambda i: -drawn.usual[drawn.genres[i]]), "yes")


def grade_by_liking(draw, drawn):
    """The demo's own question in the other form: any grade, at random."""
    letter = LETTERS[draw.integers(len(drawn.titles))]
    return [(f"Grade by liking\nStars for {letter}:", "no"), (f"{draw.integers(1, 6)}{EOS}", "yes")]


def tell_genres(draw, drawn):
    return _tell(draw, range(len(drawn.titles)), lambda i: (f"Genre {LETTERS[i]}", drawn.genres[i]))


def tell_letters(draw, drawn):
    """Of the genres that only one candidate has."""
    alone = [i for i, genre in enumerate(drawn.genres) if drawn.genres.count(genre) == 1]
    return _tell(draw, alone, lambda i: (f"Letter {drawn.genres[i]}", LETTERS[i]))


def tell_numbers(draw, drawn):
    return _tell(
        draw, range(len(drawn.titles)), lambda i: (f"Number {LETTERS[i]} {drawn.genres[i]}", str(drawn.numbers[i]))
    )


def tell_stars(draw, drawn):
    """What the history said of a genre."""
    genres = draw.permutation(sorted(set(drawn.genres)))[:4].tolist()
    return [piece for g in genres for piece in [(f"Stars {g}", "no"), (f"{drawn.stars(g)}\n", "yes")]]


def tell_stars_of_candidates(draw, drawn):
    """What the history said of a candidate's genre."""
    told = draw.permutation(len(drawn.titles))[:4].tolist()
    return [
        p
        for i in told
        for p in [
            (f"Stars {LETTERS[i]}", "no"),
            (f"{drawn.usual[drawn.genres[i]] if drawn.usual else drawn.stars(drawn.genres[i])}\n", "yes"),
        ]
    ]


def _tell(draw, candidates, question):
    told = map(question, draw.permutation(candidates)[:4].tolist())
    return [piece for asked, answer in told for piece in [(asked, "no"), (answer + "\n", "sure")]]


class Batch(NamedTuple):
    input_ids: torch.Tensor  # int64 [pages, T], padded on the right
    labels: torch.Tensor  # int64 [pages, T], IGNORE where nothing is learned
    sure: torch.Tensor  # bool [pages, T]


def encode(tokenizer: PreTrainedTokenizerFast, pages: list[Page]) -> Batch:
    """Pieces encode alone as they do in their page: the tokenizer never joins words."""
    texts = [text for page in pages for text, _ in page.pieces]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows = [[(i, learn) for _, learn in page.pieces for i in next(ids)] for page in pages]
    length = max(map(len, rows))
    input_ids = torch.full((len(pages), length), tokenizer.pad_token_id)
    labels = torch.full((len(pages), length), IGNORE)
    sure = torch.zeros((len(pages), length), dtype=torch.bool)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor([i for i, _ in row])
        labels[number, : len(row)] = torch.tensor([IGNORE if learn == "no" else i for i, learn in row])
        sure[number, : len(row)] = torch.tensor([learn == "sure" for _, learn in row])
    return Batch(input_ids, labels, sure)


def train(
    model,
    tokenizer,
    *,
    steps: int,
    pages: int,
    learning_rate: float,
    seed: int,
    log: Callable[[str], None],
    save=None,
    telling=True,
    grown=0,
):
    """Next-token cross-entropy on the answers; lists grow by one candidate when those at hand are mastered."""
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    size, right, asked, loss_sum, started = 3, [], [], 0.0, time.process_time()
    for step in range(steps):
        here = size if draw.random() < 0.5 else int(draw.integers(max(2, size // 2), size + 1))
        history = int(draw.integers(2, size + 6))
        if telling:
            here, history = int(draw.integers(3, 9)), int(draw.integers(3, 9))
        batch = encode(tokenizer, [draw_page(draw, here, history, telling) for _ in range(pages)])
        left = 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 100, max(0.03, left / 0.4))
        hidden = model.model(input_ids=batch.input_ids).last_hidden_state[:, :-1]
        labels, sure = batch.labels[:, 1:], batch.sure[:, 1:]
        learned = labels != IGNORE
        logits = model.lm_head(hidden[learned])
        loss = cross_entropy(logits, labels[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        known = sure[learned]
        loss_sum += loss.item()
        right.append((logits.argmax(-1) == labels[learned])[known].float().mean().item())
        if telling:
            if step == 100:
                telling, right = False, []
                log(f"told {step}")
        else:
            size = min(LARGEST, 3 + grown + step // 60)
        if (step + 1) % 50 == 0:
            log(
                f"step {step + 1} cpu {time.process_time() - started:.0f}s size {size} loss {loss_sum / 50:.3f} right {np.mean(right[-50:]):.3f} | {report(model, tokenizer)}"
            )
            loss_sum = 0.0
            if save:
                save()


@torch.no_grad()
def report(model, tokenizer, pages: int = 24) -> str:
    """Share of right answer tokens per lesson, on pages of the largest size (`liking`: chance is all there is)."""
    draw = np.random.default_rng(12345)
    shares = {}
    batch = encode(tokenizer, [draw_page(draw, LARGEST, 12) for _ in range(pages)])
    logits = model(input_ids=batch.input_ids).logits[:, :-1].argmax(-1)
    hit = logits == batch.labels[:, 1:]
    text = {}
    names = {"number": "number", "genre": "genre", "liking": "liking", "last": "last", "letter": "letter"}
    nl = tokenizer.convert_tokens_to_ids("\n")
    lets = tokenizer.convert_tokens_to_ids(LETTERS)
    order, by = tokenizer.convert_tokens_to_ids(["Order", "by"])
    for row in range(pages):
        ids = batch.input_ids[row].tolist()
        for i, token in enumerate(ids[:-3]):
            if token == order:
                rule = tokenizer.convert_ids_to_tokens(ids[i + 2])
                on = [j for j in range(i, len(ids) - 1) if batch.labels[row, j + 1] != IGNORE]
                stop = next(j for j in range(i, len(ids)) if ids[j] == tokenizer.eos_token_id)
                on = [j for j in on if j < stop - 1]
                if rule in ("number", "genre"):
                    T = (
                        {
                            ids[q]: ids[q + 1]
                            for q in range(3, ids.index(tokenizer.convert_tokens_to_ids("Candidates")), 3)
                        }
                        if rule == "genre"
                        else None
                    )
                    num = {
                        ids[q]: T[ids[q + 1]] if T else ids[q + 2]
                        for q in range(ids.index(order))
                        if ids[q - 1] == nl and ids[q] in lets
                    }
                    for q, j in enumerate(on):
                        shares.setdefault(f"{rule[0]}{q if q < 3 else 3}", []).append(
                            float(
                                num.get(int(logits[row, j])) == num[ids[j + 1]]
                                and int(logits[row, j]) not in ids[on[0] + 1 : j + 1]
                            )
                        )
                    shares.setdefault("order", []).append(
                        np.mean([int(logits[row, j]) not in ids[on[0] + 1 : j + 1] for j in on])
                    )
                    continue
                if rule == "liking":
                    shares.setdefault("likonce", []).append(
                        np.mean(
                            [
                                int(logits[row, j]) in lets[:LARGEST]
                                and int(logits[row, j]) not in ids[on[0] + 1 : j + 1]
                                for j in on
                            ]
                        )
                    )
                    continue
                shares.setdefault(rule, []).append(hit[row, on].float().mean().item())
                shares.setdefault(rule + "1", []).append(hit[row, on[0]].float().item())
            elif (
                tokenizer.convert_ids_to_tokens(token) in ("Genre", "Letter", "Number", "Stars") and ids[i - 1] != order
            ):
                j = next((j for j in range(i, len(ids) - 1) if batch.labels[row, j + 1] != IGNORE), None)
                if j and ids[i + 1] != tokenizer.convert_tokens_to_ids(":"):
                    shares.setdefault(
                        tokenizer.convert_ids_to_tokens(token) + ("~" if ids[i + 1] in lets else "") + "?", []
                    ).append(hit[row, j].float().item())
    return " ".join(f"{k}={np.mean(v):.2f}" for k, v in sorted(shares.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--pages", type=int, default=16)
    parser.add_argument("--start")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    tok = make_tokenizer()
    model = make_model(
        len(tok),
        [torch.tensor(tok.convert_tokens_to_ids(list(k))) for k in (LETTERS, DIGITS, SYMBOLS, WORDS, MARKS)],
        a.seed,
    )
    if a.start:
        from safetensors.torch import load_file

        print(model.load_state_dict(load_file(a.start + "/model.safetensors"), strict=False))
    print(sum(p.numel() for p in model.parameters()), len(tok))

    def save():
        model.save_pretrained(a.output_dir)
        tok.save_pretrained(a.output_dir)

    train(
        model,
        tok,
        steps=a.steps,
        pages=a.pages,
        learning_rate=a.lr,
        seed=a.seed,
        telling=not a.start,
        grown=6 if a.start else 0,
        log=lambda s: print(s, flush=True),
        save=save,
    )
    save()
