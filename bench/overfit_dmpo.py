"""All 100 few-shot users of a DMPO preference file, learned by heart by a tiny model: pair accuracy must reach 1.0.

    python -m bench.overfit_dmpo FILE.json [--epochs 30] [--dmpo_variant sdpo] [--output_dir DIR]

A random two-layer Llama and a tokenizer learned from the file's own text, tuned by the ordinary command with objective
dmpo against its own start; the same users are measured before and after. Exit status 1 below 1.0. Minutes on a CPU.

The variant is sdpo, which at k = 1 is the DMPO loss. With more rejected answers the DMPO loss, of their mean margin, is
content where some pairs are lost by a little and others won by much: --dmpo_variant dmpo need not reach 1.0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alro_fast import train
from alro_fast.data.preferences import read_preferences


def make_base(file: Path, folder: Path) -> None:
    """A byte-level BPE of 3,000 pieces and random weights, saved as any base model is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    texts = [prompt[-1].content for one in read_preferences(file) for prompt in one.prompts]
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--dmpo_variant", choices=("dmpo", "mean_outside", "sdpo"), default="sdpo")
    parser.add_argument("--output_dir", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        folder = options.output_dir or Path(work) / "run"
        make_base(options.file, Path(work) / "base")
        words = {
            "--model_name_or_path": Path(work) / "base", "--preferences": options.file,
            "--eval_preferences": options.file, "--objective": "dmpo", "--dmpo_variant": options.dmpo_variant,
            "--dpo_beta": 0.5, "--lora_r": 32, "--lora_alpha": 64, "--learning_rate": 0.005,
            "--num_train_epochs": options.epochs, "--tokens_per_batch": 4096,
            "--save_strategy": "no", "--logging_steps": 50, "--use_cpu": True,
            "--output_dir": folder, "--disable_tqdm": True,
        }  # fmt: skip
        train.main([str(word) for pair in words.items() for word in pair])
        results = json.loads((folder / "preference_results.json").read_text(encoding="utf-8"))[options.file.stem]
    reached = results["tuned"]["pair_accuracy"]
    users, seconds = results["tuned"]["records"], time.perf_counter() - started
    print(f"{users} users: pair accuracy {results['untuned']['pair_accuracy']:.3f} -> {reached:.3f} in {seconds:.0f} s")
    sys.exit(reached < 1.0)


if __name__ == "__main__":
    main()
