#!/usr/bin/env python3
"""Compare logits of the engine with those of Hugging Face transformers.

    specache-engine logits -m MODEL ... (writes NPY)
    python tools/hf_compare.py MODEL --ids ids.json --prefill P logits.npy

The engine is teacher forced: of `ids`, the first P are the prompt, and its NPY has len(ids) - P rows, the first of
which comes from the prompt's last position; the last id is never fed. transformers computes the same rows on the CPU in
float32 with eager attention, in one pass over all ids. Printed are the largest difference of a logit and the mean
Kullback-Leibler divergence of the engine from transformers, in nats per row.

The engine keeps K and V in 16 bits, which alone can move a logit by some hundredths. `--kv16` makes transformers round
them in the same way, so that what is left is the order of the sums.

Needs torch, transformers and numpy. Exit status 1 if `--max-difference` or `--max-kld` is given and exceeded, 2 if the
inputs do not fit together.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from hf_models import EAGER, kv16_attention, load_model, logits_of
from transformers import PreTrainedModel


class InputError(Exception):
    """The inputs do not fit together."""


def read_ids(path: Path, vocab_size: int) -> list[int]:
    """Token ids from a bare JSON array."""
    ids = json.loads(path.read_text())
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise InputError(f"{path}: not an array of token ids below {vocab_size}")
    return ids


def reference_logits(model: PreTrainedModel, ids: list[int], prefill: int) -> torch.Tensor:
    """The rows that the engine writes, [len(ids) - prefill, vocab]."""
    return logits_of(model, ids[:-1])[prefill - 1 :]


def kl_divergence(reference: torch.Tensor, engine: torch.Tensor) -> torch.Tensor:
    """Per row, the divergence of `engine` from `reference`, in float64."""
    reference_log, engine_log = (logits.double().log_softmax(-1) for logits in (reference, engine))
    return (reference_log.exp() * (reference_log - engine_log)).sum(-1)


def compare(options: argparse.Namespace) -> bool:
    """Print the comparison; true if it is within the given limits."""
    if not (options.model / "config.json").is_file():
        raise InputError(f"{options.model}: no config.json")
    model = load_model(options.model, kv16_attention(options.model) if options.kv16 else EAGER)
    vocab_size = model.config.vocab_size
    ids = read_ids(options.ids, vocab_size)
    if not 1 <= options.prefill < len(ids):
        raise InputError(f"--prefill must be from 1 to {len(ids) - 1} for {len(ids)} ids")

    engine = torch.from_numpy(np.load(options.logits, allow_pickle=False).astype(np.float32))
    expected = (len(ids) - options.prefill, vocab_size)
    if tuple(engine.shape) != expected:
        raise InputError(f"{options.logits}: shape {tuple(engine.shape)}, expected {expected}")
    if not engine.isfinite().all():
        row = (~engine.isfinite()).any(-1).nonzero()[0].item()
        raise InputError(f"{options.logits}: not finite in row {row}")

    reference = reference_logits(model, ids, options.prefill)
    difference = (engine - reference).abs()
    row, token = divmod(difference.argmax().item(), vocab_size)
    kld = kl_divergence(reference, engine)
    same_argmax = (engine.argmax(-1) == reference.argmax(-1)).double().mean().item()
    print(f"rows              {expected[0]}")
    print(f"max |difference|  {difference.max().item():.3e}  (row {row}, token {token})")
    print(f"mean |difference| {difference.mean().item():.3e}")
    print(f"mean KLD          {kld.mean().item():.3e}  (largest {kld.max().item():.3e}, row {kld.argmax().item()})")
    print(f"same argmax       {100 * same_argmax:.1f} %")
    return difference.max().item() <= options.max_difference and kld.mean().item() <= options.max_kld


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("logits", type=Path, help="NPY from `specache-engine logits`")
    parser.add_argument("--ids", type=Path, required=True, help="JSON array of token ids")
    parser.add_argument("--prefill", type=int, required=True, metavar="P", help="how many of them are the prompt")
    parser.add_argument("--kv16", action="store_true", help="round K and V to 16 bits as the engine does")
    parser.add_argument("--max-difference", type=float, default=float("inf"), metavar="X", help="fail above this")
    parser.add_argument("--max-kld", type=float, default=float("inf"), metavar="X", help="fail above this mean KLD")
    parser.add_argument("-t", "--threads", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        return 0 if compare(options) else 1
    except (InputError, OSError, ValueError) as error:
        print(f"hf_compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
