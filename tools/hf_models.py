"""Hugging Face models in float32 on the CPU, as references for the engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

EAGER = "eager"


def _register_rounded(dtype: torch.dtype, name: str) -> str:
    """Make the attention implementation `name`: eager attention that reads K (after RoPE) and V rounded to `dtype`."""

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounded_key, rounded_value = key.to(dtype).to(key.dtype), value.to(dtype).to(value.dtype)
        return eager_attention_forward(module, query, rounded_key, rounded_value, *args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    return name


_KV_BF16 = _register_rounded(torch.bfloat16, "eager_kv_bf16")
_KV_F16 = _register_rounded(torch.float16, "eager_kv_f16")


def kv16_attention(folder: Path) -> str:
    """The attention implementation that rounds K and V as the engine's 16-bit cache does.

    float16 in config.json gives float16, any other dtype, or none, bfloat16.
    """
    config = json.loads((folder / "config.json").read_text())
    return _KV_F16 if config.get("dtype", config.get("torch_dtype")) == "float16" else _KV_BF16


def load_model(folder: Path, attention: str = EAGER) -> PreTrainedModel:
    """A model folder in float32, whatever the dtype of its file."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits of all positions in one pass, float32 [len, vocab]."""
    assert model.dtype == torch.float32
    return model(torch.tensor([ids]), use_cache=False).logits[0]
