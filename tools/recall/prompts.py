#!/usr/bin/env python3
"""Make the prompts with which recall is measured.

Each asks for one fact of three words among eight others in filler (`language.needle_prompt`); prompt i of n has its
fact at depth (i + 0.5) / n. The number of filler sentences is the same for all prompts of a length, chosen so that the
prompts have about that many tokens. The seeds are fixed, so that nobody can choose prompts after a measurement:

    the prompts of a length   20250 + length
    choosing the number of sentences   0

The output is a JSON list of {"length", "index", "ids", "answer"}: `ids` are the prompt's tokens, `answer` those that a
model that recalls continues with.

    python prompts.py -o prompts.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import language
from tokenizers import Tokenizer

LENGTHS = (500, 1000, 2000)
PROMPTS_PER_LENGTH = 64
SEED_BASE = 20250
CALIBRATION_SEED = 0
CALIBRATION_PROMPTS = 64

TOKENIZER = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "recall" / "tokenizer.json"


def mean_tokens(tokenizer: Tokenizer, n_sentences: int) -> float:
    """Mean length of prompts with so many filler sentences, over prompts that are not measured."""
    rng = random.Random(CALIBRATION_SEED)
    prompts = [
        language.needle_prompt(rng, n_sentences, (index + 0.5) / CALIBRATION_PROMPTS)[0]
        for index in range(CALIBRATION_PROMPTS)
    ]
    return sum(len(encoded.ids) for encoded in tokenizer.encode_batch(prompts)) / CALIBRATION_PROMPTS


def sentences_for(tokenizer: Tokenizer, length: int) -> int:
    """The number of filler sentences that gives about `length` tokens."""
    few, many = 10, 20
    tokens_few = mean_tokens(tokenizer, few)
    per_sentence = (mean_tokens(tokenizer, many) - tokens_few) / (many - few)
    guess = max(1, few + round((length - tokens_few) / per_sentence))
    candidates = range(max(1, guess - 4), guess + 5)
    return min(candidates, key=lambda n_sentences: abs(mean_tokens(tokenizer, n_sentences) - length))


def make_prompts(tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` prompts of about `length` tokens."""
    rng = random.Random(seed)
    n_sentences = sentences_for(tokenizer, length)
    prompts = []
    for index in range(count):
        prompt, answer = language.needle_prompt(rng, n_sentences, (index + 0.5) / count, n_distractors=8)
        ids, answer_ids = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids
        prompts.append({"length": length, "index": index, "ids": ids, "answer": answer_ids})
    sizes = [len(prompt["ids"]) for prompt in prompts]
    print(
        f"length {length}: seed {seed}, {n_sentences} filler sentences, {count} prompts of "
        f"{min(sizes)} to {max(sizes)} tokens, mean {sum(sizes) / count:.0f}"
    )
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS", help="default: 500 1000 2000"
    )
    parser.add_argument(
        "--count", type=int, default=PROMPTS_PER_LENGTH, help="prompts of each length (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="instead of 20250 + length: another set, not the measured one")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="default: that of tests/fixtures/recall")
    options = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    prompts = []
    for length in options.lengths:
        seed = SEED_BASE + length if options.seed is None else options.seed
        prompts += make_prompts(tokenizer, length, options.count, seed)
    lines = ",\n".join(json.dumps(prompt, separators=(",", ":")) for prompt in prompts)
    options.out.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
