"""Base models and adapters: load, put on tree attention, wrap in LoRA, save, load back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..errors import AlroFastError
from ..run_folder import ADAPTER_CONFIG, MERGED_BASE, adapter_config
from .attention import use_tree_attention
from .layers import fuse_layers
from .lora import fuse_lora
from .sharded import whole_weights

if TYPE_CHECKING:
    from ..data.records import Item
    from ..options import ModelArguments

logger = logging.getLogger(__name__)
LENGTH = 0.3  # of the smoothing in `order_embeddings`, where a scale reaches from -1 to 1
DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
LOAD_ERRORS = (  # damaged or unfitting files, and pickles that would run code
    OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError,
    UnpicklingError,
)  # fmt: skip


def resolve_dtype(name: str) -> torch.dtype:
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, name)


def base_path(name: str) -> str:
    """The folder or hub id behind `--model_name_or_path`; `demo` is the model shipped with the package."""
    return str(DEMO_MODEL) if name == "demo" else name


def load_tokenizer(name: str, trust_remote_code: bool = False, place: str | None = None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; AlroFastError, naming `place`, when the folder or hub id has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_path(name), trust_remote_code=trust_remote_code)
        tokenizer("a")  # settings of the wrong type are met when a text is read
        return tokenizer
    except Exception as error:  # the tokenizers library raises nothing narrower for a file that is damaged
        place = place or f"--model_name_or_path {name}"
        raise AlroFastError(f"{place}: no tokenizer could be loaded ({_first_line(error)})") from error


def load_base(
    name: str, dtype: torch.dtype, trust_remote_code: bool = False, place: str | None = None
) -> PreTrainedModel:
    """A causal LM on tree attention, its weights in `dtype`; AlroFastError, naming `place`, when there is none."""
    path = base_path(name)
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with whole_weights():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
    except LOAD_ERRORS as error:
        place = place or f"--model_name_or_path {name}"
        raise AlroFastError(f"{place}: no causal LM could be loaded ({_first_line(error)})") from error
    use_tree_attention(model)
    fuse_layers(model)
    return model


def make_scratch(
    arguments: ModelArguments, items: list[Item], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A small random Llama and a byte-level BPE tokenizer learned from the titles, for training from nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.scratch_vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f" {item.title} | {item.category}\n" for item in items), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=arguments.scratch_hidden_size,
        intermediate_size=3 * arguments.scratch_hidden_size,
        num_hidden_layers=arguments.scratch_layers,
        num_attention_heads=max(1, arguments.scratch_hidden_size // 32),
        num_key_value_heads=max(1, arguments.scratch_hidden_size // 32),
        max_position_embeddings=4096,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    use_tree_attention(model)
    fuse_layers(model)
    return model, wrapped


def order_embeddings(model: PreTrainedModel, scales: Sequence[Sequence[int]], seed: int) -> None:
    """Give tokens that stand for neighbouring values neighbouring embeddings; the model learns on from there.

    scales: token ids, in the order of what they stand for. The n rows of a scale become s (r 1 + W), s the model's
    initializer_range, r random [width], W = K R with R random [n, width], its columns scaled to a deviation of 1, and
    K_ij = exp(-((z_i - z_j) / LENGTH)^2) with z in even steps from -1 to 1: a smooth curve in place of n points without
    order, which a few thousand lists cannot put in order. Our choice.
    """
    rows = cast(Tensor, model.get_input_embeddings().weight).data
    draw = torch.Generator().manual_seed(seed)
    for ids in scales:
        z = torch.linspace(-1, 1, len(ids))
        smooth = torch.exp(-(((z[:, None] - z) / LENGTH) ** 2)) @ torch.randn(len(ids), rows.shape[1], generator=draw)
        if len(ids) > 1:
            smooth /= smooth.std(dim=0, keepdim=True).clamp_min(1e-6)
        centre = torch.randn(1, rows.shape[1], generator=draw)
        rows[list(ids)] = (model.config.initializer_range * (centre + smooth)).to(rows)


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> PeftModel:
    """Freeze the base and add LoRA matrices, kept in float32 whatever the base's type."""
    if any("lm_head" in name for name in arguments.lora_target_modules):
        raise AlroFastError(
            "--lora_target_modules lm_head: adapters on the head are dropped by servers; leave the head out, "
            "or train every weight with --use_peft false"
        )
    targets = arguments.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise AlroFastError(f"--lora_target_modules {' '.join(targets)}: {_first_line(error)}") from error
    fuse_lora(adapted)
    return cast(PeftModel, adapted)


def load_for_inference(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The tuned model of a run's folder (an adapter over its base, or full weights) and its tokenizer, in eval mode.

    `base_model` overrides the base recorded in adapter_config.json; `trust_remote_code` runs code that comes with it.
    Raises AlroFastError for a folder that holds neither, or an adapter that does not fit the base.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AlroFastError(f"{folder}: no such folder; expected one written by alro_fast.train")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    adapter = folder / ADAPTER_CONFIG
    if not adapter.is_file() and not (folder / "config.json").is_file():
        raise AlroFastError(f"{folder}: neither adapter_config.json nor config.json found; expected a trained folder")
    tokenizer = load_tokenizer(str(folder), trust_remote_code, place=str(folder))
    if adapter.is_file():
        recorded = recorded_base(folder)  # read even where it is replaced: a config that does harm is refused
        base = base_model or recorded
        place = f"--base_model {base}" if base_model else f"{folder}: base model {base}"
        model: Any = load_base(base, dtype, trust_remote_code, place=place)
        rows = model.get_input_embeddings().weight.shape[0]
        if tokenizer.vocab_size > rows:
            raise AlroFastError(
                f"{place} has {rows} token embeddings, and the tokenizer of {folder} {tokenizer.vocab_size} tokens: "
                "another vocabulary; give the base that the adapter was tuned on as --base_model"
            )
        try:
            model = PeftModel.from_pretrained(model, folder)
        except LOAD_ERRORS as error:
            raise AlroFastError(
                f"{folder}: the adapter is damaged, or does not fit the base model {base} ({_first_line(error)})"
            ) from error
        fuse_lora(model)
    else:
        model = load_base(str(folder), dtype, trust_remote_code, place=str(folder))
    return model.to(device).eval(), tokenizer


def recorded_base(folder: str | Path) -> str:
    """The base that an adapter names by its path; where that is gone, the base shipped with this package or the merged
    one beside the adapter, if it was one of them."""
    recorded = adapter_config(folder)["base_model_name_or_path"]
    if Path(recorded).is_dir():
        return recorded
    if Path(recorded).name == MERGED_BASE and (Path(folder) / MERGED_BASE).is_dir():
        return str(Path(folder) / MERGED_BASE)
    return str(DEMO_MODEL) if Path(recorded).name == DEMO_MODEL.name else recorded


def same_base(one: str, other: str) -> bool:
    """Whether two bases are one: the same folder, the same hub id, or both the shipped one."""
    if Path(one).name == Path(other).name == DEMO_MODEL.name:
        return True
    one, other = (str(Path(base).resolve()) if Path(base).is_dir() else base for base in (one, other))
    return one == other


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
