#!/usr/bin/env python3
"""Runs the recall model on a GPU and on the CPU: greedy tokens must be the same in every mode and with every way of
launching a step, and teacher-forced logits must be those of the golden case. A line for each check; exit status 1 if one
fails. Needs nothing but the standard library.

usage: tools/gpu_tokens.py ENGINE [--short]     --short: a prompt of 160 tokens (emulation)
"""

import argparse
import array
import json
import math
import os
import pathlib
import statistics
import subprocess
import tempfile

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures"
MODES = ["full", "kivi", "offload", "fetch", "specache"]
# Other ways to the same tokens, in `specache`.
WAYS = [
    ["--no-graph"],
    ["--pipeline", "serial"],
    ["--pipeline", "stream"],
    ["--linear", "cublas"],
    ["--no-delta"],
    ["--gather", "cpu"],
    ["--kv-bits", "1", "--kv-top-k", "16"],
]
# Options of the golden cases, and the most that their mean KL divergence may be: four times what the emulated GPU gives with
# 16-bit products. K and V that differ in their last bit have other codes here and there, so fewer bits allow more; forgetting
# to replace positions costs 3e-2 at 1 bit, 5e-4 at 2 bits.
CASES = {
    "full": (["--kv", "full"], 1e-5),
    "kivi-b1-g64-R64": (["--kv", "kivi", "--kv-bits", "1"], 8e-3),
    "kivi-b2-g32-R100": (["--kv", "kivi", "--kv-group", "32", "--kv-residual", "100"], 2e-4),
    "specache-b1-g64-R64-k16": (["--kv-bits", "1", "--kv-top-k", "16"], 8e-3),
    "specache-b2-g32-R100-k64": (["--kv-group", "32", "--kv-residual", "100"], 1e-4),
}
MEDIAN = 0.1  # of a row's largest difference


class Checks:
    def __init__(self, engine):
        self.engine, self.failed = engine, False

    def run(self, *args, **env):
        command = [self.engine, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **env})
        if done.returncode != 0:
            raise RuntimeError(f"exit {done.returncode}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        return done

    def check(self, name, body):
        try:
            wrong = body()
        except (RuntimeError, subprocess.TimeoutExpired, OSError, ValueError) as error:
            wrong = str(error)
        self.failed |= wrong is not None
        print(f"FAIL  {name}: {wrong}" if wrong else f"ok    {name}", flush=True)


def npy(path):
    """Rows of a NPY file of little-endian float32, version 1."""
    data = pathlib.Path(path).read_bytes()
    length = int.from_bytes(data[8:10], "little")
    shape = eval(data[10 : 10 + length], {"False": False, "True": True})["shape"]  # a dict literal, by the format
    numbers = array.array("f", data[10 + length :])
    return [numbers[r * shape[1] : (r + 1) * shape[1]] for r in range(shape[0])]


def softmax(row):
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    total = sum(powers)
    return [p / total for p in powers]


def distance(rows, golden):
    largest = [max(abs(a - b) for a, b in zip(row, want)) for row, want in zip(rows, golden)]
    kld = 0.0
    for row, want in zip(rows, golden):
        kld += sum(p * math.log(p / q) for p, q in zip(softmax(want), softmax(row)) if p > 0 and q > 0)
    return {"max": max(largest), "median": statistics.median(largest), "mean_kld": abs(kld) / len(rows)}


def tokens(checks, ids, folder):
    file = pathlib.Path(folder) / "ids.json"
    file.write_text(json.dumps(ids))
    fixed = ["generate", "-m", str(FIXTURES / "recall"), "--tokens", str(file), "-n", "6", "--temp", "0", "--json"]
    known = {}

    def generate(device, args, **env):
        done = checks.run(*fixed, "--device", device, *args, **env)
        return json.loads(done.stdout)["tokens"], done.stderr

    def same(args, **env):
        mode = [a for a in args if a.startswith("--kv") or not a.startswith("--")]
        key = tuple(args) if any(a.startswith("--kv") for a in args) else ()
        if key not in known:
            known[key] = generate("cpu", list(key))[0]
        got, stderr = generate("cuda", args, **env)
        if got != known[key]:
            return f"{got} on the GPU, {known[key]} on the CPU ({' '.join(mode)})"
        if env and " 0 conflicts" not in stderr:
            return "the order of its operations: " + stderr.strip().splitlines()[-1]
        return None

    for mode in MODES:
        checks.check(f"tokens of {mode}", lambda: same(["--kv", mode]))
    for way in WAYS:
        checks.check(f"tokens with {' '.join(way)}", lambda: same(way))
    for mode in MODES:
        checks.check(f"order of {mode}", lambda: same(["--kv", mode], SPECACHE_CHECK_ORDER="1"))


def golden(checks, name, options, most, folder):
    case, out = FIXTURES / "golden", str(pathlib.Path(folder) / "logits.npy")
    args = ["logits", "-m", str(FIXTURES / "recall"), "--tokens", str(case / "ids.json"), "--prefill", "300"]
    spec = case / f"{name}.spec.json"
    forced = ["--spec-tokens", str(spec)] if spec.exists() else []

    def compare():
        checks.run(*args, *options, *forced, "--device", "cuda", "--output", out)
        found = distance(npy(out), npy(case / f"{name}.logits.npy"))
        text = ", ".join(f"{what} {value:.2g}" for what, value in found.items())
        print(f"      {name}: {text}")
        # What is no number is not below a bound.
        good = found["mean_kld"] < most and found["median"] < MEDIAN
        return None if good else f"{text}; bounds: mean_kld {most}, median {MEDIAN}"

    checks.check(f"golden logits of {name}", compare)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    checks = Checks(args.engine)
    ids = json.loads((FIXTURES / "recall_prompts.json").read_text())[0]["ids"]
    with tempfile.TemporaryDirectory() as folder:
        tokens(checks, ids[:160] if args.short else ids, folder)
        cases = list(CASES.items())[-1:] if args.short else CASES.items()
        for name, (options, most) in cases:
            golden(checks, name, options, most, folder)
    raise SystemExit(checks.failed)


if __name__ == "__main__":
    main()
