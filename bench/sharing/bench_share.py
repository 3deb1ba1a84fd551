"""What `--share` is worth on the prompts of real lists: `pytest bench/sharing/bench_share.py -s`.

One pass over the same lists under share none, list and batch, in one process: batches planned and packed as training
and ranking do, the same model, LoRA and optimiser, fused layers. Rows of the trunk are counted; the rest is CPU seconds
of one thread (CUDA: seconds), rounds alternating, and ratios are medians over rounds. `kept` says how much of the ratio
of rows the ratio of times keeps. Lists: MovieLens ml-latest-small of `$ALRO_FAST_SHARED_DATA` or ../shared/data,
histories of 20 and lists of 10 (without it, the demo's); preferences: the DMPO authors' ML-1M file with five rejected
titles there.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import alro_fast
from alro_fast import prepare
from alro_fast.data.demo import make_demo
from alro_fast.data.lists import open_prepared
from alro_fast.data.preferences import read_preferences
from alro_fast.modeling.attention import answer_hidden_states, use_tree_attention
from alro_fast.modeling.layers import fuse_layers
from alro_fast.modeling.lm_head import head_of
from alro_fast.modeling.lora import fuse_lora
from alro_fast.modeling.memory import keep_freed_memory
from alro_fast.modeling.packing import SHARES
from alro_fast.objectives.base import Objective, build_objective, objective_arguments
from alro_fast.prompts import PromptBuilder
from alro_fast.prompts.preference import PreferencePrompts
from alro_fast.prompts.recranker import RecRankerPrompts
from alro_fast.ranking.ranker import Ranker
from alro_fast.training.plans.dataset import TreeDataset
from bench.bench_step import Shape, make_model
from bench.common import CUDA, DEVICE, DRY, machine

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("ALRO_FAST_SHARED_DATA", ROOT.parent / "shared" / "data"))
DMPO_FILE = SHARED / "dmpo-prompts" / "rec_data_ml_1m_dpo_ranking_5.json"
SHAPE = Shape(8000, 32, 48, 2, 2, 1, 0, 1, 0.0) if DRY else Shape(8000, 256, 768, 4, 8, 4, 0, 5, 0.0)
LISTS, BUDGET, ROUNDS = (2, 24_576, 1) if DRY else (12, 24_576, 3)
TRAINING = {
    "ratings, one permutation": {"objective": "alro", "answer": "ratings"},
    "ranking, one permutation": {"objective": "alro", "answer": "ranking"},
    "three tasks": {"objective": "recranker"},
    "dmpo, five rejected": {"objective": "dmpo", "reference_free": True},
}
RANKING = {"ratings, four presentations": ("ratings", 4), "first, four presentations": ("ranking", 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder."""
    made, raw = tmp_path_factory.mktemp("share") / "lists", SHARED / "ml-latest-small"
    if raw.is_dir():
        words = ["--dataset", "ml-latest-small", "--raw_dir", raw, "--output_dir", made, "--list_size", 10]
        prepare.main([str(word) for word in words])
    else:
        make_demo(made)
    return made


