#!/usr/bin/env python3
"""Decoding with Hugging Face transformers as it comes: LlamaForCausalLM, SDPA, and its own caches. What people run today.

    python hf_cache.py --mode full -d 32768 -b 1 -n 16 --device cuda         DynamicCache: everything on the GPU
    python hf_cache.py --mode offload -d 32768 -b 1 -n 8 --device cuda       the offloaded cache: layers come from host memory

Random weights of the engine's synthetic shapes, bf16, and a cache of random pairs (speed does not depend on the values), unless
--prefill computes it, in pieces of --chunk tokens, which is timed as well. Greedy tokens, no synchronisation within a repetition.
Needs torch and transformers (5.x). Prints one JSON object.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

# As src/model/synthetic.rs: layers, hidden, heads, KV heads, head_dim, inner, vocabulary.
SHAPES = {
    "tiny": (2, 128, 4, 2, 64, 256, 512),
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256),
    "mistral-7b-v0.2": (32, 4096, 32, 8, 128, 14336, 32000),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--model", choices=SHAPES, default="llama-3.1-8b")
    add("--mode", choices=("full", "offload"), default="full")
    add("-d", "--depth", type=int, default=32768, help="tokens in the cache (default: %(default)s)")
    add("-b", "--batch", type=int, default=1)
    add("-n", type=int, default=16, help="steps of a repetition (default: %(default)s)")
    add("-r", type=int, default=2, help="repetitions (default: %(default)s)")
    add("--prefill", action="store_true", help="compute the cache, and time it")
    add("--chunk", type=int, default=4096, help="tokens of a piece of the prompt (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    if min(args.depth, args.batch, args.n, args.r, args.chunk) < 1:
        parser.error("numbers must be at least 1")
    if (args.mode, args.device) == ("offload", "cpu"):
        parser.error("--mode offload needs --device cuda: the cache makes a CUDA stream")
    return args


def build(args):
    layers, hidden, heads, kv_heads, head_dim, inner, vocab = SHAPES[args.model]
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, intermediate_size=inner, vocab_size=vocab, max_position_embeddings=1 << 18, attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def new_cache(args, model):
    if args.mode == "offload":
        return DynamicCache(config=model.config, offloading=True)
    return DynamicCache(config=model.config)


def synchronise(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def fill(args, model, cache):
    """Random pairs, as an attention layer would append them."""
    config = model.config
    shape = (args.batch, config.num_key_value_heads, args.depth, config.head_dim)
    for layer in range(config.num_hidden_layers):
        pair = [torch.randn(shape, dtype=torch.bfloat16, device=args.device) for _ in range(2)]
        cache.update(*pair, layer)


def prefill(args, model, cache, ids):
    """Seconds that the prompt took."""
    synchronise(args)
    begin = time.perf_counter()
    for first in range(0, args.depth, args.chunk):
        model(input_ids=ids[:, first : first + args.chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronise(args)
    return time.perf_counter() - begin


def decode(args, model, cache, token):
    """Seconds of a repetition, and the next token."""
    synchronise(args)
    begin = time.perf_counter()
    for _ in range(args.n):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
    synchronise(args)
    return time.perf_counter() - begin, token


@torch.inference_mode()
def main():
    args = arguments()
    torch.manual_seed(0)
    model = build(args)
    cache = new_cache(args, model)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.depth), device=args.device)
    seconds = None
    if args.prefill:
        prefill_args = argparse.Namespace(**{**vars(args), "depth": min(args.depth, args.chunk)})
        prefill(prefill_args, model, new_cache(args, model), ids)  # warm-up
        seconds = prefill(args, model, cache, ids)
    else:
        fill(args, model, cache)
    _, token = decode(args, model, cache, ids[:, -1:])  # warm-up
    times = []
    for _ in range(args.r):
        took, token = decode(args, model, cache, token)
        times.append(took)
    rates = [args.batch * args.n / took for took in times]
    json.dump(
        {
            "rival": "transformers",
            "options": vars(args),
            "environment": {"torch": torch.__version__, "transformers": transformers.__version__},
            "tok_s": rates,
            "tok_s_mean": statistics.mean(rates),
            "ms_per_step": 1e3 * statistics.mean(times) / args.n,
            "prefill_tok_s": args.batch * args.depth / seconds if seconds else None,
            "device_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        },
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
