"""Log-probs without logits on tiny random models of many architectures, beside the models' own logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from tree_models import make_trees

from alro_fast.errors import AlroFastError
from alro_fast.modeling.attention import answer_hidden_states, tree_hidden_states, use_tree_attention
from alro_fast.modeling.lm_head import fused_head, head_of, prove_head
from alro_fast.modeling.packing import collate

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {  # configuration class -> what is special about its head
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Phi": {},  # a bias
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},  # soft-cap, tied
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},  # divides
    "HyperCLOVAX": {"logits_scaling": 4.0},  # multiplies
    "MiniCPM3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                 "num_key_value_heads": 4, "dim_model_base": 8},  # divides the hidden states
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
}  # fmt: skip


def tiny(name: str, **overrides) -> nn.Module:
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}Config", None)
    model_class = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel", None)
    if config_class is None or model_class is None:
        pytest.skip(f"this transformers has no {name}")
    sizes = {key: SIZES[key] for key in ("vocab_size", "initializer_range")} if name == "GPT2" else SIZES
    model = model_class(config_class(**sizes | MODELS[name] | overrides))
    if name == "Phi":
        nn.init.normal_(model.lm_head.bias)
    return model.eval()


def example(ignored: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 11), generator=generator)
    labels = torch.where(torch.rand(2, 11, generator=generator) < ignored, -100, ids)
    return ids, labels


def plain_logprobs(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """The ordinary way: full logits, shifted."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1].float()
    targets = labels[:, 1:]
    logprobs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return nn.functional.pad(logprobs.masked_fill(targets == -100, 0.0), (1, 0))


def gradients(model: nn.Module, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logprobs.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item() + 1e-7, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_every_gradient_equal_the_models_own(name):
    model = tiny(name)
    ids, labels = example()
    want = plain_logprobs(model, ids, labels)
    got = fused_head(model)(labels, ids)
    assert got.shape == labels.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model, got), gradients(model, want))


def test_the_heads_as_configured():
    assert head_of(tiny("Gemma2"))[2:] == (3.0, 1.0)
    assert head_of(tiny("Cohere"))[2:] == (None, 0.25)
    assert head_of(tiny("Granite"))[2:] == (None, 0.25)
    assert head_of(tiny("Llama"))[1:] == (None, None, 1.0)
    model = tiny("Phi")
    head = head_of(model)
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias


@pytest.mark.parametrize("name", ["Gemma2", "Cohere"])
def test_every_row_and_selected_rows_agree(name):
    model = tiny(name)
    ids, labels = example()
    score = fused_head(model)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    some, all_rows = (score(labels, ids, attention_mask=mask, every_row=every) for every in (False, True))
    torch.testing.assert_close(some, all_rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some, plain_logprobs(model, ids, labels, attention_mask=mask), rtol=1e-5, atol=1e-5)
    assert (some[labels == -100] == 0).all()
    assert (some[:, 0] == 0).all()


def test_no_logits_are_made():
    model = tiny("Llama")
    ids, labels = example()
    made = []
    model.lm_head.register_forward_hook(lambda _, __, output: made.append(output.shape))
    score = fused_head(model, check=False)
    score(labels, ids)
    assert made == [(2, 0, 97)]


def test_every_distinct_row_goes_through_the_head_once():
    """Log-probabilities and gradients are those of a row for every label; the head sees fewer."""
    model, trees = use_tree_attention(tiny("Llama")), make_trees()
    batch = collate(trees, range(len(trees)))
    assert not batch.one_label_a_row
    found = []
    for rows, read in (
        (answer_hidden_states, lambda head, hidden: head.label_logprobs(hidden, batch)),
        (tree_hidden_states, lambda head, hidden: head.logprobs(hidden, batch.labels)),
    ):
        model.zero_grad()
        hidden = rows(model, batch)
        logprobs = read(head_of(model), hidden)
        (logprobs * torch.linspace(1, 2, len(logprobs))).sum().backward()
        found.append((len(hidden), logprobs.detach(), [p.grad.clone() for p in model.parameters()]))
    assert found[0][0] < found[1][0] == len(batch.labels)
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-4, atol=1e-5)


def test_nothing_supervised():
    model = tiny("Llama")
    ids, labels = example(ignored=1.1)
    logprobs = fused_head(model)(labels, ids)
    assert (logprobs == 0).all()
    logprobs.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_bfloat16_model():
    model = tiny("Gemma2").bfloat16()
    ids, labels = example()
    got = fused_head(model)(labels, ids)
    want = plain_logprobs(model.float(), ids, labels)
    torch.testing.assert_close(got, want, rtol=0, atol=0.1)
    assert got.dtype == torch.float32


def test_an_unknown_change_of_logits_is_refused():
    model = tiny("Llama")
    model.lm_head.register_forward_hook(lambda _, __, output: output * 1.5)
    with pytest.raises(AlroFastError, match=r"LlamaForCausalLM .* changes its logits in a way that is not known here"):
        fused_head(model)
    model = tiny("Cohere")
    model.config.logit_scale = 1.0  # the configuration no longer tells what the model does
    with pytest.raises(AlroFastError, match="changes its logits"):
        prove_head(model)


