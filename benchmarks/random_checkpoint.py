"""A base of Llama 3.2 1B's shape with random weights, and GEM checkpoints of it, to measure speed.

    python benchmarks/random_checkpoint.py --tokenizer DIR --out DIR --special-tokens 1 8

``--tokenizer`` is a folder with a tokenizer. Writes ``base`` and, for each number of special
tokens, ``gem-<k>`` with a random adapter into ``--out``. How fast an engine is does not depend on
what its weights are, and neither model needs a network to be had.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmark_script import run_script
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from gem_vllm.checkpoint import add_special_tokens, load_base, save_checkpoint
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LORA_RANK = 16


def main() -> None:
    """Write the base, then a checkpoint for each k."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--special-tokens", type=int, nargs="+", default=[1], metavar="K")
    args = parser.parse_args()
    if min(args.special_tokens) < 1:
        raise GemError("--special-tokens takes numbers of 1 or more")
    make_base(args.out / "base", args.tokenizer, SHAPE)
    for k in args.special_tokens:
        make_checkpoint(args.out / "base", args.out / f"gem-{k}", k)
        print(f"written: {args.out / f'gem-{k}'}")


def make_base(folder: Path, tokenizer_folder: Path, shape: Mapping[str, Any]) -> None:
    """A Llama of a shape with random weights, in bfloat16; GemError where there is no tokenizer."""
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise GemError(
            f"{tokenizer_folder} holds no tokenizer.json; give a folder with a tokenizer"
        )
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_checkpoint(base: Path, folder: Path, k: int) -> None:
    """A GEM checkpoint of ``base`` in adapter mode, its rows and its LoRA random."""
    model, tokenizer = load_base(base, dtype=torch.bfloat16)
    ids = add_special_tokens(model, tokenizer, k)
    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    save_checkpoint(folder, model, tokenizer, GemConfig(ids, "mean", "adapter", base.name))


if __name__ == "__main__":
    run_script(main)
