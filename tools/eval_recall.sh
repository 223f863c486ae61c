#!/usr/bin/env bash
# What the recall model loses by KV mode: needles, KL divergence, perplexity and coverage, with the pictures of docs/pictures.
# Prompts and text have fixed seeds. A few minutes on two cores; interrupted, it goes on where it was. Results: target/eval_recall.
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
if ! [ -s "$out/prompts.json" ]; then
    python3 -m venv "$out/venv"
    "$out/venv/bin/pip" install --quiet tokenizers
    "$out/venv/bin/python" tools/recall/prompts.py -o "$out/prompts.json"
fi
# A text of facts, questions with their answers, and filler.
PYTHONPATH=tools/recall python3 - >"$out/document.txt" <<'PYTHON'
import random
import language
print(language.document(random.Random(20250), 4000, 0.15, 0.35))
PYTHON

"${engine[@]}" needle "${model[@]}" --prompts "$out/prompts.json" --kv full,kivi,specache --kv-bits 1,2 --kv-top-k 16,64 \
    --output "$out/needle.jsonl" --plot "$pictures/recall_needle.svg" | tee "$out/needle.txt"
text=("${model[@]}" -f "$out/document.txt" -c 2048 --windows 8)
"${engine[@]}" ppl "${text[@]}" --kv full,kivi,fetch,specache --kv-bits 1,2 \
    --output "$out/ppl.jsonl" | tee "$out/ppl.txt"
"${engine[@]}" kld "${text[@]}" --kv kivi,fetch,specache --kv-bits 1,2 --kv-top-k 16,64 \
    --output "$out/kld.jsonl" --plot "$pictures/recall_kld.svg" | tee "$out/kld.txt"
"${engine[@]}" coverage "${text[@]}" --kv fetch,specache --kv-bits 1 --kv-top-k 64 \
    --output "$out/coverage.jsonl" --plot "$pictures/recall_coverage.svg" | tee "$out/coverage.txt"
