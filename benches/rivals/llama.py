"""Llama and Mistral in plain torch: configs, weights (Hugging Face folders and `synthetic:` shapes), dense segments."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LLAMA_3 = dict(
    model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5, rope_theta=500000.0, dtype="bfloat16",
)  # fmt: skip


def llama3_rope(factor: float) -> dict[str, Any]:
    return dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)  # fmt: skip


# The same as in src/model/synthetic.rs.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": LLAMA_3,
    "llama-3.1-8b": LLAMA_3 | dict(rope_scaling=llama3_rope(8.0)),
    "llama-3.2-1b": LLAMA_3
    | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True,
           rope_scaling=llama3_rope(32.0)),
    "llama-2-7b": LLAMA_3
    | dict(intermediate_size=11008, num_key_value_heads=32, vocab_size=32000, rope_theta=10000.0),
    "mistral-7b-v0.2": LLAMA_3
    | dict(model_type="mistral", vocab_size=32000, rope_theta=1000000.0, sliding_window=None),
    "tinyllama-1.1b": LLAMA_3
    | dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4, vocab_size=32000,
           rope_theta=10000.0),
    "tiny": LLAMA_3
    | dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
           head_dim=64, vocab_size=512, rope_theta=10000.0),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    window: int | None
    kv_dtype: torch.dtype
    tied: bool
    inv_freq: Tensor  # [D/2] float32

    @property
    def group_heads(self) -> int:
        return self.heads // self.kv_heads

    @staticmethod
    def parse(c: dict[str, Any]) -> Config:
        kind = c.get("model_type")
        if kind not in ("llama", "mistral") or c.get("attention_bias") or c.get("mlp_bias"):
            raise SystemExit(f"model_type {kind!r}: only llama and mistral without biases are supported")
        heads = c["num_attention_heads"]
        head_dim = c.get("head_dim") or c["hidden_size"] // heads
        mistral = kind == "mistral"
        return Config(
            hidden=c["hidden_size"],
            intermediate=c["intermediate_size"],
            layers=c["num_hidden_layers"],
            heads=heads,
            kv_heads=c.get("num_key_value_heads") or (8 if mistral else heads),
            head_dim=head_dim,
            vocab=c["vocab_size"],
            eps=c.get("rms_norm_eps", 1e-6),
            window=c.get("sliding_window", 4096) if mistral else None,
            kv_dtype=torch.float16 if c.get("dtype", c.get("torch_dtype")) == "float16" else torch.bfloat16,
            tied=c.get("tie_word_embeddings", False),
            inv_freq=inverse_frequencies(c, head_dim),
        )


def inverse_frequencies(c: dict[str, Any], head_dim: int) -> Tensor:
    """As Hugging Face computes them, for RoPE of type default, linear and llama3."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or c.get("rope_theta", 10000.0)
    freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return freq
    if kind == "linear":
        return freq / rope["factor"]
    if kind != "llama3":
        raise SystemExit(f"rope_type {kind!r}: only default, linear and llama3 are supported")
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope.get("original_max_position_embeddings", c.get("max_position_embeddings"))
    wavelength = 2 * math.pi / freq
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * freq / factor + smooth * freq
    long = torch.where(wavelength > context / low, freq / factor, between)
    return torch.where(wavelength < context / high, freq, long)


class Folder:
    """Tensors of a Hugging Face folder, mapped."""

    DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

    def __init__(self, path: Path):
        self.tensors: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            with file.open("rb") as handle:
                data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            for name, info in header.items():
                dtype, (start, end) = self.DTYPES[info["dtype"]], info["data_offsets"]
                count = (end - start) // dtype.itemsize
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + start)
                self.tensors[name] = flat.view(info["shape"])

    def __call__(self, name: str, rows: int, cols: int) -> Tensor:
        return self.tensors[name]


