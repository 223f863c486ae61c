#!/usr/bin/env bash
# What the recall model loses by KV mode: needles, KL divergence, perplexity and coverage, with the pictures of docs/pictures.
# Prompts and text have fixed seeds. About a quarter of an hour on two cores; interrupted, it goes on where it was. Results are
# in target/eval_recall.
#
#   tools/eval_recall.sh            also draws docs/pictures/recall_*.svg
#   tools/eval_recall.sh FOLDER     draws into FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
pictures=${1:-docs/pictures}
out=target/eval_recall
mkdir -p "$out" "$pictures"

cargo build --release --bin specache-engine
engine=(target/release/specache-engine eval)
model=(-m tests/fixtures/recall --device cpu)

# The 192 prompts of docs/measurements/2026-11-23-recall.md. Making them takes the Python package tokenizers.
if ! [ -x "$out/venv/bin/python" ] || ! "$out/venv/bin/python" -c "import tokenizers" 2>/dev/null; then
    python3 -m venv "$out/venv"
    "$out/venv/bin/pip" install --quiet tokenizers
fi
if ! [ -s "$out/prompts.json" ]; then
    "$out/venv/bin/python" tools/recall/prompts.py -o "$out/prompts.json"
fi
# A text of facts, questions with their answers, and filler.
PYTHONPATH=tools/recall python3 - >"$out/document.txt" <<'PYTHON'
import random
import language
print(language.document(random.Random(20250), 4000, 0.15, 0.35))
PYTHON

# The model's own words: what `full` says greedily behind four pieces of that text, each piece before what it said.
if ! [ -s "$out/own.json" ]; then
    "$out/venv/bin/python" - "$out" <<'PYTHON'
import json
import subprocess
import sys

from tokenizers import Tokenizer

out = sys.argv[1]
tokenizer = Tokenizer.from_file("tests/fixtures/recall/tokenizer.json")
with open(f"{out}/document.txt") as file:
    ids = tokenizer.encode(file.read()).ids
generate = "target/release/specache-engine generate -m tests/fixtures/recall --device cpu --kv full --temp 0 --ignore-eos"
windows = []
for piece in range(4):
    prompt = ids[1024 * piece : 1024 * (piece + 1)]
    with open(f"{out}/piece.json", "w") as file:
        json.dump(prompt, file)
    command = generate.split() + ["-n", "512", "--json", "--tokens", f"{out}/piece.json"]
    windows += prompt + json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["tokens"]
with open(f"{out}/own.json", "w") as file:
    json.dump(windows, file)
PYTHON
fi

"${engine[@]}" needle "${model[@]}" --prompts "$out/prompts.json" --kv full,kivi,specache --kv-bits 1,2 --kv-top-k 16,64 \
    --output "$out/needle.jsonl" --plot "$pictures/recall_needle.svg" | tee "$out/needle.txt"
text=("${model[@]}" -f "$out/document.txt" -c 2048 --windows 8)
"${engine[@]}" ppl "${text[@]}" --kv full,kivi,fetch,specache --kv-bits 1,2 \
    --output "$out/ppl.jsonl" | tee "$out/ppl.txt"
"${engine[@]}" kld "${text[@]}" --kv kivi,fetch,specache --kv-bits 1,2 --kv-top-k 16,64 \
    --output "$out/kld.jsonl" --plot "$pictures/recall_kld.svg" | tee "$out/kld.txt"
"${engine[@]}" coverage "${text[@]}" --kv fetch,specache --kv-bits 1 --kv-top-k 64 \
    --output "$out/coverage.jsonl" --plot "$pictures/recall_coverage.svg" | tee "$out/coverage.txt"
own=("${model[@]}" --tokens "$out/own.json" -c 1536 --prefill 1024)
"${engine[@]}" kld "${own[@]}" --kv kivi,fetch,specache --kv-bits 1,2 --kv-top-k 16,64 \
    --output "$out/kld_own.jsonl" --plot "$pictures/recall_kld_own.svg" | tee "$out/kld_own.txt"
"${engine[@]}" coverage "${own[@]}" --kv fetch,specache --kv-bits 1 --kv-top-k 64 \
    --output "$out/coverage_own.jsonl" --plot "$pictures/recall_coverage_own.svg" | tee "$out/coverage_own.txt"
