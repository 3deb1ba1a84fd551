"""What of a base model is fused: a small random model of its architecture is asked, as training asks the real one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import AlroFastError
from ..modeling.attention import ROWS_ONLY, trunk_of, use_tree_attention
from ..modeling.layers import FusedAttention, FusedMLP, FusedNorm, fuse_layers
from ..modeling.lm_head import prove_head
from ..modeling.loading import LOAD_ERRORS, base_path
from ..modeling.lora import LoRALinear, fuse_lora

SMALL = {  # numbers of a configuration -> at most
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 256, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 256, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 128,
}  # fmt: skip
FUSED = {"norms": ("Norm", FusedNorm), "MLPs": ("MLP", FusedMLP), "rotations": ("Attention", FusedAttention)}


def fused_parts(name: str, trust_remote_code: bool = False) -> dict[str, str]:
    """Rows of the report. `refused`: why alro_fast cannot train such a model, where it cannot.

    Raises AlroFastError for a name without a configuration of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(base_path(name), trust_remote_code=trust_remote_code)
        quantised = getattr(config, "quantization_config", None) is not None
        model = small(config, trust_remote_code)
    except LOAD_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AlroFastError(
            f"--model_name_or_path {name}: no causal LM can be made of its configuration ({reason}); expected a folder "
            "or a hub id with a config.json"
        ) from error
    rows = {"model": f"{name}: {type(model).__name__}, asked at a small size with random weights"}
    try:
        prove_head(model)
        use_tree_attention(model)
    except AlroFastError as error:
        return rows | {"refused": str(error)}
    except Exception as error:  # whatever an architecture raises whose numbers do not go together when they are small
        raise AlroFastError(
            f"--model_name_or_path {name}: {type(model).__name__} cannot be asked at a small size "
            f"({next(iter(str(error).splitlines()), type(error).__name__)}); train --dry_run true asks the model itself"
        ) from error
    fuse_layers(model)
    parts = [_counted(model, what, *named) for what, named in FUSED.items()]
    parts.append(_lora(model))
    rows["fused"] = "tree attention, LM head" + "".join(f", {done}" for done, _ in parts if done)
    left = [not_done for _, not_done in parts if not_done]
    if not getattr(trunk_of(model), ROWS_ONLY, False):
        left.append("the last layer, which runs on all rows")
    if quantised:
        left.append("quantised linears, which compute by their own forward")
    return rows | {"not fused": ", ".join(left) or "nothing"}


def small(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """A random model of a configuration's architecture, two layers of at most 64; the configuration stays."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, most in SMALL.items():
        given = getattr(text, name, None)
        if isinstance(given, int) and given > most:
            setattr(text, name, most)
    if vars(text).get("layer_types"):
        kinds = list(dict.fromkeys(text.layer_types))  # one of each
        text.layer_types = (kinds * 2)[: max(2, len(kinds))]
        text.num_hidden_layers = len(text.layer_types)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    return made.eval()


def _counted(model: nn.Module, what: str, name: str, fused: type[nn.Module]) -> tuple[str, str]:
    """("norms", "1 of 6 norms"): what is fused, and what is not, each "" where there is none."""
    done = sum(isinstance(module, fused) for module in model.modules())
    left = sum(type(module).__name__.endswith(name) and not isinstance(module, fused) for module in model.modules())
    return (what if done else ""), (f"{left} of {done + left} {what}" if left else "")


def _lora(model: Any) -> tuple[str, str]:
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    fuse_lora(adapted)
    modules = list(adapted.modules())
    done = sum(isinstance(module, LoRALinear) for module in modules)
    left = sum(hasattr(module, "lora_A") and not isinstance(module, LoRALinear) for module in modules)
    return ("LoRA" if done else ""), (f"{left} of {done + left} LoRA modules" if left else "")
