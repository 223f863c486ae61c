#!/usr/bin/env python3
"""Train the byte-level BPE tokenizer of the recall model on its made-up language."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import language
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers


def train_tokenizer(n_documents: int = 1500, vocab_size: int = 1536, seed: int = 0) -> Tokenizer:
    """A byte-level BPE tokenizer: `<s>` is 0, `</s>` is 1, digits stand alone."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((language.document(rng, 200, 0.2, 0.2) for _ in range(n_documents)), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("tokenizer.json"), help="default: %(default)s")
    parser.add_argument("--documents", type=int, default=1500, help="texts to learn from (default: %(default)s)")
    options = parser.parse_args()

    tokenizer = train_tokenizer(options.documents)
    tokenizer.save(str(options.out))
    prompt, answer = language.needle_prompt(random.Random(0), 20, 0.5)
    text = prompt + answer
    encoded = tokenizer.encode(text)
    print(f"{options.out}: {tokenizer.get_vocab_size()} tokens; {len(text)} characters become {len(encoded.ids)}")
    print(encoded.tokens[:40])


if __name__ == "__main__":
    main()
