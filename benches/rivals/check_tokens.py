#!/usr/bin/env python3
"""Greedy tokens of the rival against those of the engine, for the recall prompts.

    check_tokens.py target/release/specache-engine [-n 24] [--threads 1]

Both are float32 on the CPU with 16-bit K and V, but add in different orders, so a near tie may fall either way; from
there on the texts differ. Prints one JSON object; exit status 1 if any prompt's tokens differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cache import Options
from check import greedy
from llama import Model

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
CASES = [
    dict(mode="full"),
    dict(mode="offload"),
    dict(mode="kivi", bits=1),
    dict(mode="kivi", bits=2),
    dict(mode="fetch", bits=1, top_k=16),
    dict(mode="specache", bits=1, top_k=16),
    dict(mode="specache", bits=2, top_k=64),
]


def engine_tokens(binary: Path, model: Path, ids: list[int], options: Options, n: int, threads: int) -> list[int]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(ids, file)
        file.flush()
        command = [binary, "generate", "-m", model, "--tokens", file.name, "-n", n, "--ignore-eos", "--temp", 0,
                   "--json", "--threads", threads, "--kv", options.mode, "--kv-bits", options.bits,
                   "--kv-group", options.group, "--kv-residual", options.residual,
                   "--kv-top-k", options.top_k]  # fmt: skip
        result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)["tokens"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, help="path of specache-engine")
    parser.add_argument("-m", "--model", type=Path, default=FIXTURES / "recall")
    parser.add_argument("--prompts", type=Path, default=FIXTURES / "recall_prompts.json", help="[{ids, answer}, ...]")
    parser.add_argument("-n", type=int, default=24, metavar="N", help="tokens for each prompt; default: %(default)s")
    parser.add_argument("-t", "--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = Model.load(str(args.model), torch.device("cpu"), torch.float32)
    prompts = json.loads(args.prompts.read_text())
    cases: list[dict[str, Any]] = []
    for changes in CASES:
        options = Options().with_(**changes)
        same, answers, first_differences = 0, 0, []
        for prompt in prompts:
            theirs = engine_tokens(args.engine, args.model, prompt["ids"], options, args.n, args.threads)
            ours = greedy(model, options, torch.tensor([prompt["ids"]]), args.n)[0].tolist()
            same += ours == theirs
            answers += ours[: len(prompt["answer"])] == prompt["answer"]
            if ours != theirs:
                first_differences.append(next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b))
        found = dict(prompts=len(prompts), same=same, first_differences=first_differences, answers=answers)
        cases.append(changes | found)
    equal = all(case["same"] == case["prompts"] for case in cases)
    print(json.dumps(dict(equal=equal, n=args.n, cases=cases), indent=1))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
