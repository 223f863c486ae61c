#!/usr/bin/env python3
"""Train the recall model, in two phases.

Phase 1 forms the copying circuit: its first stage is mostly repeated random words, the later ones documents with
filler. Phase 2, from the checkpoint of phase 1, adds haystacks: few facts in much filler, asked for at the end.

    python train.py --phase 1 --out phase1
    python train.py --phase 2 --init phase1/checkpoint.pt --out phase2

A stage is [tokens, batch, steps, learning rate]; `--stages` takes a JSON list of them. The output folder gets
`checkpoint.pt`, written at every evaluation and at the end, and `checkpoint-TOKENS.pt` after each stage.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import language
import torch
import torch.nn.functional as F
from model import SHAPE, Llama
from tokenizers import Tokenizer
from torch import Tensor, nn

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Stage:
    """A run of steps at one length."""

    tokens: int
    batch: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Phase:
    """What the two phases do differently, apart from their texts."""

    stages: tuple[Stage, ...]
    evaluate_every: int
    evaluate_sentences: tuple[int, ...]


PHASES = {
    1: Phase(
        stages=(
            Stage(256, 16, 2000, 2e-3),
            Stage(256, 16, 1500, 2e-3),
            Stage(512, 8, 600, 1.5e-3),
            Stage(1024, 4, 500, 1e-3),
        ),
        evaluate_every=250,
        evaluate_sentences=(10, 40),
    ),
    2: Phase(
        stages=(
            Stage(512, 8, 600, 1.5e-3),
            Stage(1024, 4, 500, 1e-3),
            Stage(2048, 2, 500, 7e-4),
            Stage(4096, 1, 400, 5e-4),
        ),
        evaluate_every=200,
        evaluate_sentences=(10, 40, 80),
    ),
}


# --- Texts -----------------------------------------------------------------------------------------------------------


class Texts:
    """Batches of training text for one phase."""

    def __init__(self, encode: Encode, phase: int, seed: int) -> None:
        self.encode = encode
        self.phase = phase
        self.rng = random.Random(seed)

    def batch(self, stage: Stage, stage_index: int) -> Tensor:
        """Token ids [batch, tokens + 1]."""
        rows = []
        for _ in range(stage.batch):
            ids = self._phase1_ids(stage.tokens, stage_index) if self.phase == 1 else self._phase2_ids(stage.tokens)
            rows.append(ids[: stage.tokens + 1])
        return torch.tensor(rows)

    def _phase1_ids(self, n_tokens: int, stage_index: int) -> list[int]:
        first = stage_index == 0
        if self.rng.random() < (0.6 if first else 0.05):
            return self._repeated_words(n_tokens)
        if first:
            return self._documents(n_tokens, 0.5, 0.5)
        p_fact = self.rng.choice([0.05, 0.15, 0.3, 0.5])
        return self._documents(n_tokens, p_fact, self.rng.choice([0.2, 0.35, 0.5]))

    def _phase2_ids(self, n_tokens: int) -> list[int]:
        draw = self.rng.random()
        if draw < 0.05:
            return self._repeated_words(n_tokens)
        if draw < 0.5:
            return self._haystack(n_tokens)
        p_fact = self.rng.choice([0.02, 0.05, 0.15, 0.3])
        return self._documents(n_tokens, p_fact, self.rng.choice([0.05, 0.15, 0.35]))

    def _repeated_words(self, n_tokens: int) -> list[int]:
        """Rows of random words, each row twice: forms the copying (induction) circuit, and keeps it sharp."""
        ids: list[int] = []
        while len(ids) < n_tokens + 1:
            n_words = self.rng.randrange(6, max(7, n_tokens // 8))
            words = [self.rng.choice(language.VALUES + language.KEYS) for _ in range(n_words)]
            ids += self.encode(" " + " ".join(words + words))
        return ids

    def _documents(self, n_tokens: int, p_fact: float, p_recall: float) -> list[int]:
        """Documents of the language, one after the other."""
        ids: list[int] = []
        while len(ids) < n_tokens + 1:
            ids += self.encode(language.document(self.rng, n_tokens // 10 + 8, p_fact, p_recall) + " ")
        return ids

    def _haystack(self, n_tokens: int) -> list[int]:
        """Mostly filler with a few facts, up to four of which are asked for at the end."""
        rng = self.rng
        n_sentences = max(2, int(n_tokens / 13.5) - 8)
        n_facts = rng.randrange(2, 12)
        sentences = [language.filler(rng) for _ in range(n_sentences)]
        keys = rng.sample(language.KEYS, n_facts)
        facts = list(zip(keys, [language.random_value(rng) for _ in keys]))
        for key, value in facts:
            sentences.insert(rng.randrange(len(sentences) + 1), language.fact(key, value))
        asked = rng.sample(facts, min(n_facts, 4))
        end = self.encode(" " + " ".join(f"{language.question(key)} {value}." for key, value in asked))
        body = self.encode(" ".join(sentences))
        while len(body) + len(end) > n_tokens + 1:  # drop filler, never facts
            order = rng.sample(range(len(sentences)), len(sentences))
            sentences.pop(next(i for i in order if not sentences[i].startswith("The password")))
            body = self.encode(" ".join(sentences))
        ids = body + end
        while len(ids) < n_tokens + 1:
            ids += self.encode(" " + language.filler(rng))
        return ids


# --- Optimiser -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def orthogonalised(gradient: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly: a quintic Newton-Schulz iteration in bf16."""
    x = gradient.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).float()


