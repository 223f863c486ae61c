#!/usr/bin/env python3
"""How fast PyTorch's scaled_dot_product_attention is for one layer of a prompt in Llama-3-8B's shape: a JSON object for each
number of tokens, with seconds by backend. What `specache_prefill_*` is to be compared with.

usage: sdpa_rate.py [TOKENS ...]      default 8192 32768
"""

import json
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, DIM = 32, 8, 128
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def seconds(backend, q, k, v, runs):
    """Of one call, mean of `runs` after three to warm up; None where the backend refuses the shape."""
    try:
        with sdpa_kernel(backend):
            for run in range(-3, runs):
                if run == 0:
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.cuda.synchronize()
            return (time.perf_counter() - begin) / runs
    except RuntimeError as error:
        print(f"{backend}: {error}", file=sys.stderr)
        return None


def main():
    for tokens in map(int, sys.argv[1:] or ["8192", "32768"]):
        make = lambda heads: torch.randn(1, heads, tokens, DIM, device="cuda", dtype=torch.bfloat16)
        q, k, v = make(HEADS), make(KV_HEADS), make(KV_HEADS)
        found = {name: seconds(backend, q, k, v, 10 if tokens <= 8192 else 3) for name, backend in BACKENDS.items()}
        flop = 2 * HEADS * DIM * tokens * tokens  # two products over half of the square
        print(json.dumps({
            "rival": "sdpa", "torch": torch.__version__, "tokens": tokens, "flop": flop,
            "seconds": {name: t for name, t in found.items() if t is not None},
        }))  # fmt: skip


if __name__ == "__main__":
    main()
