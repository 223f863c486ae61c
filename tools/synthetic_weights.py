#!/usr/bin/env python3
"""Reproduces a tensor of the `synthetic:` models in numpy, as src/model/synthetic.rs describes it.

    tools/synthetic_weights.py NAME ROWS COLS [COUNT]

prints the first and the last COUNT (default 4) numbers of the row-major matrix NAME, as bf16 bits and as values, e.g.

    tools/synthetic_weights.py model.layers.0.self_attn.q_proj.weight 256 128
"""

import sys

import numpy as np


def fnv1a64(name):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return h


def tensor(name, rows, cols):
    """The bf16 bits of a matrix, uint16 [rows, cols]; widen with `as_f32`."""
    amplitude = 1.0 if name == "model.embed_tokens.weight" else np.sqrt(3.0 / cols)
    i = np.arange((rows * cols + 3) // 4, dtype=np.uint64)
    z = np.uint64(fnv1a64(name)) + (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    words = z.astype("<u8").view("<i2")[: rows * cols]
    bits = (words.astype(np.float32) * (np.float32(amplitude) / np.float32(32768))).view(np.uint32)
    bf16 = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return bf16.astype(np.uint16).reshape(rows, cols)


def as_f32(bf16):
    return (bf16.astype(np.uint32) << np.uint32(16)).view(np.float32)


def main():
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    bits = tensor(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).ravel()
    count = int(sys.argv[4]) if len(sys.argv) == 5 else 4
    for label, part in (("first", bits[:count]), ("last", bits[-count:])):
        print(label, [f"{b:#06x}" for b in part], as_f32(part).tolist())


if __name__ == "__main__":
    main()
