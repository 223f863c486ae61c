#!/usr/bin/env python3
"""Make small random Hugging Face model folders with reference logits.

Each case is one feature of a Llama, Mistral or Qwen checkpoint. A case folder holds

    config.json          as transformers writes it, or rewritten to the older spelling
    model.safetensors    (or shards and an index) random weights in the case's dtype
    ids.json             a bare array of token ids
    logits.npy           float32 [len(ids), vocab]: transformers, CPU, float32, eager attention
    logits_kv16.npy      the same with K (after RoPE) and V rounded to 16 bits before attention reads them

The logits are computed in float32 from the weights as they are stored, so the dtype of the file is part of the input
and not of the tolerance. Everything is seeded: the same versions of torch and transformers give the same files.

The script checks its own output before it leaves it behind:

* the finished folder, with its final config.json, is loaded back and gives the same logits (but for
  tied_other_lm_head, see the README);
* every case is compared with controls (the same weights without the feature under test, or with it done wrong): their
  logits must differ by more than 0.1, so that the case catches an implementation that ignores the feature.

Run it from the repository root (it replaces the case folders and the README in the output folder):

    pip install torch transformers safetensors numpy
    HF_HUB_OFFLINE=1 python tools/hf_references.py

`--only CASE ...` makes some cases alone and leaves the README as it is.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from hf_models import EAGER, kv16_attention, load_model, logits_of
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

Json = dict[str, Any]
Weights = dict[str, torch.Tensor]

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "hf"
N_TOKENS = 40
MUST_DIFFER = 0.1
MUST_EQUAL = 1e-5
MAX_ROUNDING = MUST_DIFFER

BASE: Json = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
"""Shape of a case that does not say otherwise: 4 query and 2 KV heads of 16."""

WIDE_HEADS: Json = dict(num_attention_heads=2, num_key_value_heads=1)
"""Two query heads and one KV head of 32: sixteen RoPE frequencies."""

NARROW: Json = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
"""The smallest shape, for features of the file rather than of the arithmetic: 2 query heads and 1 KV head of 16."""

LINEAR: Json = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
DYNAMIC: Json = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
LLAMA3: Json = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=500000.0,
)
YARN: Json = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=10000.0)


def default_rope(theta: float = 10000.0) -> Json:
    """Unscaled RoPE."""
    return dict(rope_type="default", rope_theta=theta)


@dataclass(frozen=True)
class Control:
    """A wrong implementation, as changes of a case's config or weights."""

    name: str
    config: Json = field(default_factory=dict)
    weights: Callable[[Weights], Weights] | None = None


@dataclass(frozen=True)
class Case:
    """One model folder."""

    name: str
    about: str
    family: str = "llama"
    config: Json = field(default_factory=dict)
    controls: tuple[Control, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    rewrite: Callable[[Json], Json] | None = None
    shard_size: str | None = None
    ship_lm_head: str | None = None
    """`same` or `other`: add an `lm_head` to a tied model's file, a copy of the embedding or not."""
    seed_of: str | None = None
    """Take the weights and ids of this case instead of its own."""


# --- Rewriting config.json -------------------------------------------------------------------------------------------


def old_spelling(type_key: str = "rope_type", **changes: Any) -> Callable[[Json], Json]:
    """`rope_theta` and `rope_scaling` at the top, `torch_dtype` for `dtype`, no derived `head_dim`; then `changes`.

    A change to `...` removes the field.
    """

    def rewrite(config: Json) -> Json:
        config = dict(config)
        rope = dict(config.pop("rope_parameters"))
        config["rope_theta"] = rope.pop("rope_theta")
        rope_type = rope.pop("rope_type")
        config["rope_scaling"] = None if rope_type == "default" else {**rope, type_key: rope_type}
        config["torch_dtype"] = config.pop("dtype")
        if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
            del config["head_dim"]
        return change_fields(config, changes)

    return rewrite


def with_changes(**changes: Any) -> Callable[[Json], Json]:
    """Today's spelling with some fields changed; `...` removes the field."""
    return lambda config: change_fields(config, changes)


def change_fields(config: Json, changes: Json) -> Json:
    """`config` with the fields of `changes` set, or removed where the value is `...`."""
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


# --- Controls on weights ---------------------------------------------------------------------------------------------


def edit(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], Weights]:
    """Apply `change` to every tensor whose name ends in `suffix`; there must be one."""

    def apply(weights: Weights) -> Weights:
        assert any(name.endswith(suffix) for name in weights), suffix
        return {name: change(tensor) if name.endswith(suffix) else tensor for name, tensor in weights.items()}

    return apply


