"""The recall model: a Llama of 3 M parameters, with the parameter names of Hugging Face checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 640
    vocab: int = 1536
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5


SHAPE = Shape()


class RmsNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, SHAPE.norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding over the two halves of each head."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Attention(nn.Module):
    """Causal attention with grouped query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(SHAPE.hidden, SHAPE.heads * SHAPE.head_dim, bias=False)
        self.k_proj = nn.Linear(SHAPE.hidden, SHAPE.kv_heads * SHAPE.head_dim, bias=False)
        self.v_proj = nn.Linear(SHAPE.hidden, SHAPE.kv_heads * SHAPE.head_dim, bias=False)
        self.o_proj = nn.Linear(SHAPE.heads * SHAPE.head_dim, SHAPE.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n_batch, n_tokens, _ = x.shape
        group = SHAPE.heads // SHAPE.kv_heads

        def split_heads(projected: Tensor, heads: int) -> Tensor:
            return projected.view(n_batch, n_tokens, heads, SHAPE.head_dim).transpose(1, 2)

        query = rotate(split_heads(self.q_proj(x), SHAPE.heads), cos, sin)
        key = rotate(split_heads(self.k_proj(x), SHAPE.kv_heads), cos, sin)
        value = split_heads(self.v_proj(x), SHAPE.kv_heads)
        attended = F.scaled_dot_product_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), is_causal=True
        )
        return self.o_proj(attended.transpose(1, 2).reshape(n_batch, n_tokens, SHAPE.heads * SHAPE.head_dim))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(SHAPE.hidden, SHAPE.intermediate, bias=False)
        self.up_proj = nn.Linear(SHAPE.hidden, SHAPE.intermediate, bias=False)
        self.down_proj = nn.Linear(SHAPE.intermediate, SHAPE.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(SHAPE.hidden)
        self.post_attention_layernorm = RmsNorm(SHAPE.hidden)
        self.self_attn = Attention()
        self.mlp = Mlp()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(SHAPE.vocab, SHAPE.hidden)
        self.layers = nn.ModuleList(Layer() for _ in range(SHAPE.layers))
        self.norm = RmsNorm(SHAPE.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        half = SHAPE.head_dim // 2
        frequencies = SHAPE.rope_theta ** (-torch.arange(0, half).float() / half)
        angles = torch.outer(torch.arange(ids.shape[1]).float(), frequencies)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """The model; the embedding is its LM head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * SHAPE.layers) if into_residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.model(ids), self.model.embed_tokens.weight)
