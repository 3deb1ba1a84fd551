"""Answers without parsing: identifiers chosen slot after slot, each once, with a KV cache; greedy or by beams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from ..modeling.attention import trunk_of
from ..modeling.lm_head import Head, head_of
from ..ops import linear_logprobs
from ..processes.dealing import dealt

if TYPE_CHECKING:
    from ..prompts import RankingPrompt

GATHERED = 1 << 24  # head entries copied at a time


class Decoded(NamedTuple):
    """One answer. order [m]: the candidate at each slot, a permutation; logprob: of that order, identifiers drawn
    without replacement; slots [m, m]: at each slot, the score y of every identifier of the list, chosen ones included.
    """

    order: np.ndarray
    logprob: float
    slots: np.ndarray


def token_logits(hidden: Tensor, head: Head, tokens: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits of a few tokens per row, in float32 whatever the model's dtype: softcap(scale (hidden w + b)).

    hidden [N, H]; tokens: per row, token ids (rows may differ in length). A row's values depend on that row alone.
    """
    lengths = torch.tensor([len(row) for row in tokens])
    ids = pad_sequence([torch.as_tensor(row) for row in tokens], batch_first=True).to(hidden.device)
    logits = _logits(hidden, head, ids).cpu().double().numpy()
    return [row[:length] for row, length in zip(logits, lengths.tolist(), strict=True)]


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[RankingPrompt],
    beams: int,
    token_budget: int,
    score: str = "logprob",
    score_space: str = "candidates",
) -> list[Decoded]:
    """Answer every prompt by identifiers without replacement; `beams` partial orders are kept (1: greedy).

    A batch holds at most `token_budget` prompt tokens, padding and beams counted (0: one prompt at a time). Batches are
    dealt over processes (`processes.dealing`).
    score, score_space: what `Decoded.slots` are, as in training (docs/methods.md 1.2).
    """
    plan = _plan(prompts, beams, token_budget)
    head, trunk = head_of(model), trunk_of(model)

    def answered(indices: list[int]) -> list[Decoded]:
        return _decode_batch(trunk, head, [prompts[index] for index in indices], beams, score, score_space)

    costs = [len(indices) * max(len(prompts[index].prompt_ids) for index in indices) for indices in plan]
    with ordinary_attention(trunk):
        found = dealt(plan, costs, answered, model=model, passes=True)
    answers = {index: one for each, some in zip(plan, found) for index, one in zip(each, some, strict=True)}
    return [answers[index] for index in range(len(prompts))]


@contextlib.contextmanager
def ordinary_attention(trunk: PreTrainedModel) -> Iterator[None]:
    """The model on SDPA for padded batches with a cache, which tree attention does not serve."""
    former = trunk.config._attn_implementation
    trunk.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        trunk.set_attn_implementation(former)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token rows of any lengths -> input_ids and attention_mask, int64 [N, longest], padded on the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.as_tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    return ids.to(device), mask.to(device)