def chain(*edits: Callable[[Weights], Weights]) -> Callable[[Weights], Weights]:
    """Several edits, one after the other."""

    def apply(weights: Weights) -> Weights:
        for one in edits:
            weights = one(weights)
        return weights

    return apply


def zeroed(*suffixes: str) -> Callable[[Weights], Weights]:
    """The named tensors set to zero."""
    return chain(*(edit(suffix, torch.zeros_like) for suffix in suffixes))


def interleaved_rope(head_dim: int) -> Callable[[Weights], Weights]:
    """Reorder the rows of q and k so that the result is that of RoPE over pairs (2i, 2i + 1)."""

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        heads = weight.view(-1, head_dim // 2, 2, weight.shape[-1])
        return heads.transpose(1, 2).reshape(weight.shape)

    return chain(edit("q_proj.weight", reorder), edit("k_proj.weight", reorder))


def tiled_kv_heads(n_heads: int, n_kv_heads: int, head_dim: int) -> Callable[[Weights], Weights]:
    """Reorder the query heads so that the result is that of query head h reading KV head h mod n_kv_heads."""
    group = n_heads // n_kv_heads
    order = torch.tensor([group_index * n_kv_heads + kv for kv in range(n_kv_heads) for group_index in range(group)])

    def rows(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(n_heads, head_dim, -1)[order].reshape(weight.shape)

    def columns(weight: torch.Tensor) -> torch.Tensor:
        return rows(weight.T.contiguous()).T.contiguous()

    return chain(edit("q_proj.weight", rows), edit("o_proj.weight", columns))


# --- The cases -------------------------------------------------------------------------------------------------------

NO_SCALING = Control("RoPE unscaled", config=dict(rope_parameters=default_rope()))
NO_LLAMA3 = Control("RoPE unscaled", config=dict(rope_parameters=default_rope(500000.0)))
AS_LINEAR_8 = Control("as linear", config=dict(rope_parameters={**LINEAR, "factor": 8.0, "rope_theta": 500000.0}))
AS_LINEAR_4 = Control("as linear", config=dict(rope_parameters=LINEAR))
PLAIN_YARN = Control("YaRN without the extra fields", config=dict(rope_parameters=YARN))
NORMS_ONE = Control("norm weights 1", weights=edit("norm.weight", torch.ones_like))

CASES: tuple[Case, ...] = (
    Case(
        "llama_mha",
        "as many KV heads as query heads; config as transformers writes it",
        config=dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, rope_parameters=default_rope()),
        controls=(
            Control("RoPE over pairs", weights=interleaved_rope(16)),
            Control("another theta", config=dict(rope_parameters=default_rope(500000.0))),
            NORMS_ONE,
        ),
    ),
    Case(
        "llama_gqa",
        "4 query and 2 KV heads, theta 500,000; old spelling: `rope_theta`, `rope_scaling` null, `torch_dtype`, "
        "no `head_dim`",
        config=dict(rope_parameters=default_rope(500000.0)),
        rewrite=old_spelling(),
        controls=(
            Control("query head h reads KV head h mod 2", weights=tiled_kv_heads(4, 2, 16)),
            Control("theta 10,000", config=dict(rope_parameters=default_rope())),
        ),
    ),
    Case(
        "llama_head_dim",
        "explicit `head_dim` 32 where hidden / heads is 16",
        config=dict(**{**NARROW, "head_dim": 32}, rope_parameters=default_rope()),
        controls=(Control("RoPE over pairs", weights=interleaved_rope(32)),),
    ),
    Case(
        "llama_defaults",
        "config with no `num_key_value_heads`, `head_dim`, `rope_theta`, RoPE dictionary, `rms_norm_eps`, dtype, bias "
        "or tie fields",
        config=dict(
            hidden_size=32, num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-6,
            rope_parameters=default_rope(),
        ),
        rewrite=old_spelling(
            num_key_value_heads=..., rope_theta=..., rope_scaling=..., rms_norm_eps=..., torch_dtype=...,
            attention_bias=..., mlp_bias=..., tie_word_embeddings=...,
        ),
        controls=(Control("theta 500,000", config=dict(rope_parameters=default_rope(500000.0))),),
    ),
    Case(
        "rope_linear",
        "`rope_scaling` with `type` linear, factor 4",
        config=dict(**WIDE_HEADS, rope_parameters=LINEAR),
        rewrite=old_spelling("type"),
        controls=(NO_SCALING,),
    ),
    Case(
        "rope_dynamic",
        "`rope_scaling` with `type` dynamic, at most `max_position_embeddings` tokens: equal to unscaled",
        config=dict(**WIDE_HEADS, rope_parameters=DYNAMIC),
        rewrite=old_spelling("type"),
        controls=(
            AS_LINEAR_4,
            Control("stretched from the first token", config=dict(max_position_embeddings=N_TOKENS // 4)),
        ),
    ),
    Case(
        "rope_llama3",
        "`rope_scaling` with `rope_type` llama3, factor 8, original 32",
        config=dict(**WIDE_HEADS, rope_parameters=LLAMA3),
        rewrite=old_spelling(),
        controls=(NO_LLAMA3, AS_LINEAR_8),
    ),
    Case(
        "rope_llama3_new",
        "the same in `rope_parameters`, with its own weights; `eos_token_id` a list",
        config=dict(**WIDE_HEADS, rope_parameters=LLAMA3, eos_token_id=[2, 3]),
        controls=(NO_LLAMA3, AS_LINEAR_8),
    ),
    Case(
        "rope_yarn",
        "`rope_scaling` with `type` yarn, factor 4, original 32",
        config=dict(**WIDE_HEADS, rope_parameters=YARN),
        rewrite=old_spelling("type"),
        controls=(
            NO_SCALING,
            AS_LINEAR_4,
            Control("cos and sin not multiplied", config=dict(rope_parameters={**YARN, "attention_factor": 1.0})),
        ),
    ),
    Case(
        "rope_yarn_mscale",
        "YaRN with `mscale` 0.5 and `mscale_all_dim` 2, `rope_type`, old spelling",
        config=dict(**WIDE_HEADS, rope_parameters={**YARN, "mscale": 0.5, "mscale_all_dim": 2.0}),
        rewrite=old_spelling(),
        controls=(NO_SCALING, PLAIN_YARN),
    ),
    Case(
        "rope_yarn_attention_factor",
        "YaRN with `attention_factor` 0.75, `beta_fast` 4, `beta_slow` 0.5, `truncate` false in `rope_parameters`",
        config=dict(
            **WIDE_HEADS,
            rope_parameters={**YARN, "attention_factor": 0.75, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
        ),
        controls=(
            NO_SCALING,
            PLAIN_YARN,
            Control(
                "betas and truncate ignored", config=dict(rope_parameters={**YARN, "attention_factor": 0.75})
            ),
            Control(
                "truncate ignored",
                config=dict(rope_parameters={**YARN, "attention_factor": 0.75, "beta_fast": 4.0, "beta_slow": 0.5}),
            ),
        ),
    ),
    Case(
        "tied",
        "`tie_word_embeddings`, no `lm_head` in the file",
        config=dict(**NARROW, tie_word_embeddings=True, rope_parameters=default_rope()),
    ),
    Case(
        "tied_same_lm_head",
        "the model of `tied` with a copy of the embedding as `lm_head` in the file: the same logits",
        config=dict(**NARROW, tie_word_embeddings=True, rope_parameters=default_rope()),
        ship_lm_head="same",
        seed_of="tied",
    ),
    Case(
        "tied_other_lm_head",
        "the model of `tied` with another `lm_head` in the file, which is ignored: the same logits (see below)",
        config=dict(**NARROW, tie_word_embeddings=True, rope_parameters=default_rope()),
        ship_lm_head="other",
        seed_of="tied",
    ),
    Case(
        "attention_bias",
        "`attention_bias`: q, k, v and o biases",
        config=dict(**NARROW, attention_bias=True, rope_parameters=default_rope()),
        controls=(
            Control("no bias on q, k, v", weights=zeroed("q_proj.bias", "k_proj.bias", "v_proj.bias")),
            Control("no bias on o", weights=zeroed("o_proj.bias")),
        ),
    ),
    Case(
        "mlp_bias",
        "`mlp_bias`: gate, up and down biases",
        config=dict(**NARROW, mlp_bias=True, rope_parameters=default_rope()),
        controls=(
            Control("no bias on gate", weights=zeroed("gate_proj.bias")),
            Control("no bias on up", weights=zeroed("up_proj.bias")),
            Control("no bias on down", weights=zeroed("down_proj.bias")),
        ),
    ),
    Case(
        "mistral_window",
        "`sliding_window` 8 (position i sees j > i - 8), old spelling",
        family="mistral",
        config=dict(sliding_window=8, rope_parameters=default_rope()),
        rewrite=old_spelling(),
        controls=(
            Control("no window", config=dict(sliding_window=None)),
            Control("window 7", config=dict(sliding_window=7)),
            Control("window 9", config=dict(sliding_window=9)),
        ),
    ),
    Case(
        "mistral_nowindow",
        "`sliding_window` null",
        family="mistral",
        config=dict(sliding_window=None, rope_parameters=default_rope()),
        rewrite=old_spelling(),
        controls=(Control("window 8", config=dict(sliding_window=8)),),
    ),
    Case(
        "mistral_head_dim",
        "explicit `head_dim` 16 where hidden / heads is 32, no window, theta 1,000,000",
        family="mistral",
        config=dict(**WIDE_HEADS, head_dim=16, sliding_window=None, rope_parameters=default_rope(1000000.0)),
        rewrite=old_spelling(),
        controls=(Control("theta 10,000", config=dict(rope_parameters=default_rope())),),
    ),
    Case(
        "mistral_defaults",
        "config with neither `sliding_window` (4096) nor `num_key_value_heads` (8); 16 query heads, one layer",
        family="mistral",
        config=dict(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=8, head_dim=16,
            rope_parameters=default_rope(),
        ),
        rewrite=old_spelling(sliding_window=..., num_key_value_heads=...),
        controls=(Control("query head h reads KV head h mod 8", weights=tiled_kv_heads(16, 8, 16)),),
    ),
    Case(
        "qwen2",
        "biases on q, k and v without a field that says so; `sliding_window` 8 with `use_sliding_window` "
        "false is no window",
        family="qwen2",
        config=dict(rope_parameters=default_rope(1000000.0)),
        rewrite=old_spelling(sliding_window=8, layer_types=...),
        controls=(
            Control("no biases", weights=zeroed("q_proj.bias", "k_proj.bias", "v_proj.bias")),
            Control("window 8", config=dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)),
        ),
    ),
    Case(
        "qwen3",
        "RMS norm of every q and k head before RoPE",
        family="qwen3",
        config=dict(head_dim=32, rope_parameters=default_rope(1000000.0)),
        rewrite=old_spelling(layer_types=...),
        controls=(
            Control("q_norm weights 1", weights=edit("q_norm.weight", torch.ones_like)),
            Control("k_norm weights 1", weights=edit("k_norm.weight", torch.ones_like)),
        ),
    ),
    Case("weights_f16", "float16 weights", config=dict(**NARROW, rope_parameters=default_rope()), dtype=torch.float16),
    Case("weights_f32", "float32 weights", config=dict(**NARROW, rope_parameters=default_rope()), dtype=torch.float32),
    Case("weights_bf16", "bfloat16 weights", config=dict(**NARROW, rope_parameters=default_rope())),
    Case(
        "sharded",
        "several safetensors files and an index",
        config=dict(**NARROW, rope_parameters=default_rope()),
        shard_size="24KB",
    ),
)


# --- Making a case ---------------------------------------------------------------------------------------------------


def make_config(case: Case, overrides: Json | None = None) -> PretrainedConfig:
    """The transformers config of a case, in today's spelling."""
    fields = json.loads(json.dumps({**BASE, **case.config, **(overrides or {})}))
    return AutoConfig.for_model(case.family, **fields)


def make_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str = EAGER
) -> PreTrainedModel:
    """A model whose weights are still transformers' own."""
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def gain(name: str) -> float:
    """Standard deviation of a tensor's output, per unit of input."""
    if "q_proj" in name or "k_proj" in name:
        return 1.5  # attention scores of about 2: far from uniform, not one-hot
    if "lm_head" in name:
        return 2.0
    return 1.0


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator, tied: bool) -> torch.Tensor:
    """Random weights that make every part of the model matter."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1.0 + 0.25 * noise
    if name.endswith(".bias"):
        return 0.5 * noise
    if "embed_tokens" in name:
        return (0.35 if tied else 1.0) * noise
    return gain(name) * noise / shape[-1] ** 0.5


def random_weights(model: PreTrainedModel, generator: torch.Generator, tied: bool) -> Weights:
    """One random tensor for every parameter, in the order of their names."""
    names = sorted(name for name, _ in model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: random_tensor(name, shapes[name], generator, tied) for name in names}


def set_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Copy `weights`, which name every parameter, into the model."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def random_ids(vocab_size: int, generator: torch.Generator) -> list[int]:
    """BOS, then ordinary tokens."""
    return [1, *torch.randint(4, vocab_size, (N_TOKENS - 1,), generator=generator).tolist()]


@torch.no_grad()
def attention_peak(model: PreTrainedModel, ids: list[int]) -> float:
    """Mean over heads and the later half of the positions of the largest attention probability."""
    maps = model(torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
    return torch.stack([layer[0, :, len(ids) // 2 :].amax(-1).mean() for layer in maps]).mean().item()


def save_weights(case: Case, model: PreTrainedModel, folder: Path, generator: torch.Generator) -> None:
    """Write config.json and the weights."""
    model.save_pretrained(folder, **({"max_shard_size": case.shard_size} if case.shard_size else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.shard_size:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) >= 2, "the sharded case has one shard"
    if case.ship_lm_head:
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        assert "lm_head.weight" not in tensors
        embedding = tensors["model.embed_tokens.weight"]
        other = random_tensor("lm_head.weight", embedding.shape, generator, False).to(case.dtype)
        tensors["lm_head.weight"] = embedding.clone() if case.ship_lm_head == "same" else other
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def stored_tensors(folder: Path) -> Weights:
    """All tensors of a folder's safetensors files, as stored."""
    tensors: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(safetensors.torch.load_file(path))
    return tensors


def make_case(case: Case, out: Path) -> str:
    """Write one case, check it, and return its row of the README's table."""
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(zlib.crc32((case.seed_of or case.name).encode()))

    config = make_config(case)
    model = make_model(config, case.dtype)
    ids = random_ids(config.vocab_size, generator)
    set_weights(model, random_weights(model, generator, config.tie_word_embeddings))
    save_weights(case, model, folder, generator)

    stored = stored_tensors(folder)
    assert all(tensor.dtype == case.dtype for tensor in stored.values())
    weights = {name: tensor.float() for name, tensor in stored.items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    reference_model = make_model(make_config(case))
    set_weights(reference_model, weights)
    reference = logits_of(reference_model, ids)
    assert reference.isfinite().all()
    spread = (reference.amax(-1) - reference.amin(-1)).mean().item()
    peak = attention_peak(reference_model, ids)

    path = folder / "config.json"
    written = json.loads(path.read_text())
    written = case.rewrite(written) if case.rewrite else written
    path.write_text(json.dumps(written, indent=2) + "\n")
    (folder / "ids.json").write_text(json.dumps(ids) + "\n")
    np.save(folder / "logits.npy", reference.numpy().astype("<f4"))

    rounding_model = make_model(make_config(case), attention=kv16_attention(folder))
    set_weights(rounding_model, weights)
    rounded = logits_of(rounding_model, ids)
    np.save(folder / "logits_kv16.npy", rounded.numpy().astype("<f4"))
    rounding = (rounded - reference).abs().max().item()
    if not 0 < rounding < MAX_ROUNDING:
        raise SystemExit(f"{case.name}: rounding K and V changes a logit by {rounding:g}")

    back = (logits_of(load_model(folder), ids) - reference).abs().max().item()
    results = []
    if case.ship_lm_head == "other":  # transformers 5 uses this head, so the folder loads to other logits there
        if back <= MUST_DIFFER:
            raise SystemExit(f"{case.name}: the shipped lm_head differs by only {back:g}")
        results.append(f"the shipped `lm_head` used {back:.1f}")
    elif back > MUST_EQUAL:
        raise SystemExit(f"{case.name}: the folder loads to other logits (max |difference| {back:g})")
    for control in case.controls:
        wrong = make_model(make_config(case, control.config))
        set_weights(wrong, control.weights(weights) if control.weights else weights)
        differs = (logits_of(wrong, ids) - reference).abs().max().item()
        if differs <= MUST_DIFFER:
            raise SystemExit(f"{case.name}: control {control.name!r} differs by only {differs:g}")
        results.append(f"{control.name} {differs:.1f}")
    if case.name == "rope_dynamic":
        plain = make_model(make_config(case, dict(rope_parameters=default_rope())))
        set_weights(plain, weights)
        assert (logits_of(plain, ids) - reference).abs().max().item() <= MUST_EQUAL

    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{case.name:28} {size:7} bytes  logit range {spread:4.1f}  attention peak {peak:.2f}  "
        f"rounding {rounding:.3f}  read back {back:.1e}  {'; '.join(results)}"
    )
    return f"| `{case.name}` | {case.about} | {rounding:.3f} | {'; '.join(results)} |"


README = """# Reference logits from Hugging Face transformers

Small random models, one feature each, with logits computed by transformers. Made by `tools/hf_references.py`, which \
says how to run it. The committed files were made with transformers {transformers}, torch {torch}, safetensors \
{safetensors}, Python {python}, on the CPU in float32 with eager attention.

Each folder: `config.json`; `model.safetensors`, or shards and an index; `ids.json`, {n_tokens} token ids; \
`logits.npy`, float32 `[{n_tokens}, vocab]`, one row for every position. The logits are computed in float32 from the \
weights as they are stored, so the dtype of the file is part of the input and not of the tolerance.

`logits_kv16.npy` is the same with K (after RoPE) and V rounded to 16 bits before attention reads them, as in the \
engine's 16-bit cache: to float16 where the config's dtype is float16, else to bfloat16. Compare the engine with it \
when the tolerance should be tight; the column "rounding" is its largest difference from `logits.npy`.

The last column lists what a wrong implementation would do and by how much its largest logit would be off; the \
script refuses a case where that is not above {must_differ}. A row's largest and smallest logit are about 10 apart.

| case | what it has | rounding | wrong implementations, max \\|difference\\| |
|---|---|---|---|
{rows}

Two ways of writing the same thing occur. Configs written by transformers 5 have `rope_parameters` (with \
`rope_theta` inside) and `dtype`; the older ones, which most published models still have, `rope_theta`, \
`rope_scaling` (with `rope_type` or `type`) and `torch_dtype`. The script rewrites some of the configs to the older \
way and checks that transformers loads them to the same logits.

`tied_other_lm_head` has `tie_word_embeddings` true and an `lm_head` in the file that is not the embedding. Its \
reference ties, as the config says. transformers {transformers} does not: where both tensors are in the file and \
differ, it warns and uses the shipped head (a copy of the embedding, as in `tied_same_lm_head`, is tied). So this is \
the one folder that does not load to its reference there, and that difference is the one in its last column.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the Hugging Face reference models and logits.")
    parser.add_argument("-o", "--out", type=Path, default=DEFAULT_OUT, help="output folder (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="make these cases alone; the README stays")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    cases = [case for case in CASES if not options.only or case.name in options.only]
    rows = [make_case(case, options.out) for case in cases]
    if options.only:
        return
    (options.out / "README.md").write_text(
        README.format(
            transformers=transformers.__version__,
            torch=torch.__version__.split("+")[0],
            safetensors=safetensors.__version__,
            python=platform.python_version(),
            n_tokens=N_TOKENS,
            must_differ=MUST_DIFFER,
            rows="\n".join(rows),
        )
    )


if __name__ == "__main__":
    main()
