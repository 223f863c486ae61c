#!/usr/bin/env python3
"""Score made-up answers with LongBench's published metrics, for tests/fixtures/longbench_metrics.json.

Needs `metrics.py` of https://github.com/THUDM/LongBench (folder LongBench; commit 2e00731f was used) and the packages that
it imports, but for jieba, which only its Chinese metrics use:

    pip install rouge==1.0.1 fuzzywuzzy==0.18.0 python-Levenshtein
    python tools/longbench_metrics.py path/to/metrics.py -o tests/fixtures/longbench_metrics.json

The seed is fixed. Answers are random sentences of a few words that often share some with the truth. Beside them are cases
whose scores were worked out by hand, each with how; the published metrics must agree with all of them.
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

PUBLISHED = {
    "qa_f1": "qa_f1_score",
    "rouge_l": "rouge_score",
    "code": "code_sim_score",
    "count": "count_score",
    "retrieval": "retrieval_score",
    "classification": "classification_score",
}


def f(precision: float, recall: float) -> float:
    """F as the package `rouge` has it."""
    return 2 * precision * recall / (precision + recall + 1e-8)


# Metric, answer, truth, score, why.
BY_HAND = [
    ("qa_f1", "The Red Fox!", "a red fox.", 1, "case, punctuation and articles go: red fox, red fox"),
    ("qa_f1", "It was the old red fox of the mill", "red fox", 4 / 9, "2 of 7 words said, 2 of 2 true: 2 * 2/7 / (9/7)"),
    ("qa_f1", "fox, fox; fox", "the fox fox", 4 / 5, "as often as both have it: 2 of 3, 2 of 2: 2 * 2/3 / (5/3)"),
    ("qa_f1", "red falcon", "red fox", 1 / 2, "1 of 2, 1 of 2"),
    ("qa_f1", "Alice's mother-in-law", "alices motherinlaw", 1, "punctuation leaves no space"),
    ("qa_f1", "a an the, fox.", "fox", 1, "all articles go"),
    ("qa_f1", "another theme", "other me", 0, "articles inside of words stay"),
    ("qa_f1", "the", "the", 0, "nothing but an article is nothing"),
    ("qa_f1", "", "red fox", 0, "nothing said"),
    ("qa_f1", "...", "red fox", 0, "nothing but punctuation"),
    ("qa_f1", "CAFÉ Müller", "Café MÜLLER", 1, "case of letters with accents"),
    ("qa_f1", "cafe Muller", "café Müller", 0, "letters without accents are others"),
    ("qa_f1", "CAFÉ au lait", "café noir", 2 / 5, "1 of 3, 1 of 2: 2 * 1/6 / (5/6)"),
    ("qa_f1", "\u201cthe fox\u201d", "fox", 0, "quotes that are not ASCII stay at their word"),
    ("qa_f1", "ΟΔΟΣ", "οδος", 1, "a capital sigma at the end of a word becomes the final one"),
    ("qa_f1", "北京 大学 在 北京", "北京 大学", 2 / 3, "2 of 4, 2 of 2: 2 * 1/2 / (3/2)"),
    ("qa_f1", "北京大学", "北京大学", 1, "one word"),
    ("qa_f1", "北京大学。", "北京大学", 0, "a Chinese full stop is no ASCII punctuation: another word"),
    ("qa_f1", "a北京 the fox", "北京 fox", 1 / 2, "an article at a Chinese letter is a part of its word: 1 of 2, 1 of 2"),
    ("qa_f1", "red\u3000fox", "red fox", 1, "an ideographic space is a space"),
    ("rouge_l", "the red fox ran", "the red fox ran", f(1, 1), "all"),
    ("rouge_l", "the fox", "the red fox ran", f(2 / 2, 2 / 4), "both words, in order, of four"),
    ("rouge_l", "fox the", "the red fox ran", f(1 / 2, 1 / 4), "of two words in another order one counts"),
    ("rouge_l", "fox. ran", "fox ran", f(2 / 2, 2 / 2), "the union over two sentences"),
    ("rouge_l", "fox fox fox", "fox ran", f(1 / 1, 1 / 2), "different words only"),
    ("rouge_l", "The fox", "the fox", f(1 / 2, 1 / 2), "case counts"),
    ("rouge_l", "fox, ran", "fox ran", f(1 / 2, 1 / 2), "a comma belongs to its word"),
    ("rouge_l", "", "fox", 0, "nothing said"),
    ("rouge_l", "un café noir", "un café crème", f(2 / 3, 2 / 3), "two of three"),
    ("rouge_l", "un cafe", "un café", f(1 / 2, 1 / 2), "letters without accents are others"),
    ("rouge_l", "北京 大学 很 大", "北京 大学", f(2 / 4, 2 / 2), "two of four, both"),
    ("rouge_l", "北京大学。很大", "北京大学。", 0, "a Chinese full stop ends no sentence: one word each"),
    ("classification", "The answer is: falcon.", "falcon", 1, "that one alone"),
    ("classification", "falcon or fox?", "fox", 1 / 2, "two are named"),
    ("classification", "river, bridge, fox, falcon, storm", "storm", 1 / 5, "five are named"),
    ("classification", "red bridge", "red bridge", 1, "bridge and red are parts of the true one"),
    ("classification", "red bridge", "bridge", 1 / 3, "bridge, red bridge and red are named"),
    ("classification", "stormy", "storm", 1, "inside of a word, too"),
    ("classification", "Fox", "fox", 0, "case counts"),
    ("classification", "river", "fox", 0, "another"),
    ("classification", "", "fox", 0, "nothing said"),
    ("classification", "狐狸(fox)。", "fox", 1, "among Chinese letters"),
    ("count", "12", "12", 1, "that number alone"),
    ("count", "There are 12 unique paragraphs (of 30).", "12", 1 / 2, "one of two numbers"),
    ("count", "12, 12 and 13", "12", 2 / 3, "two of three numbers"),
    ("count", "12.0", "12", 1 / 2, "a point ends a number: 12 and 0"),
    ("count", "012", "12", 0, "digits, not values"),
    ("count", "1 2", "12", 0, "two other numbers"),
    ("count", "twelve", "12", 0, "no number"),
    ("count", "", "12", 0, "nothing said"),
    ("count", "共有12段。", "12", 1, "among Chinese letters"),
    ("retrieval", "The answer is [Paragraph 7].", "Paragraph 7", 1, "that number alone"),
    ("retrieval", "paragraph 7 or Paragraph 17", "Paragraph 7", 1 / 2, "one of two numbers"),
    ("retrieval", "7, 7, 8, 9", "Paragraph 7", 1 / 2, "two of four numbers"),
    ("retrieval", "Paragraph seven", "Paragraph 7", 0, "no number"),
    ("retrieval", "", "Paragraph 7", 0, "nothing said"),
    ("retrieval", "段落7", "Paragraph 7", 1, "among Chinese letters"),
    ("retrieval", "3", "Paragraph 3, not Paragraph 7", 1, "the truth's first paragraph"),
    ("retrieval", "7", "Paragraph 3, not Paragraph 7", 0, "and not its second"),
    ("code", "x = y + 1", "x = y + 1", 1, "the same"),
    ("code", "x = y + 1;", "x = y + 1", 0.95, "2 * 9 of 19 characters: 94.7 %"),
    ("code", "```\n# sum\nx = y\nrest", "x = y", 1, "the first line without fence or comment"),
    ("code", "// x\nx = z\nx = y", "x = y", 0.8, "not the best line: 2 * 4 of 10 characters"),
    ("code", "\n\nreturn α + β", "return α + β", 1, "empty lines before it"),
    ("code", "return α", "return β", 0.88, "2 * 7 of 16 characters: 87.5 %, to the even percent"),
    ("code", 'print("é")', 'print("e")', 0.9, "an accent is one character: 2 * 9 of 20"),
    ("code", "返回 x", "返回 y", 0.75, "2 * 3 of 8 characters"),
    ("code", "# only", "x", 0, "no line of code"),
    ("code", "", "x", 0, "nothing said"),
]


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
    by_hand = [dict(zip(["metric", "said", "truth", "score", "why"], case)) for case in BY_HAND]
    for case in by_hand:
        score = getattr(metrics, PUBLISHED[case["metric"]])(case["said"], case["truth"], all_classes=CLASSES)
        assert abs(score - case["score"]) < 1e-9, f"{case}: the published score is {score}"
    lines, hand = (",\n".join(map(json.dumps, some)) for some in (cases, by_hand))
    options.out.write_text(
        f'{{"classes": {json.dumps(CLASSES)}, "cases": [\n{lines}\n], "by_hand": [\n{hand}\n]}}\n'
    )


if __name__ == "__main__":
    main()