def _logits(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """hidden [N, H], ids [N, M] -> float32 [N, M]; a product and a sum per entry, so that no row depends on another."""
    rows = max(1, GATHERED // (ids.shape[1] * hidden.shape[1]))
    parts = zip(hidden.float().split(rows), ids.split(rows), strict=True)
    logits = torch.cat([(part[:, None] * head.weight[chosen].float()).sum(-1) for part, chosen in parts])
    if head.bias is not None:
        logits = logits + head.bias[ids].float()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _plan(prompts: Sequence[RankingPrompt], beams: int, token_budget: int) -> list[list[int]]:
    """Prompts of like length and like separators side by side."""
    lengths = [len(prompt.prompt_ids) + len(prompt.answer_ids) for prompt in prompts]
    keys = [tuple(sorted({len(gap) for gap in _gaps(prompt)})) for prompt in prompts]
    plan: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: (keys[index], -lengths[index])):
        batch = plan[-1] if plan else None
        # the first of a batch is its longest
        fits = batch and keys[batch[0]] == keys[index] and (len(batch) + 1) * beams * lengths[batch[0]] <= token_budget
        if batch and fits:
            batch.append(index)
        else:
            plan.append([index])
    return plan


def _gaps(prompt: RankingPrompt) -> list[list[int]]:
    """The answer's tokens between one identifier and the next."""
    slots = prompt.slot_offsets
    return [prompt.answer_ids[slots[k] + 1 : slots[k + 1]] for k in range(len(slots) - 1)]


def _decode_batch(
    trunk: PreTrainedModel, head: Head, prompts: list[RankingPrompt], beams: int, score: str, score_space: str
) -> list[Decoded]:
    device = next(trunk.parameters()).device
    sizes = torch.tensor([len(prompt.candidate_ids) for prompt in prompts])
    n, m = len(prompts), int(sizes.max())
    tokens = pad_sequence([torch.tensor(p.candidate_ids) for p in prompts], batch_first=True).to(device)
    real = (torch.arange(m) < sizes[:, None]).to(device)  # [n, m]
    sizes = sizes.to(device)
    gaps = [_gaps(prompt) for prompt in prompts]
    gap = max((len(each[0]) for each in gaps if each), default=0)

    ids, mask = left_padded([p.prompt_ids + p.answer_ids[: p.slot_offsets[0]] for p in prompts], device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=trunk.config)
    hidden = _forward(trunk, ids, mask, positions, cache)
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    hidden, mask, position = (x.repeat_interleave(beams, 0) for x in (hidden, mask, positions[:, -1]))
    wide = tokens.repeat_interleave(beams, 0)  # [n * beams, m]; row n * beams + b is beam b

    total = torch.full((n, beams), -torch.inf, dtype=torch.float64, device=device)
    total[:, 0] = 0.0  # all beams start alike: one of them counts
    order = torch.zeros(n, beams, m, dtype=torch.long, device=device)
    left = real[:, None].repeat(1, beams, 1)
    scores = torch.zeros(n, beams, m, m, dtype=torch.float64, device=device)
    for slot in range(m):
        logits = _logits(hidden, head, wide).double().view(n, beams, m).masked_fill(~real[:, None], -torch.inf)
        scores[:, :, slot] = _score(logits, hidden, head, score, score_space)
        running = (slot < sizes)[:, None]  # [n, 1]: shorter lists are done and keep what they have
        # the softmax over what is left; a beam without a past (total -inf) never gets one
        step = logits.masked_fill(~left, -torch.inf).masked_fill(~running[..., None], 0.0).log_softmax(-1)
        reach = (total[..., None] + step).masked_fill(~left, -torch.inf).view(n, beams * m)
        best = reach.sort(dim=-1, descending=True, stable=True)
        parent = torch.where(running, best.indices[:, :beams] // m, torch.arange(beams, device=device))
        chosen = best.indices[:, :beams] % m
        total = torch.where(running, best.values[:, :beams], total)
        order, left, scores = (_pick(x, parent) for x in (order, left, scores))
        order[..., slot] = torch.where(running, chosen, order[..., slot])
        left.scatter_(-1, chosen[..., None], False)
        if slot + 1 == m:
            break
        if beams > 1:
            rows = (parent + beams * torch.arange(n, device=device)[:, None]).view(-1)
            cache.reorder_cache(cast(torch.LongTensor, rows))
        between = torch.tensor([each[slot] if slot < len(each) else [0] * gap for each in gaps], dtype=torch.long)
        between = between.view(n, gap).to(device).repeat_interleave(beams, 0)
        fed = torch.cat([wide.gather(1, chosen.reshape(-1, 1)), between], dim=1)
        mask = torch.cat([mask, mask.new_ones(fed.shape)], dim=1)
        steps = position[:, None] + torch.arange(1, fed.shape[1] + 1, device=device)
        position = steps[:, -1]
        hidden = _forward(trunk, fed, mask, steps, cache)
    orders, totals, read = order[:, 0].cpu().numpy(), total[:, 0].cpu().numpy(), scores[:, 0].cpu().numpy()
    return [
        Decoded(orders[row, :size], float(totals[row]), read[row, :size, :size])
        for row, size in enumerate(sizes.tolist())
    ]


def _score(logits: Tensor, hidden: Tensor, head: Head, score: str, score_space: str) -> Tensor:
    """y of docs/methods.md 1.2 at one slot; logits [n, beams, m] of the identifiers, hidden [n * beams, H]."""
    if score == "logit":
        return logits
    if score_space == "candidates":
        logprobs = logits.log_softmax(-1)
    else:
        nothing = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        _, lse = linear_logprobs(hidden, head.weight, nothing, **head.terms)
        logprobs = logits - lse.double().view(*logits.shape[:2], 1)
    return logprobs if score == "logprob" else logprobs.exp()


def _forward(trunk: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Hidden states [N, H] after the last token."""
    output = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return output.last_hidden_state[:, -1]


def _pick(state: Tensor, parent: Tensor) -> Tensor:
    """state [n, beams, ...] with beam b of every row replaced by its beam parent[row, b]."""
    return state[torch.arange(len(state), device=state.device)[:, None], parent]
