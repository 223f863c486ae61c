#!/usr/bin/env python3
"""Score made-up answers with LongBench's published metrics, for tests/fixtures/longbench_metrics.json.

Needs `metrics.py` of https://github.com/THUDM/LongBench (folder LongBench; commit 2e00731f was used) and the packages that
it imports, but for jieba, which only its Chinese metrics use:

    pip install rouge==1.0.1 fuzzywuzzy==0.18.0 python-Levenshtein
    python tools/longbench_metrics.py path/to/metrics.py -o tests/fixtures/longbench_metrics.json

The seed is fixed. Answers are random sentences of a few words that often share some with the truth.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import types
from pathlib import Path

WORDS = "the a an red fox falcon river bridge opened closed Alice 12 7 (old) mill's storm-door x = y + 1; return".split()
CLASSES = ["river", "old river", "bridge", "red bridge", "fox", "falcon", "red", "storm"]


def load(path: Path) -> types.ModuleType:
    """The published module, with a stand-in for jieba."""
    sys.modules.setdefault("jieba", types.ModuleType("jieba"))
    spec = importlib.util.spec_from_file_location("metrics", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(rng: random.Random, words: list[str], most: int) -> str:
    """Up to `most` words, in sentences and sometimes lines."""
    out = []
    for _ in range(rng.randrange(most + 1)):
        out.append(rng.choice(words) + rng.choice(["", "", "", "", ".", ",", "\n", " ", ". ."]))
    return " ".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    metrics, rng, cases = load(options.metrics), random.Random(2308), []
    for _ in range(60):
        truth = text(rng, WORDS, 12) or "fox"
        said = text(rng, truth.split() + WORDS[:6], 14)
        cases.append({"metric": "qa_f1", "said": said, "truth": truth, "score": metrics.qa_f1_score(said, truth)})
        cases.append({"metric": "rouge_l", "said": said, "truth": truth, "score": metrics.rouge_score(said, truth)})
        cases.append({"metric": "code", "said": said, "truth": truth, "score": metrics.code_sim_score(said, truth)})
        cases.append({"metric": "count", "said": said, "truth": "12", "score": metrics.count_score(said, "12")})
        found = metrics.retrieval_score(said, "Paragraph 7")
        cases.append({"metric": "retrieval", "said": said, "truth": "Paragraph 7", "score": found})
        said, truth = " ".join(rng.sample(CLASSES, rng.randrange(4))), rng.choice(CLASSES)
        score = metrics.classification_score(said, truth, all_classes=CLASSES)
        cases.append({"metric": "classification", "said": said, "truth": truth, "score": score})
    lines = ",\n".join(json.dumps(case) for case in cases)
    options.out.write_text(f'{{"classes": {json.dumps(CLASSES)}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