@functools.cache
def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 8,000 pieces that knows the titles and the words of the template, as a real model's would."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab, special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    letters = [f" {chr(code)}" for code in range(65, 91)] * 100
    template = (Path(alro_fast.__file__).parent / "templates" / "movies.yaml").read_text(encoding="utf-8")
    titles = [item.title for item in open_prepared(folder).items]
    tokenizer.train_from_iterator([*letters, *titles, *[template] * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def ready_model() -> torch.nn.Module:
    keep_freed_memory()
    model = make_model(SHAPE)
    use_tree_attention(model)
    fuse_layers(model)
    fuse_lora(model)
    return model


class Training:
    """Steps over all batches of an epoch."""

    def __init__(self, model: torch.nn.Module, lists: Sequence[Any], objective: Objective, share: str) -> None:
        self.model, self.objective = model, objective
        data = TreeDataset(lists, objective, share=share)
        plan = data.plans(BUDGET, None)(0)
        self.batches = [data[0, batch].to(torch.device(DEVICE)) for batch in plan]
        self.rows = sum(batch.packed.unique_tokens for batch in self.batches)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def __call__(self) -> float:
        total = 0.0
        for batch in self.batches:
            hidden = answer_hidden_states(self.model, batch.packed)
            terms = self.objective.loss(hidden, head_of(self.model), batch.packed, batch.targets)
            loss = sum(term.weight * term.value for term in terms)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        return total


def interleaved(ways: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of every way, round after round; the first round warms up."""
    clock = time.perf_counter if CUDA else time.thread_time
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + (not DRY)):
        for name, run in ways.items():
            began = clock()
            run()
            if CUDA:
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return {name: each[not DRY :] for name, each in seconds.items()}


def report(benchmark, what: str, lists: int, rows: dict[str, int], seconds: dict[str, list[float]]) -> None:
    """Rows and seconds a list, and both as ratios to share none."""
    benchmark.extra_info |= {"contestant": what, "machine": machine(), "lists": lists}
    for name in SHARES:
        tokens = rows["none"] / rows[name]
        faster = statistics.median(other / own for other, own in zip(seconds["none"], seconds[name]))
        found = {
            "rows_a_list": rows[name] / lists, "lists_per_second": lists / statistics.median(seconds[name]),
            "fewer_rows": tokens, "times_faster": faster, "kept": faster / tokens,
        }  # fmt: skip
        benchmark.extra_info |= {f"{name}_{key}": value for key, value in found.items()}
        print(f"{what}, {name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in found.items()))
    assert rows["batch"] <= rows["list"] <= rows["none"]
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("what", TRAINING)
@pytest.mark.benchmark(group="share, training")
def test_training(benchmark, folder: Path, what: str) -> None:
    options = dict(TRAINING[what])
    answer = options.pop("answer", "ranking")
    tokenizer, prepared = tokenizer_of(folder), open_prepared(folder)
    if options["objective"] == "dmpo":
        if not DMPO_FILE.is_file():
            pytest.skip(f"no {DMPO_FILE}")
        lists: Sequence[Any] = read_preferences(DMPO_FILE)[:LISTS]
        prompts: Any = PreferencePrompts(tokenizer)
    else:
        lists = prepared.lists("train")[:LISTS]
        kind = RecRankerPrompts if options["objective"] == "recranker" else PromptBuilder
        prompts = kind(tokenizer, "movies")
    objective = build_objective(objective_arguments()(**options), prompts, answer=answer, seed=0)
    ways = {share: Training(ready_model(), lists, objective, share) for share in SHARES}
    seconds = interleaved(ways)
    report(benchmark, what, len(lists), {name: way.rows for name, way in ways.items()}, seconds)


@pytest.mark.parametrize("what", RANKING)
@pytest.mark.benchmark(group="share, ranking")
def test_ranking(benchmark, folder: Path, what: str) -> None:
    answer, shuffles = RANKING[what]
    tokenizer, lists = tokenizer_of(folder), open_prepared(folder).lists("test")[:LISTS]
    model, rows = ready_model(), {}
    ways = {}
    for share in SHARES:
        ranker = Ranker(
            model, tokenizer, PromptBuilder(tokenizer, "movies"), answer=answer, token_budget=BUDGET, share=share
        )
        ways[share] = functools.partial(ranker.rank, lists, shuffles=shuffles)
        rows[share] = counted_rows(ways[share])
    report(benchmark, what, len(lists), rows, interleaved(ways))


def counted_rows(run: Callable[[], Any]) -> int:
    """Rows of the trunk in all forward passes of a run."""
    from alro_fast.ranking import reading

    counted, forward = [], reading.answer_hidden_states
    with pytest.MonkeyPatch.context() as patch:
        watched = lambda model, batch: counted.append(batch.unique_tokens) or forward(model, batch)  # noqa: E731
        patch.setattr(reading, "answer_hidden_states", watched)
        run()
    return sum(counted)