def test_models_that_cannot_be_served_are_refused():
    model = tiny("Llama")
    with pytest.raises(AlroFastError, match="backend is 'cuda'"):
        fused_head(model, backend="cuda")
    with pytest.raises(AlroFastError, match=r"labels has shape \(2, 10\); expected \(2, 11\)"):
        fused_head(model)(example()[1][:, 1:], example()[0])
    model.lm_head = None
    with pytest.raises(AlroFastError, match="has no output embeddings"):
        head_of(model)
    encoder = transformers.BertModel(
        transformers.BertConfig(**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"})
    )
    with pytest.raises(AlroFastError):
        head_of(encoder)


# ---- adapters


def with_lora(model: nn.Module, **options) -> nn.Module:
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "lm_head"], **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi"])
def test_lora_on_the_head_is_exact(name):
    model = with_lora(tiny(name, tie_word_embeddings=False))
    ids, labels = example()
    got = fused_head(model)(labels, ids)
    want = plain_logprobs(model, ids, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads = gradients(model, got)
    assert_same(grads, gradients(model, want))
    assert any("lm_head" in name and "lora_A" in name for name in grads)
    with model.disable_adapter():
        torch.testing.assert_close(fused_head(model)(labels, ids), plain_logprobs(model, ids, labels))
    assert (fused_head(model)(labels, ids) - want).abs().max() < 1e-5
    model.merge_adapter()
    torch.testing.assert_close(fused_head(model)(labels, ids), want, rtol=1e-4, atol=1e-4)


def test_two_adapters_at_once():
    model = with_lora(tiny("Llama"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    ids, labels = example()
    torch.testing.assert_close(fused_head(model)(labels, ids), plain_logprobs(model, ids, labels), rtol=1e-5, atol=1e-5)


def test_a_retrained_head():
    model = get_peft_model(
        tiny("Llama"),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    saved = model.base_model.model.lm_head.modules_to_save["default"].weight
    nn.init.normal_(saved)
    ids, labels = example()
    got, want = fused_head(model)(labels, ids), plain_logprobs(model, ids, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads = gradients(model, got)
    assert_same(grads, gradients(model, want))
    assert head_of(model).weight is saved
    with model.disable_adapter():
        assert head_of(model).weight is not saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "is a variant of LoRA"),
        ({"lora_dropout": 0.1}, r"has dropout 0\.1 on the LM head"),
    ],
)
def test_adapters_that_would_be_wrong_are_refused(options, message):
    model = with_lora(tiny("Llama"), **options).train()
    with pytest.raises(AlroFastError, match=message):
        head_of(model)
    if "lora_dropout" in options:
        prove_head(model.eval())  # without its dropout it is exact


def test_an_adapter_of_another_kind_is_refused():
    from peft import IA3Config

    model = get_peft_model(tiny("Llama"), IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(AlroFastError, match="carries an adapter of type"):
        head_of(model)


# ---- partitioned and quantised weights


def test_partitioned_weights_are_refused():
    model = tiny("Llama")
    model.lm_head.weight = nn.Parameter(torch.empty(0))  # ZeRO-3 between steps
    with pytest.raises(AlroFastError, match=r"weight has shape \(0,\) here: ZeRO-3 or FSDP1 holds it in parts"):
        head_of(model)


def test_quantised_weights_are_refused():
    model = tiny("Llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AlroFastError, match=r"the LM head is a Linear of torch.int8; expected .* without quantisation"):
        head_of(model)


@pytest.mark.parametrize("frozen", [False, True])
def test_fsdp2(one_process, frozen):
    """A head gathered after the forward pass trains; one that is sharded again serves frozen; gradients are reduced."""
    from torch.distributed.fsdp import fully_shard

    ids, labels = example()
    plain, model = tiny("Llama"), tiny("Llama")
    plain.lm_head.requires_grad_(not frozen)
    model.lm_head.requires_grad_(not frozen)
    want = plain_logprobs(plain, ids, labels)
    fully_shard(model, mesh=one_process, reshard_after_forward=frozen)
    got = fused_head(model)(labels, ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert hasattr(model.lm_head.weight, "full_tensor") == frozen
    got.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(hasattr(grad, "full_tensor") for grad in grads.values())  # FSDP2 has reduced and sharded every one
    assert_same({name: grad.full_tensor() for name, grad in grads.items()}, gradients(plain, want))


def test_a_sharded_trainable_head_is_refused(one_process):
    from torch.distributed.fsdp import fully_shard

    model = tiny("Llama")
    fully_shard(model, mesh=one_process, reshard_after_forward=True)
    with pytest.raises(AlroFastError, match="trainable and sharded"):
        fused_head(model)(*reversed(example()))
    with torch.no_grad():
        assert type(head_of(model).weight) is torch.Tensor


def test_ddp(one_process):
    from torch.nn.parallel import DistributedDataParallel

    ids, labels = example()
    plain = tiny("Llama")
    want = plain_logprobs(plain, ids, labels)
    model = DistributedDataParallel(tiny("Llama"))
    got = fused_head(model)(labels, ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model.module, got), gradients(plain, want))
