"""One ALRO training step, ours beside the ordinary way, in one process: `pytest bench/bench_step.py -s`.

Same model, LoRA, lists, loss and optimiser. Ordinary: Hugging Face model and PEFT, the batch padded, one forward for
the stored order and one for its re-ordering, logits of every position, `labels=` for the cross-entropy. Ours: both
orders of a list in one tree, all trees packed, the head on answer rows, fused layers, float32 products by the faster of
torch's libraries (on processors that are not Intel's this is oneDNN; the ordinary way uses what torch uses). Both run
with `keep_freed_memory`. Rounds alternate; ratios are medians. A CUDA device gets 0.5B and 8B models in bfloat16 with
random weights (BENCH_QUICK=1: few rounds), the share of the device's bfloat16 peak, and peaks of its own allocator;
both ways run under autocast there, as `--bf16 true` does, or PEFT would multiply its float32 adapters in float32. Times
are taken and recorded before losses and gradients are compared.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from alro_fast.losses.alro import alro_loss
from alro_fast.losses.lists import RankingLists
from alro_fast.modeling.attention import tree_hidden_states, use_tree_attention
from alro_fast.modeling.layers import fuse_layers
from alro_fast.modeling.lm_head import head_of
from alro_fast.modeling.lora import fuse_lora
from alro_fast.modeling.memory import keep_freed_memory
from alro_fast.modeling.packing import Branch, Tree, collate
from bench.common import CUDA, DEVICE, DRY, machine

CANDIDATES, BLOCK, ANSWER = 10, 100, 30
WEIGHTS = {"alpha": 0.5, "beta": 0.5, "gamma": 1.0, "sigma": 1.0}
ROOT = Path(__file__).parents[1]


class Shape(NamedTuple):
    """A Llama, its LoRA rank, and how many lists make a batch."""

    vocab: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    lists: int  # as many as the ordinary way's activations leave room for
    rounds: int
    at_least: float  # lists per second, times the ordinary way's
    filling: int = 0  # lists that fill a GPU; ours alone is timed on them for its share of the peak


ROUNDS = 3 if os.environ.get("BENCH_QUICK") == "1" else 7
SHAPES = {
    "tiny": Shape(300, 32, 48, 2, 2, 1, lists=2, rounds=1, at_least=0.0),
    "8 x 512": Shape(32_000, 512, 1536, 8, 8, 4, lists=8, rounds=7, at_least=4.5),
    "0.5B": Shape(151_936, 896, 4864, 24, 14, 2, lists=8, rounds=ROUNDS, at_least=3.0, filling=64),
    "8B": Shape(128_256, 4096, 14_336, 32, 32, 8, lists=4, rounds=ROUNDS, at_least=3.0, filling=32),
}
NAMES = ["tiny"] if DRY else ["0.5B", "8B"] if CUDA else ["8 x 512"]
AUTOCAST = CUDA  # to bfloat16, every contestant
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s, dense, by the vendor


def make_model(shape: Shape) -> torch.nn.Module:
    """LoRA of rank 16 on every linear layer of the trunk, some way from its start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=1024,
        dtype=torch.bfloat16 if CUDA else torch.float32,
    )  # fmt: skip
    with torch.device(DEVICE):
        base = LlamaForCausalLM._from_config(config)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_lists(shape: Shape, seed: int) -> list[dict]:
    """Token lists: 150-400 prompt tokens shared by both orders, ten candidates of ten tokens, a 30-token answer."""
    draw = torch.Generator().manual_seed(seed)
    lists = []
    for _ in range(shape.lists):
        prefix = torch.randint(
            100, shape.vocab, (int(torch.randint(150, 401, (1,), generator=draw)),), generator=draw
        ).tolist()
        titles = torch.randint(100, shape.vocab, (CANDIDATES, BLOCK // CANDIDATES - 1), generator=draw).tolist()
        ratings = torch.randint(1, 6, (CANDIDATES,), generator=draw)
        ranks = torch.empty(CANDIDATES, dtype=torch.long)
        ranks[torch.sort(ratings, descending=True, stable=True).indices] = torch.arange(1, CANDIDATES + 1)
        views = []
        for order in (list(range(CANDIDATES)), torch.randperm(CANDIDATES, generator=draw).tolist()):
            letter = {item: 10 + place for place, item in enumerate(order)}
            block = [token for item in order for token in (letter[item], *titles[item])]
            best_first = sorted(range(CANDIDATES), key=lambda item: ranks[item])
            answer = [token for item in best_first for token in (letter[item], 5, 6)]
            views.append((prefix + block, answer, [letter[item] for item in range(CANDIDATES)]))
        lists.append({"views": views, "ratings": ratings, "ranks": ranks})
    return lists


def ranking_lists(lists: list[dict], first_rows: list[list[int]]) -> RankingLists:
    """The batch's RankingLists; first_rows[list][view] is the row that predicts the first answer token."""
    pairs = [(i, v) for i in range(len(lists)) for v in (0, 1)]
    return RankingLists(
        slot_rows=torch.tensor([[first_rows[i][v] + 3 * k for k in range(CANDIDATES)] for i, v in pairs]),
        candidate_ids=torch.tensor([lists[i]["views"][v][2] for i, v in pairs]),
        ratings=torch.stack([lists[i]["ratings"] for i, _ in pairs]).float(),
        ranks=torch.stack([lists[i]["ranks"] for i, _ in pairs]),
        twin=torch.tensor([2 * i if v else -1 for i, v in pairs]),
    )


class Ours:
    """Both orders of a list are one tree; all trees are one stream."""

    def __init__(self, model: torch.nn.Module, lists: list[dict]) -> None:
        self.model = model
        use_tree_attention(model)
        fuse_layers(model)
        fuse_lora(model)
        trees = [Tree([Branch(prompt + answer, len(prompt)) for prompt, answer, _ in one["views"]]) for one in lists]
        self.batch = collate(trees, range(len(trees))).to(DEVICE)
        rows = [[(2 * i + v) * ANSWER for v in (0, 1)] for i in range(len(lists))]
        self.lists = ranking_lists(lists, rows).to(DEVICE)

    def loss(self) -> torch.Tensor:
        head = head_of(self.model)
        hidden = tree_hidden_states(self.model, self.batch)
        return alro_loss(hidden, head.weight, self.batch.labels, self.lists, **WEIGHTS).loss


class Ordinary:
    """Padded batches, two forwards, all logits."""

    def __init__(self, model: torch.nn.Module, lists: list[dict]) -> None:
        self.model, self.forwards = model, []
        width = max(len(prompt) + len(answer) for one in lists for prompt, answer, _ in one["views"])
        for view in (0, 1):
            ids, mask = (
                torch.zeros(len(lists), width, dtype=torch.long),
                torch.zeros(len(lists), width, dtype=torch.long),
            )
            labels = torch.full((len(lists), width), -100)
            slots = torch.empty(len(lists), CANDIDATES, dtype=torch.long)
            for i, one in enumerate(lists):
                prompt, answer, _ = one["views"][view]
                n = len(prompt) + len(answer)
                ids[i, :n], mask[i, :n] = torch.tensor(prompt + answer), 1
                labels[i, len(prompt) : n] = torch.tensor(answer)
                slots[i] = len(prompt) - 1 + 3 * torch.arange(CANDIDATES)
            letters = torch.tensor([one["views"][view][2] for one in lists])
            self.forwards.append(tuple(tensor.to(DEVICE) for tensor in (ids, mask, labels, slots, letters)))
        ratings = torch.stack([one["ratings"] for one in lists]).float()
        ranks = torch.stack([one["ranks"] for one in lists])
        gains = 2**ratings - 1
        ideal = (gains.sort(descending=True).values / torch.log2(torch.arange(CANDIDATES) + 2.0)).sum(1)
        distance = (ranks[:, :, None] - ranks[:, None, :]).abs()
        delta = (
            1 / torch.log2(1 + distance.clamp(min=1).float()) - 1 / torch.log2(2 + distance.clamp(min=1).float())
        ).abs()
        weight = delta * (gains[:, :, None] - gains[:, None, :]).abs() / ideal[:, None, None]
        self.pairs = (weight * (ratings[:, :, None] > ratings[:, None, :])).to(DEVICE)

    def loss(self) -> torch.Tensor:
        sft, soft_lambda, logps = [], [], []
        slot = torch.arange(1, CANDIDATES + 1.0, device=DEVICE)
        for ids, mask, labels, slots, letters in self.forwards:
            out = self.model(input_ids=ids, attention_mask=mask, labels=labels)
            sft.append(out.loss)
            rows = out.logits.gather(1, slots[..., None].expand(-1, -1, out.logits.shape[-1]))
            logp = rows.gather(2, letters[:, None, :].expand(-1, CANDIDATES, -1)).float().log_softmax(-1)
            expected = (logp.softmax(1) * slot[None, :, None]).sum(1)
            penalty = torch.nn.functional.softplus(expected[:, :, None] - expected[:, None, :]) / math.log(2)
            soft_lambda.append((self.pairs * penalty).sum((1, 2)))
            logps.append(logp)
        teacher = logps[0].detach()
        kl = (teacher.exp() * (teacher - logps[1])).sum(-1)[:, :-1].sum(1) / (CANDIDATES - 1)
        return sum(sft) / 2 + WEIGHTS["alpha"] * torch.cat(soft_lambda).mean() + WEIGHTS["beta"] * kl.mean()


def step(way: Ours | Ordinary, optimizer: torch.optim.Optimizer) -> float:
    """Forward, backward and optimiser; the loss."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=AUTOCAST):
        loss = way.loss()
    loss.backward()
    optimizer.step()
    return loss.item()


def build(way: str, shape: Shape, seed: int = 1) -> tuple[Ours | Ordinary, torch.optim.Optimizer]:
    keep_freed_memory()
    model = make_model(shape)
    built = {"ours": Ours, "ordinary": Ordinary}[way](model, make_lists(shape, seed))
    return built, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def peak_memory(way: str, name: str) -> int:
    """Peak resident bytes that two steps add over the built model, in a process of their own."""
    code = f"from bench.bench_step import measure_memory; measure_memory({way!r}, {name!r})"
    return int(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    )


def measure_memory(way: str, name: str) -> None:
    built = build(way, SHAPES[name])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    before = resident_bytes("VmRSS")
    for _ in range(2):
        step(*built)
    print(resident_bytes("VmHWM") - before)


def device_peak(built: tuple[Ours | Ordinary, torch.optim.Optimizer]) -> int:
    """Bytes that a step adds at its peak to what is allocated on the CUDA device."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*built)
    return torch.cuda.max_memory_allocated() - before


def filled(
    ours: tuple[Ours, torch.optim.Optimizer], ordinary: tuple[Ordinary, torch.optim.Optimizer], shape: Shape
) -> dict[str, float]:
    """Ours with a batch that fills the device: lists per second and the share of the device's bfloat16 peak."""
    ordinary[0].model.to("meta")  # room for it
    torch.cuda.empty_cache()
    way = Ours(ours[0].model, make_lists(shape._replace(lists=shape.filling), seed=2))
    seconds = []
    for _ in range(2 + shape.rounds):
        started = time.perf_counter()
        step(way, ours[1])
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[2:])
    found = {"filled_lists_per_second": shape.filling / median}
    peak = next((flops for gpu, flops in BF16_PEAK.items() if gpu in torch.cuda.get_device_name()), None)
    if peak is not None:  # forward 2, backward to the inputs 2 FLOP per weight and distinct token
        trunk = sum(p.numel() for n, p in way.model.named_parameters() if "layers" in n)
        found["share_of_peak"] = 4 * trunk * way.batch.unique_tokens / median / peak
    return found


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Agreement(NamedTuple):
    """How far the two ways are apart."""

    loss: float  # relative difference
    cosine: float  # the least of any weight's two gradients
    gradient: float  # the largest difference of two entries, less 1e-3 of the entry's size

    @classmethod
    def of(cls, losses: list[float], gradients: list[dict[str, torch.Tensor]]) -> Agreement:
        pairs = [
            (mine.double().flatten(), gradients[1][weight].double().flatten()) for weight, mine in gradients[0].items()
        ]
        return cls(
            abs(losses[0] / losses[1] - 1),
            min(float(torch.cosine_similarity(*pair, 0)) for pair in pairs),
            max(float(((mine - other).abs() - 1e-3 * other.abs()).amax()) for mine, other in pairs),
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group="alro step")
def test_alro_step(benchmark, name: str) -> None:
    """Lists per second of both, interleaved; then: equal losses and gradients (float32: to 1e-4 and 1e-3)."""
    shape = SHAPES[name]
    ours, ordinary = build("ours", shape), build("ordinary", shape)
    losses = [step(*ours), step(*ordinary)]
    gradients = [
        {n: p.grad.clone() for n, p in way.model.named_parameters() if p.grad is not None}
        for way, _ in (ours, ordinary)
    ]
    seconds = {"ours": [], "ordinary": []}
    for _ in range(shape.rounds):
        for way, built in (("ours", ours), ("ordinary", ordinary)):
            started = time.perf_counter()
            step(*built)  # ends with loss.item(), which waits for the device
            seconds[way].append(time.perf_counter() - started)
    ratio = statistics.median(o / m for m, o in zip(seconds["ours"], seconds["ordinary"]))
    if CUDA:
        memory = {"ours": device_peak(ours), "ordinary": device_peak(ordinary)}
    else:  # a tiny model's would be the allocator's
        memory = dict.fromkeys(seconds) if DRY else {way: peak_memory(way, name) for way in seconds}
    same = gradients[0].keys() == gradients[1].keys()
    agreement = Agreement.of(losses, gradients) if same else None
    median = statistics.median(seconds["ours"])
    benchmark.extra_info |= {
        "contestant": f"{name}: ours",
        "machine": machine(),
        "median_s": median,
        "spread": (max(seconds["ours"]) - min(seconds["ours"])) / median,
        "ours_lists_per_second": shape.lists / median,
        "ordinary_lists_per_second": shape.lists / statistics.median(seconds["ordinary"]),
        "ordinary_spread": (max(seconds["ordinary"]) - min(seconds["ordinary"]))
        / statistics.median(seconds["ordinary"]),
        "times_faster": ratio,
        "peak_bytes": memory["ours"],
        "ordinary_peak_bytes": memory["ordinary"],
        "unique_tokens": ours[0].batch.unique_tokens,
    }
    if agreement is not None:
        benchmark.extra_info |= {f"apart_{key}": value for key, value in agreement._asdict().items()}
    if CUDA:
        benchmark.extra_info |= filled(ours, ordinary, shape)
    for key, value in benchmark.extra_info.items():
        print(f"{key}: {value:,.2f}" if isinstance(value, float) else f"{key}: {value}")
    benchmark.pedantic(step, args=ours, rounds=1 if DRY else 3)
    assert agreement is not None, "the two ways train different weights"
    assert agreement.loss <= (2e-2 if CUDA else 1e-4)
    if CUDA:  # bfloat16: every weight's gradient points the same way
        assert agreement.cosine > 0.95
    else:
        assert agreement.gradient <= 1e-5
    assert ratio >= shape.at_least
    if not DRY:
        assert memory["ours"] <= memory["ordinary"] / 2