def synthetic(device: torch.device) -> Callable[[str, int, int], Tensor]:
    """Makes the matrices of tools/synthetic_weights.py, bit for bit, on the device."""

    def signed(x: int) -> int:
        return (x + 2**63) % 2**64 - 2**63

    def shifted(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & (2 ** (64 - bits) - 1)  # a logical shift

    def part(name: str, cols: int, first: int, count: int) -> Tensor:
        """Numbers 4 * first .. 4 * (first + count), bf16."""
        seed = 0xCBF29CE484222325
        for byte in name.encode():
            seed = (seed ^ byte) * 0x100000001B3 % 2**64
        index = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
        z = index * signed(0x9E3779B97F4A7C15) + signed(seed)
        z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
        z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
        words = (z ^ shifted(z, 31)).view(torch.int16)
        amplitude = 1.0 if name == "model.embed_tokens.weight" else math.sqrt(3.0 / cols)
        return (words.float() * (amplitude / 32768)).to(torch.bfloat16)

    def matrix(name: str, rows: int, cols: int) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(cols, device=device)
        hashes, at_once = (rows * cols + 3) // 4, 1 << 24
        parts = [part(name, cols, i, min(at_once, hashes - i)) for i in range(0, hashes, at_once)]
        return torch.cat(parts)[: rows * cols].view(rows, cols)

    return matrix


@dataclass
class Layer:
    norm: Tensor  # [hidden]
    qkv: Tensor  # [(H + 2 Hkv) D, hidden]: one matmul instead of three
    out: Tensor  # [hidden, H D]
    mlp_norm: Tensor
    gate_up: Tensor  # [2 intermediate, hidden]
    down: Tensor  # [hidden, intermediate]


@dataclass
class Model:
    config: Config
    embed: Tensor  # [vocab, hidden]
    layers: list[Layer]
    norm: Tensor
    head: Tensor  # [vocab, hidden]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def load(name: str, device: torch.device, dtype: torch.dtype) -> Model:
        """`name` is a Hugging Face folder or `synthetic:SHAPE`."""
        kind, _, shape = name.partition(":")
        if kind == "synthetic":
            if shape not in SHAPES:
                raise SystemExit(f"{name}: valid shapes are {', '.join(SHAPES)}")
            return Model.build(Config.parse(SHAPES[shape]), synthetic(device), device, dtype)
        path = Path(name)
        return Model.build(Config.parse(json.loads((path / "config.json").read_text())), Folder(path), device, dtype)

    @staticmethod
    def build(c: Config, source: Callable[[str, int, int], Tensor], device: torch.device, dtype: torch.dtype) -> Model:
        def get(name: str, rows: int, cols: int) -> Tensor:
            return source(name + ".weight", rows, cols).to(device=device, dtype=dtype)

        def layer(i: int) -> Layer:
            at = f"model.layers.{i}."
            q = get(at + "self_attn.q_proj", c.heads * c.head_dim, c.hidden)
            k, v = (get(at + f"self_attn.{x}_proj", c.kv_heads * c.head_dim, c.hidden) for x in "kv")
            gate, up = (get(at + f"mlp.{x}_proj", c.intermediate, c.hidden) for x in ("gate", "up"))
            return Layer(
                norm=get(at + "input_layernorm", 1, c.hidden).flatten(),
                qkv=torch.cat([q, k, v]),
                out=get(at + "self_attn.o_proj", c.hidden, c.heads * c.head_dim),
                mlp_norm=get(at + "post_attention_layernorm", 1, c.hidden).flatten(),
                gate_up=torch.cat([gate, up]),
                down=get(at + "mlp.down_proj", c.hidden, c.intermediate),
            )

        embed = get("model.embed_tokens", c.vocab, c.hidden)
        head = embed if c.tied else get("lm_head", c.vocab, c.hidden)
        norm = get("model.norm", 1, c.hidden).flatten()
        return Model(c, embed, [layer(i) for i in range(c.layers)], norm, head, dtype, device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, rows, heads, D] float32 with cos, sin [rows, 1, D/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def norm_qkv_rope(
    x: Tensor, norm: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, rows, hidden] to q [B, rows, H, D], k [B, rows, Hkv, D] (both float32) and v like k in the model's type."""
    head_dim = qkv.shape[0] // (heads + 2 * kv_heads)
    mixed = F.linear(F.rms_norm(x, norm.shape, norm, eps), qkv).unflatten(-1, (-1, head_dim))
    qk = rotate(mixed[:, :, : heads + kv_heads].float(), cos, sin)
    return qk[:, :, :heads], qk[:, :, heads:], mixed[:, :, heads + kv_heads :]


def out_mlp(
    x: Tensor, attention: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """The rest of a layer: x [B, rows, hidden], attention [B, rows, H D]."""
    x = x + F.linear(attention, out)
    gate, up = F.linear(F.rms_norm(x, norm.shape, norm, eps), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def logits(model: Model, x: Tensor) -> Tensor:
    """x [..., hidden] to [..., vocab]."""
    return F.linear(F.rms_norm(x, (model.config.hidden,), model.norm, model.config.eps), model.head)
