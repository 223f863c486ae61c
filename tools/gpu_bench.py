#!/usr/bin/env python3
"""Runs the engine's bench over a grid, the most telling cases first, until the time is over, and prints one table. A line
of JSON for each case goes to FILE as soon as it is measured; a case that fails or takes too long says so there.

usage: tools/gpu_bench.py ENGINE FILE [--seconds N] [--tiny]     --tiny: shapes for an emulated GPU
       tools/gpu_bench.py --table FILE                           the table of an earlier run
       tools/gpu_bench.py --rivals FILE                          the same of what torch_specache.py printed
"""

import argparse
import json
import subprocess
import time

LLAMA, MISTRAL = "synthetic:llama-3.1-8b", "synthetic:mistral-7b-v0.2"
# Model, tokens in the cache (or, with PROMPT, of a prompt that is prefilled), sequences, modes, other options. 16-bit pairs lie
# on the host once for each of offload, fetch and specache: Llama-3-8B's are 16 GiB for 128k tokens, and making random ones takes
# a second for each (16 CPUs).
PROMPT = ["-n", "0"]
GRID = [
    (LLAMA, 8192, 1, "full,kivi,specache", []),
    (LLAMA, 32768, 1, "full,kivi,specache", []),
    (LLAMA, 8192, 8, "full,kivi,specache", []),
    (LLAMA, 8192, 24, "full,kivi,specache", []),
    (LLAMA, 8192, 1, "specache", ["--gather", "cpu"]),
    (LLAMA, 8192, 24, "specache", ["--gather", "cpu"]),
    (LLAMA, 131072, 1, "full,specache", []),
    (LLAMA, 131072, 4, "full,specache", []),
    (MISTRAL, 32768, 1, "full,kivi,specache", []),
    (LLAMA, 32768, 1, "specache", ["--kv-bits", "1"]),
    (LLAMA, 32768, 1, "offload,fetch", []),
    (LLAMA, 8192, 1, "full,specache", ["--linear", "cublas"]),
    (LLAMA, 8192, 8, "full,specache", ["--linear", "fused"]),
    (LLAMA, 32768, 8, "full,specache", []),
    # The largest batches of `plan --vram 48GiB --host 1TiB -c 32896`, as on a card of 48 GiB. Forks, as the 16-bit pairs of 47
    # sequences are 188 GiB.
    (LLAMA, 32768, 8, "full", ["--vram-budget", "48GiB", "--forks"]),
    (LLAMA, 32768, 47, "specache", ["--vram-budget", "48GiB", "--forks"]),
    (LLAMA, 32768, 49, "kivi", ["--vram-budget", "48GiB", "--forks"]),
    (LLAMA, 32768, 74, "specache", ["--vram-budget", "48GiB", "--forks", "--kv-bits", "1"]),
    (LLAMA, 8192, 1, "full,specache", PROMPT),
    (LLAMA, 32768, 1, "full,specache", PROMPT),
    (LLAMA, 32768, 1, "full,specache", ["--no-graph"]),
    (MISTRAL, 32768, 8, "full,specache", []),
    (MISTRAL, 8192, 1, "full,specache", []),
]
TINY = [
    ("synthetic:tiny", 200, 1, "full,specache", []),
    ("synthetic:tiny", 200, 2, "specache", ["--linear", "cublas"]),
    ("synthetic:tiny", 200, 2, "specache", ["--gather", "cpu"]),
    ("synthetic:tiny", 200, 3, "full,specache", ["--vram-budget", "64MiB", "--forks"]),
    ("synthetic:tiny", 200, 1, "full,specache", PROMPT),
]
COLUMNS = ["model", "tokens", "batch", "mode", "options", "tok/s", "vs full", "GB/s", "of read", "exposed us", "device"]


