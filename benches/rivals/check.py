"""Correctness: the golden case, the method's two invariants, and greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import Options
from decoder import Decoder
from llama import Model

PROMPT = 300  # of the golden case's 400 ids
GOLDEN = {
    "full": dict(mode="full"),
    "kivi-b1-g64-R64": dict(mode="kivi", bits=1, group=64, residual=64),
    "kivi-b2-g32-R100": dict(mode="kivi", bits=2, group=32, residual=100),
    "specache-b1-g64-R64-k16": dict(mode="specache", bits=1, group=64, residual=64, top_k=16),
    "specache-b2-g32-R100-k64": dict(mode="specache", bits=2, group=32, residual=100, top_k=64),
}
# The same options must give the same logits: left and right, with tests/golden.rs's bound of 1e-3 for invariants.
EQUAL = {
    "specache with k = 0 is kivi": (dict(mode="specache", bits=1, top_k=0), dict(mode="kivi", bits=1)),
    "specache with k above n is full": (dict(mode="specache", bits=1, top_k=512), dict(mode="full")),
    "fetch with k above n is full": (dict(mode="fetch", bits=1, top_k=512), dict(mode="full")),
    "offload is full": (dict(mode="offload"), dict(mode="full")),
    "gather inline is gather thread": (dict(mode="specache", gather="inline"), dict(mode="specache", gather="thread")),
}


def teacher_forced(
    model: Model, options: Options, ids: list[int], prompt: int, speculative: list[int] | None = None, batch: int = 1
) -> tuple[Tensor, list[list[list[list[int]]]]]:
    """Logits [len - prompt, vocab] and selections [pass][layer][head] of sequence 0; the others of the batch hold the
    same ids, rotated, so that whoever mixes sequences up is found out."""
    decoder = Decoder(model, options, batch, len(ids) + 2)
    decoder.trace = []
    first = torch.tensor(ids, device=model.device)
    all_ids = torch.stack([first.roll(7 * b) for b in range(batch)])
    logits = [decoder.prefill(all_ids[:, :prompt])]
    two = options.mode == "specache"
    guess = decoder.pre_decode(all_ids[:, prompt]).argmax(-1) if two else None
    for t, position in enumerate(range(prompt, len(ids) - 1)):
        if guess is not None and speculative is not None:
            guess = torch.full_like(guess, speculative[t])
        token = all_ids[:, position]
        rows = decoder.step(torch.stack([token, guess], 1) if guess is not None else token.unsqueeze(1))
        logits.append(rows[:, 0])
        guess = rows[:, 1].argmax(-1) if two else None
    return torch.stack([row[0] for row in logits]).float().cpu(), decoder.trace


def greedy(model: Model, options: Options, prompts: Tensor, n: int) -> Tensor:
    """n tokens after each of `prompts` [B, len], [B, n]."""
    decoder = Decoder(model, options, prompts.shape[0], prompts.shape[1] + n + 2)
    tokens = decoder.first(decoder.prefill(prompts))
    out = [tokens[:, 0]]
    while len(out) < n:
        tokens = decoder.step(tokens).argmax(-1)
        out.append(tokens[:, 0])
    return torch.stack(out, 1).cpu()


def difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Largest |difference| of all logits, and the median over rows of each row's largest."""
    rows = (ours - theirs).abs().amax(-1)
    return dict(max=rows.max().item(), median_row=rows.median().item(), first_row=rows[0].item())


def selections(ours: list[Any], theirs: list[Any]) -> dict[str, int]:
    sets = [(set(a), set(b)) for x, y in zip(ours, theirs, strict=True) for p, q in zip(x, y) for a, b in zip(p, q)]
    assert all(len(a) == len(b) for a, b in sets)
    return dict(
        sets=len(sets),
        sets_that_differ=sum(a != b for a, b in sets),
        positions_that_differ=sum(len(b - a) for a, b in sets),
    )


def check(model: Model, options: Options, folder: Path) -> dict[str, dict[str, Any]]:
    """All cases. Bounds on the CPU are those of tests/golden.rs; 16-bit activations on CUDA are only reported."""
    ids = json.loads((folder / "ids.json").read_text())
    exact = model.dtype == torch.float32
    cases: dict[str, dict[str, Any]] = {}
    for name, changes in GOLDEN.items():
        speculative = None
        if changes["mode"] == "specache":
            speculative = json.loads((folder / f"{name}.spec.json").read_text())
        for batch in (1, 3):
            logits, trace = teacher_forced(model, options.with_(**changes), ids, PROMPT, speculative, batch)
            golden = torch.from_numpy(np.load(folder / f"{name}.logits.npy"))
            case: dict[str, Any] = difference(logits, golden)
            ok = case["max"] < 5e-2 and case["median_row"] < 5e-4 and case["first_row"] < 1e-4
            if speculative is not None:
                golden = json.loads((folder / f"{name}.selections.json").read_text())
                case |= selections(trace, [golden["pre_decode"], *golden["steps"]])
                ok &= case["sets_that_differ"] * 100 <= case["sets"]
            cases[f"{name}, batch {batch}"] = case | dict(ok=ok or not exact)
    for name, (left, right) in EQUAL.items():
        sides = [teacher_forced(model, options.with_(**changes), ids, PROMPT)[0] for changes in (left, right)]
        case = difference(*sides)
        cases[name] = case | dict(ok=case["max"] <= 1e-3 or not exact)
    return cases
