"""Make the demo's base model: `python scripts/make_demo_model.py --output_dir alro_fast/demo_model`.

It teaches a Llama of 0.7 M weights, from nothing, to read the page of alro_fast/templates/demo.yaml: which letter
stands for which candidate, that an answer names every letter once, what a history line says, and to order candidates by
a table that the page states in full. The demo's own rule, "liking", is given no meaning: every order by it in the
lessons is a random order (and every grade a random grade), so the untuned model ranks at chance. No page comes from the
demo's catalogue: titles are shuffled words, genres are mere symbols whose stars are drawn anew for every page.

Fixed seeds and one thread: the same machine and library versions give the same weights.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy, normalize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alro_fast.cli import OneLineParser, run
from alro_fast.data.demo import ADJECTIVES, GENRES, NOUNS

PAD, EOS, UNK = SPECIAL = ("<pad>", "</s>", "<unk>")
LETTERS = [chr(ord("A") + i) for i in range(20)]
DIGITS = [str(i) for i in range(10)]
SYMBOLS = (*GENRES, "adventure", "animation", "documentary", "musical", "mystery", "satire", "thriller", "war")
HEADINGS = ["History", "Candidates", "Ranking", "Order", "Grade", "Genre", "Letter", "Number", "Stars"]
RULES = ["by", "for", "genre", "letter", "last", "number", "liking"]  # letter, last and number: known, but not taught
MARKS = ["\n", ":", "|", ".", ",", "-", "'", "(", ")", "&", "/", "!", "?", "<", ">"]

WIDTH, LAYERS, HEADS = 128, 4, 4
HEAD_SIZE = WIDTH // HEADS
TOKEN_END = WIDTH // 2  # the channels below it hold the token itself: its embedding, tied to the output
BEFORE_END = TOKEN_END + HEAD_SIZE  # up to here, the gist of the token before; above, some of the tokens before that
ROPE_BASE = 1e5
BIAS, MATCH, PREFER_DIGITS, SHARPEN = 4.0, 1.9, 1.5, 2.5  # how strongly attention is wired

SEED = 0
STEPS, PAGES_PER_STEP, LEARNING_RATE = 1500, 16, 1.5e-3
WARM_UP_STEPS, FINAL_DECAY, LEAST_RATE = 100, 0.4, 0.03  # the rate falls over the last 40 % of the steps, to 3 %
LOOK_UP_STEPS = 101  # at first, pages ask nothing but look-ups
SMALLEST, LARGEST, GROWING_STEPS = 3, 10, 60  # candidates on a page: how they begin, end, and steps per one more
TABLE_SHARE = 0.75  # of pages that state a table in place of a history
LOG_STEPS, EXAM_PAGES = 50, 32
IGNORE_INDEX = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, digit, mark or newline; a word it does not know is <unk>."""
    words = [*SPECIAL, *MARKS, *DIGITS, *LETTERS, *HEADINGS, *RULES, *SYMBOLS, *ADJECTIVES, *NOUNS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    pattern = Regex(r"\n|\p{N}|[^\s\p{P}\p{S}\p{N}]+|[\p{P}\p{S}]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose attention starts near what reading a page takes; random weights find that only after long training.

    Layer 0: head h looks h + 1 tokens back, by its rotary biases; head 0 files what it finds as the token before.
    Layer 1: heads 0 and 1 look for an earlier digit that follows the token at hand (the 4 of "noir 4"). Layers 2 and 3:
    most heads fetch the token before the one they look at (the letter before a genre). Every weight is trained from
    there.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        attention_bias=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _wire(model, digit_ids=tokenizer.convert_tokens_to_ids(DIGITS))
    return model


def _wire(model: LlamaForCausalLM, digit_ids: list[int]) -> None:
    """Set embeddings, values and outputs, and what the queries and keys look for."""
    frequency = ROPE_BASE ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    slow = (frequency < 0.02).nonzero().flatten()
    slow = torch.cat([slow, slow + HEAD_SIZE // 2])  # channels that hardly turn over a page can compare contents
    *match, seek = slow.tolist()  # channels to compare tokens in, and one to prefer digits by

    gist = _orthonormal_rows(0, TOKEN_END)  # of the token itself, in HEAD_SIZE numbers
    before = torch.zeros(HEAD_SIZE, WIDTH)  # of the token before
    before[:, TOKEN_END:BEFORE_END] = torch.eye(HEAD_SIZE)

    embedding = model.model.embed_tokens.weight.normal_(0, TOKEN_END**-0.5)
    embedding[:, TOKEN_END:] = 0
    is_digit = normalize(torch.randn(TOKEN_END), dim=0)
    embedding[digit_ids, :TOKEN_END] += 0.7 * is_digit
    middle_of_stars = 3
    more = TOKEN_END**-0.5 * 0.5 * torch.randn(TOKEN_END)  # the direction in which digits grow
    embedding[digit_ids, :TOKEN_END] += more * (torch.arange(len(digit_ids))[:, None] - middle_of_stars)

    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for head in range(HEADS):
            rows = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            query, key = attention.q_proj.weight[rows], attention.k_proj.weight[rows]
            query_bias, key_bias = attention.q_proj.bias[rows], attention.k_proj.bias[rows]
            if number == 0:
                turn = frequency * (head + 1)
                query_bias[:] = BIAS * torch.cat([turn.cos(), -turn.sin()])
                key_bias[: HEAD_SIZE // 2] = BIAS
                if head == 0:
                    writes, reads = before, gist
                else:
                    writes, reads = 0.6 * _orthonormal_rows(BEFORE_END, WIDTH), _orthonormal_rows(0, TOKEN_END)
            elif number == 1:
                writes = reads = gist if head == 0 else _orthonormal_rows(0, TOKEN_END)
                if head < 2:
                    query[:], key[:] = 0, 0
                    query[match], key[match] = MATCH * gist[: len(match)], MATCH * before[: len(match)]
                    query_bias[seek] = BIAS
                    key[seek, :TOKEN_END] = PREFER_DIGITS * is_digit
            else:
                query *= SHARPEN
                key *= SHARPEN
                writes, reads = gist, (before if number == 2 or head < 2 else gist)
            attention.v_proj.weight[rows] = reads
            attention.o_proj.weight[:, rows] = writes.T / 8


def _orthonormal_rows(start: int, stop: int) -> torch.Tensor:
    """[HEAD_SIZE, WIDTH]: random orthonormal rows on the channels from start to stop, zero elsewhere."""
    matrix = torch.zeros(HEAD_SIZE, WIDTH)
    matrix[:, start:stop] = torch.linalg.qr(torch.randn(stop - start, HEAD_SIZE))[0].T
    return matrix


Pieces = list[tuple[str, bool]]  # text, and whether the model learns to continue with it


class Page(NamedTuple):
    """A page without its questions."""

    pieces: Pieces
    genres: list[str]  # of the candidates
    usual_stars: dict[str, int]  # of every genre: what a table states, and what a history scatters about
    has_table: bool


Lesson = Callable[[np.random.Generator, Page], Pieces]  # a question about a page with its answer


def draw_page(draw: np.random.Generator, candidates: int, history: int) -> Page:
    """Draw a table of genres or that many history lines, and that many candidates."""
    symbols = draw.choice(SYMBOLS, draw.integers(3, 13), replace=False).tolist()
    usual_stars = dict(zip(SYMBOLS, draw.integers(1, 6, len(SYMBOLS)).tolist()))
    has_table = bool(draw.random() < TABLE_SHARE)
    pieces: Pieces
    if has_table:
        pieces = [("Genre:\n" + "".join(f"{genre} {usual_stars[genre]}\n" for genre in symbols), False)]
    else:
        pieces = [("History:\n", False)]
        for _ in range(history):
            genre = str(draw.choice(symbols))
            pieces.append((f"{draw_title(draw)} | {genre} ", False))
            pieces.append((f"{draw_stars(draw, usual_stars[genre])}\n", True))
    titles = [draw_title(draw) for _ in range(candidates)]
    genres = draw.choice(symbols, candidates).tolist()
    lines = [f"{letter} {genre} | {title}\n" for letter, genre, title in zip(LETTERS, genres, titles)]
    pieces.append(("Candidates:\n" + "".join(lines), False))
    if not has_table:
        draw.random()  # decides nothing: the shipped weights were made with this number drawn
    return Page(pieces, genres, usual_stars, has_table)


def draw_title(draw: np.random.Generator) -> str:
    """One to three words, two most often."""
    noun = NOUNS[draw.integers(len(NOUNS))]
    adjectives = draw.choice(3, p=[0.15, 0.7, 0.15])
    return " ".join([*(ADJECTIVES[k] for k in draw.integers(0, len(ADJECTIVES), adjectives)), noun])


def draw_stars(draw: np.random.Generator, usual: int) -> int:
    """The usual ones; one time in six (less often at 1 and 5), one more or one fewer."""
    off = int(draw.integers(-1, 2)) if draw.random() < 0.25 else 0
    return min(5, max(1, usual + off))


def draw_lessons(draw: np.random.Generator, has_table: bool) -> list[Lesson]:
    """An order and two other questions, all different; the order stands first or, less often, last."""
    order = order_by_genre if has_table and draw.random() >= 0.2 else order_by_liking
    others: list[Lesson] = [tell_genres, tell_stars_of_candidates]
    if not has_table:
        others = [tell_genres, tell_stars, tell_stars_of_candidates, grade_by_liking]
    lessons = [order, *(others[k] for k in draw.permutation(len(others))[:2])]
    return lessons[1:] + lessons[:1] if draw.random() < 0.3 else lessons


def order_by_liking(draw: np.random.Generator, page: Page) -> Pieces:
    """The demo's own question: any order, at random."""
    return _order("liking", draw.permutation(len(page.genres)).tolist())


def order_by_genre(draw: np.random.Generator, page: Page) -> Pieces:
    """By the stars that the page's table gives the genre, more first; ties at random."""
    shuffled = draw.permutation(len(page.genres)).tolist()
    return _order("genre", sorted(shuffled, key=lambda i: -page.usual_stars[page.genres[i]]))


def grade_by_liking(draw: np.random.Generator, page: Page) -> Pieces:
    """The demo's own question in its other form: any grade, at random."""
    letter = LETTERS[draw.integers(len(page.genres))]
    return [(f"Grade by liking\nStars for {letter}:", False), (f"{draw.integers(1, 6)}{EOS}", True)]


def tell_genres(draw: np.random.Generator, page: Page) -> Pieces:
    """The genre of a candidate."""
    return _tell((f"Genre {LETTERS[i]}", page.genres[i]) for i in _some_candidates(draw, page))


def tell_stars(draw: np.random.Generator, page: Page) -> Pieces:
    """The stars of a genre, as one more history line would have them."""
    genres = draw.permutation(sorted(set(page.genres)))[:4].tolist()
    return _tell((f"Stars {genre}", draw_stars(draw, page.usual_stars[genre])) for genre in genres)


def tell_stars_of_candidates(draw: np.random.Generator, page: Page) -> Pieces:
    """The stars of a candidate's genre: those in the table, or as one more history line would have them."""
    told = []
    for i in _some_candidates(draw, page):
        usual = page.usual_stars[page.genres[i]]
        told.append((f"Stars {LETTERS[i]}", usual if page.has_table else draw_stars(draw, usual)))
    return _tell(told)


LOOK_UPS: list[Lesson] = [tell_genres, tell_stars, tell_stars_of_candidates]
ORDERS: list[Lesson] = [order_by_genre, order_by_liking]


def _order(rule: str, order: list[int]) -> Pieces:
    return [(f"Order by {rule}\nRanking:", False), (" ".join(LETTERS[i] for i in order) + EOS, True)]


def _some_candidates(draw: np.random.Generator, page: Page) -> list[int]:
    return draw.permutation(len(page.genres))[:4].tolist()


def _tell(told: Iterable[tuple[str, str | int]]) -> Pieces:
    return [piece for asked, answer in told for piece in [(asked, False), (f"{answer}\n", True)]]


class Batch(NamedTuple):
    """Pages as tokens."""

    input_ids: torch.Tensor  # int64 [pages, T], padded on the right
    labels: torch.Tensor  # int64 [pages, T]: the token itself, IGNORE_INDEX where nothing is learned


def encode(tokenizer: PreTrainedTokenizerFast, pages: list[Pieces]) -> Batch:
    """Pieces encode alone as they do on their page: the tokenizer never joins words."""
    texts = [text for pieces in pages for text, _ in pieces]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows = [[(i, i if learned else IGNORE_INDEX) for _, learned in pieces for i in next(ids)] for pieces in pages]
    length = max(map(len, rows))
    filler = (tokenizer.pad_token_id, IGNORE_INDEX)
    padded = torch.tensor([row + [filler] * (length - len(row)) for row in rows])
    return Batch(input_ids=padded[..., 0], labels=padded[..., 1])


def draw_batch(draw: np.random.Generator, tokenizer: PreTrainedTokenizerFast, step: int, largest: int) -> Batch:
    """The pages of one step, with one number of candidates each: at most `largest` once orders are asked."""
    candidates = largest if draw.random() < 0.5 else int(draw.integers(max(2, largest // 2), largest + 1))
    history = int(draw.integers(2, largest + 6))
    if step < LOOK_UP_STEPS:  # which are drawn from more sizes at once
        candidates, history = draw.integers(3, 9, 2).tolist()
    pages = []
    for _ in range(PAGES_PER_STEP):
        page = draw_page(draw, candidates, history)
        lessons = LOOK_UPS if step < LOOK_UP_STEPS else draw_lessons(draw, page.has_table)
        pages.append([*page.pieces, *(piece for lesson in lessons for piece in lesson(draw, page))])
    return encode(tokenizer, pages)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Next-token cross-entropy on what the pages teach: look-ups at first, then orders of ever more candidates."""
    draw = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    largest, loss_sum, started = SMALLEST, 0.0, time.process_time()
    for step in range(steps):
        batch = draw_batch(draw, tokenizer, step, largest)
        left = 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARM_UP_STEPS, max(LEAST_RATE, left / FINAL_DECAY))
        hidden = model.model(input_ids=batch.input_ids).last_hidden_state[:, :-1]
        labels = batch.labels[:, 1:]
        learned = labels != IGNORE_INDEX
        loss = cross_entropy(model.lm_head(hidden[learned]), labels[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item()
        if step >= LOOK_UP_STEPS:
            largest = min(LARGEST, SMALLEST + step // GROWING_STEPS)
        if (step + 1) % LOG_STEPS == 0:
            seconds = time.process_time() - started
            print(f"step {step + 1}/{steps}, {seconds:.0f} s, loss {loss_sum / LOG_STEPS:.3f}", flush=True)
            loss_sum = 0.0


@torch.no_grad()
def examine(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Share of right answers per lesson, in [0, 1], on new pages of LARGEST candidates.

    A letter of an order is right where it was not yet named and, by genre, stands for as many stars as are due there.
    """
    draw = np.random.default_rng(SEED + 1)
    shares = {}
    for lesson in [*LOOK_UPS, *ORDERS]:
        pages = [draw_page(draw, LARGEST, LARGEST) for _ in range(EXAM_PAGES)]
        if lesson is order_by_genre:
            pages = [page for page in pages if page.has_table]
        batch = encode(tokenizer, [[(text, False) for text, _ in page.pieces] + lesson(draw, page) for page in pages])
        guesses = model(input_ids=batch.input_ids).logits.argmax(-1)
        right = []
        for page, page_guesses, labels in zip(pages, guesses[:, :-1], batch.labels[:, 1:]):
            asked = (labels != IGNORE_INDEX) & (labels != tokenizer.eos_token_id)
            due = tokenizer.convert_ids_to_tokens(labels[asked].tolist())
            given = tokenizer.convert_ids_to_tokens(page_guesses[asked].tolist())
            if lesson in LOOK_UPS:
                right += [g == d for g, d in zip(given, due) if d != "\n"]
                continue
            rank_by = page.usual_stars if lesson is order_by_genre else dict.fromkeys(SYMBOLS, 0)
            stars = {letter: rank_by[genre] for letter, genre in zip(LETTERS, page.genres)}
            right += [g not in due[:k] and stars.get(g) == stars[d] for k, (g, d) in enumerate(zip(given, due))]
        shares[lesson.__name__] = float(np.mean(right))
    return shares


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, steps: int) -> None:
    """The folder as transformers reads it, with manifest.json: how it was made, and the hashes of its files."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    manifest = {
        "made_by": "scripts/make_demo_model.py",
        "steps": steps,
        "seed": SEED,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """Make the model, print how well it reads, write it."""
    parser = OneLineParser(prog="make_demo_model.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer make a worse model (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; expected 1 or more")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, arguments.steps)
    print("right:", ", ".join(f"{lesson} {share:.2f}" for lesson, share in examine(model, tokenizer).items()))
    save(model, tokenizer, arguments.output_dir, arguments.steps)


if __name__ == "__main__":
    run(main)