def measure(engine, case, steps, limit):
    model, depth, batch, modes, options = case
    args = ["bench", "-m", model, "-b", str(batch), "--kv", modes, "-r", "2"]
    args += ["-p", str(depth)] if options == PROMPT else ["-d", str(depth), "-n", str(steps)]
    line = {"model": model, "depth": depth, "batch": batch, "kv": modes, "options": options}
    begin = time.monotonic()
    try:
        command = [engine, *args, "--device", "cuda", "-o", "json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        if done.returncode == 0:
            line["bench"] = json.loads(done.stdout)
        else:
            line["failed"] = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
    except subprocess.TimeoutExpired:
        line["failed"] = f"not done after {limit:.0f} s"
    except ValueError as error:
        line["failed"] = f"its JSON cannot be read: {error}"
    line["seconds"] = round(time.monotonic() - begin, 1)
    return line


def rows(line):
    fixed = [line["model"].split(":")[-1], line["depth"], line["batch"]]
    options = " ".join(line["options"])
    if "bench" not in line:
        return [[*fixed, line["kv"], options, line["failed"]]]
    read = line["bench"]["hardware"]["read_gb_s"]
    out = []
    for prompt in line["bench"].get("prompts", []):
        for mode in prompt["modes"]:
            speed, ratio = f"{mode['prefill_tok_s']['mean']:.1f}", mode["ratio_to_full"]
            fixed_ = [*fixed, mode["mode"], "prefill", speed, "-" if ratio is None else f"{ratio:.2f}"]
            out.append([*fixed_, "-", "-", "-", "-"])
    for mode in (mode for model in line["bench"]["models"] for mode in model["modes"]):
        number = lambda value, text: "-" if value is None else text.format(value)
        share = number(read, f"{100 * mode['read_gb_s'] / (read or 1):.0f} %")
        exposed, ratio = mode["exposed_us_per_step"], mode["ratio_to_full"]
        speed = f"{mode['decode_tok_s']['mean']:.1f}"
        device = f"{mode['device_bytes'] / 2**30:.2f} GiB"
        out.append([*fixed, mode["mode"], options, speed, number(ratio, "{:.2f}"), f"{mode['read_gb_s']:.0f}", share,
                    number(exposed, "{:.1f}"), device])  # fmt: skip
    return out


def table(lines):
    cells = [COLUMNS] + [[str(cell) for cell in row] for line in lines for row in rows(line)]
    widths = [max(len(row[i]) for row in cells if len(row) == len(COLUMNS)) for i in range(len(COLUMNS))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def rivals(text):
    """One object after the other."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text.rstrip()):
        found, at = decoder.raw_decode(text, at + len(text[at:]) - len(text[at:].lstrip()))
        if found.get("rival") == "sdpa":
            rate = ", ".join(f"{name} {1e3 * t:.2f} ms, {found['flop'] / t * 1e-12:.0f} TFLOP/s" for name, t in found["seconds"].items())
            print(f"PyTorch {found['torch']}, causal attention of {found['tokens']} tokens: {rate}")
            continue
        asked = found["options"]
        if found.get("rival") == "transformers":
            environment, prefill = found["environment"], found["prefill_tok_s"]
            print(
                f"transformers {environment['transformers']}, {asked['model']}, {asked['depth']} tokens, batch {asked['batch']}, "
                f"{asked['mode']}: {found['tok_s_mean']:.1f} tok/s, {found['ms_per_step']:.2f} ms a step"
                + (f", prefill {prefill:.0f} tok/s" if prefill else "")
            )
            continue
        print(
            f"PyTorch {found['environment']['torch']}, {asked['model'].split(':')[-1]}, {asked['depth']} tokens, batch "
            f"{asked['batch']}, {asked['mode']}: {found['tok_s_mean']:.1f} tok/s, {found['ms_per_step']:.2f} ms a step, "
            f"{1e3 * found['exposed_ms_per_step']:.1f} us exposed"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?")
    parser.add_argument("file", nargs="?")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--table", metavar="FILE")
    parser.add_argument("--rivals", metavar="FILE")
    args = parser.parse_args()
    if args.table:
        with open(args.table) as file:
            return table([json.loads(line) for line in file if line.strip()])
    if args.rivals:
        with open(args.rivals) as file:
            return rivals(file.read())
    if not args.file:
        parser.error("ENGINE and FILE are needed")
    end, lines = time.monotonic() + args.seconds, []
    with open(args.file, "w") as file:
        for case in TINY if args.tiny else GRID:
            left = end - time.monotonic()
            if left < 20:
                print(f"no time for {case}")
                continue
            lines.append(measure(args.engine, case, 2 if args.tiny else 16, min(left, 150)))
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
    table(lines)
    raise SystemExit(not any("bench" in line for line in lines))


if __name__ == "__main__":
    main()