class Muon:
    """Momentum with orthogonalised updates, for matrices."""

    MOMENTUM = 0.95
    WEIGHT_DECAY = 0.05

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the parameters and forget their gradients."""
        for parameter, momentum in zip(self.parameters, self.momenta):
            momentum.mul_(self.MOMENTUM).add_(parameter.grad)
            update = orthogonalised(parameter.grad + self.MOMENTUM * momentum)
            scale = max(1, parameter.shape[0] / parameter.shape[1]) ** 0.5
            parameter.mul_(1 - learning_rate * self.WEIGHT_DECAY).add_(update, alpha=-learning_rate * scale)
            parameter.grad = None


def schedule(step: int, steps: int) -> float:
    """Share of the stage's learning rate: 100 steps of warm-up, then a cosine down to a tenth."""
    warm_up = min(1, (step + 1) / 100)
    return warm_up * (0.5 * (1 + math.cos(math.pi * step / steps)) * 0.9 + 0.1)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def predict(model: Llama, ids: Tensor) -> Tensor:
    """Logits, computed in bf16 where that is faster."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(ids)


class RecallLoss:
    """Mean loss over the words that answer a question: the number that says whether the model recalls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        values = set(language.VALUES)
        pieces = [(tokenizer.id_to_token(token) or "").replace("Ġ", "") for token in range(SHAPE.vocab)]
        self.is_value = torch.tensor([piece in values for piece in pieces])
        self.recall_token = tokenizer.encode(" Recall").ids[0]

    def __call__(self, logits: Tensor, ids: Tensor) -> float:
        targets = ids[:, 1:]
        answers = torch.zeros_like(targets, dtype=torch.bool)
        for offset in (2, 3, 4):
            answers[:, offset:] |= targets[:, :-offset] == self.recall_token
        answers &= self.is_value[targets]
        if not answers.any():
            return math.nan
        return F.cross_entropy(logits.float()[answers], targets[answers]).item()


@torch.no_grad()
def recall_rate(model: Llama, encode: Encode, n_sentences: int, n_prompts: int = 24, seed: int = 7) -> float:
    """Share of needle prompts whose three words are all predicted."""
    rng = random.Random(seed)
    right = 0
    for index in range(n_prompts):
        prompt, answer = language.needle_prompt(rng, n_sentences, (index + 0.5) / n_prompts)
        prompt_ids, answer_ids = encode(prompt), encode(answer)
        logits = predict(model, torch.tensor([prompt_ids + answer_ids]))
        predicted = logits[0, len(prompt_ids) - 1 : -1].argmax(-1)
        right += int((predicted == torch.tensor(answer_ids)).all())
    return right / n_prompts


# --- Training --------------------------------------------------------------------------------------------------------


def train(
    model: Llama, tokenizer: Tokenizer, phase: Phase, texts: Texts, stages: list[Stage], out: Path, log_every: int
) -> None:
    """Run the stages."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    recall_loss = RecallLoss(tokenizer)

    def rates(sentences: Iterable[int]) -> str:
        return ", ".join(f"{n} sentences {recall_rate(model, texts.encode, n):.2f}" for n in sentences)

    start = time.time()
    total = 0
    for stage_index, stage in enumerate(stages):
        for step in range(stage.steps):
            learning_rate = stage.learning_rate * schedule(step, stage.steps)
            for group in adam.param_groups:
                group["lr"] = learning_rate
            ids = texts.batch(stage, stage_index)
            logits = predict(model, ids[:, :-1])
            loss = F.cross_entropy(logits.float().view(-1, SHAPE.vocab), ids[:, 1:].reshape(-1))
            adam.zero_grad()
            loss.backward()
            adam.step()
            muon.step(10 * learning_rate)
            total += 1
            if total % log_every == 0:
                print(
                    f"{stage.tokens} tokens, step {total}: loss {loss.item():.3f}, "
                    f"recall loss {recall_loss(logits, ids):.3f}, {time.time() - start:.0f} s",
                    flush=True,
                )
            if total % phase.evaluate_every == 0:
                print(f"  recalled: {rates(phase.evaluate_sentences)}", flush=True)
                torch.save(model.state_dict(), out / "checkpoint.pt")
        print(f"end of stage, {stage.tokens} tokens; recalled: {rates((10, 40, 160))}", flush=True)
        torch.save(model.state_dict(), out / f"checkpoint-{stage.tokens}.pt")
    torch.save(model.state_dict(), out / "checkpoint.pt")


def parse_stages(text: str) -> list[Stage]:
    """Stages from a JSON list of [tokens, batch, steps, learning rate]."""
    try:
        return [Stage(*fields) for fields in json.loads(text)]
    except (TypeError, json.JSONDecodeError) as error:
        raise argparse.ArgumentTypeError(f"not a list of [tokens, batch, steps, learning rate]: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=int, choices=sorted(PHASES), required=True)
    parser.add_argument("--init", type=Path, metavar="CHECKPOINT", help="start from this checkpoint")
    parser.add_argument("--stages", type=parse_stages, metavar="JSON", help="instead of the phase's own")
    parser.add_argument("--tokenizer", type=Path, default=Path("tokenizer.json"), help="default: %(default)s")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--seed", type=int, default=1, help="seed of the texts (default: %(default)s)")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("-t", "--threads", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    texts = Texts(lambda text: tokenizer.encode(text).ids, options.phase, options.seed)
    model = Llama()
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    if options.init:
        model.load_state_dict(torch.load(options.init, weights_only=True))
    phase = PHASES[options.phase]
    train(model, tokenizer, phase, texts, options.stages or list(phase.stages), options.out, options.log_every)


if __name__ == "__main__":
    main()
