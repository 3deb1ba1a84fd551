"""Work within a model's forward pass: what FSDP2 holds in parts is whole there, and gradients are reduced."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, random_lists, tiny_llama
from torch import nn

from alro_fast.modeling.attention import answer_hidden_states
from alro_fast.modeling.packing import Branch, Tree, collate
from alro_fast.modeling.sharded import accept_work, held, together, whole_weights, with_head, within
from alro_fast.processes.dealing import is_sharded
from alro_fast.prompts import PromptBuilder
from alro_fast.ranking.ranker import Ranker
from alro_fast.training.guards.finite import all_finite

TREE = Tree([Branch([3, 5, 7, 9, 11], 3), Branch([3, 5, 7, 13], 3)], name="of a test")


def sharded(model: nn.Module, mesh) -> nn.Module:
    """As accelerate does it: layers and embeddings by themselves, norm and head together, the root around them."""
    from torch.distributed.fsdp import fully_shard

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in causal.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(causal.model.embed_tokens, mesh=mesh)
    fully_shard([causal.model.norm, causal.lm_head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def losses(model: nn.Module) -> torch.Tensor:
    """Cross-entropy of a small tree's answers, twice in one forward pass, as where a reference comes first."""
    accept_work(model)
    batch = collate([TREE], [0])

    def once() -> torch.Tensor:
        hidden = answer_hidden_states(model, batch)
        return with_head(model, hidden, lambda rows, head: -head.label_logprobs(rows, batch).sum())

    def work() -> torch.Tensor:
        with torch.no_grad():
            before = once()
        return once() + 0 * before

    return within(model, work)


def test_every_weight_gets_its_gradient_the_head_too(one_process):
    plain, model = tiny_llama(40), sharded(tiny_llama(40), one_process)
    for _ in range(2):  # a second step finds the state that the first one left
        want, found = losses(plain), losses(model)
        torch.testing.assert_close(found, want)
        want.backward(), found.backward()
    assert is_sharded(model)
    assert not is_sharded(plain)
    for (name, one), (_, other) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, msg=name)
    assert plain.lm_head.weight.grad.norm() > 0.1


@pytest.mark.parametrize("method", ["first", "greedy", "expected"])
def test_a_sharded_model_ranks_like_a_whole_one(one_process, method):
    """Trees in one pass (first), a KV cache slot after slot (greedy); then it trains on."""
    tokenizer = byte_tokenizer()
    lora = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    lists, scores = random_lists(3, 4, seed=1, history=2), []
    for shard in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(len(tokenizer)), lora)
        model = sharded(model, one_process) if shard else model
        ranker = Ranker(model, tokenizer, PromptBuilder(tokenizer, "movies"))
        score = functools.partial(ranker.scores, lists, method=method)
        scores.append(together(model, score))
        with ranker.untuned():
            scores[-1] += together(model, score)
        losses(model).backward()
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(torch.tensor(other), torch.tensor(one), rtol=1e-5, atol=1e-5)


def test_a_head_is_computed_in_its_own_type_and_left_as_it_was():
    model = tiny_llama(40)
    hidden = torch.randn(2, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_head(model, hidden, lambda rows, head: rows @ head.weight.T)
    assert found.dtype == torch.float32
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(ZeroDivisionError):
        with_head(model, hidden, lambda rows, head: 1 / 0)
    torch.testing.assert_close(model.lm_head(hidden.float()), found)


class Zero3:
    """Stands for transformers' configuration of DeepSpeed."""

    def is_zero3(self) -> bool:
        return True


def test_models_are_loaded_whole_where_zero3_is_to_shard_them():
    from transformers.integrations import deepspeed

    config = Zero3()
    with whole_weights():  # nothing to put aside
        assert deepspeed._hf_deepspeed_config_weak_ref is None
    try:
        deepspeed.set_hf_deepspeed_config(config)
        with whole_weights():
            assert deepspeed._hf_deepspeed_config_weak_ref is None
        assert deepspeed._hf_deepspeed_config_weak_ref() is config
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_a_process_looks_at_what_it_holds(one_process):
    """FSDP2's shards, and ZeRO-3's, where the weight itself is empty."""
    model = sharded(tiny_llama(40), one_process)
    assert all_finite(model)
    assert type(held(model.lm_head.weight)) is torch.Tensor
    held(model.lm_head.weight).data[3, 2] = torch.nan
    assert not all_finite(model)
    zero = nn.Linear(1, 1, bias=False)
    zero.weight.ds_tensor, zero.weight.data = torch.tensor([torch.inf]), torch.empty(0)
    assert not all_finite(zero)
