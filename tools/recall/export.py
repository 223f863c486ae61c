#!/usr/bin/env python3
"""Turn a checkpoint of train.py into a Hugging Face model folder in bf16."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from model import SHAPE
from safetensors.torch import save_file


def model_config(max_positions: int) -> dict[str, Any]:
    """config.json"""
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        vocab_size=SHAPE.vocab,
        max_position_embeddings=max_positions,
        rms_norm_eps=SHAPE.norm_eps,
        rope_theta=SHAPE.rope_theta,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
    )


def tokenizer_config(max_positions: int) -> dict[str, Any]:
    """tokenizer_config.json"""
    return dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(content, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument("--max-positions", type=int, default=4096, help="longest context (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, default=Path("tokenizer.json"), help="default: %(default)s")
    options = parser.parse_args()

    weights = torch.load(options.checkpoint, weights_only=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})
    write_json(options.out / "config.json", model_config(options.max_positions))
    write_json(options.out / "generation_config.json", dict(bos_token_id=0, eos_token_id=1, do_sample=False))
    write_json(options.out / "tokenizer_config.json", tokenizer_config(options.max_positions))
    shutil.copyfile(options.tokenizer, options.out / "tokenizer.json")
    print(f"{options.out}: {sum(tensor.numel() for tensor in weights.values())} parameters")


if __name__ == "__main__":
    main()
