"""A small made-up language with facts that must be recalled later: a needle in a haystack.

A text is a row of sentences. Most are filler. A fact is "The password of KEY WORD WORD WORD." and is asked for later
with "Recall KEY", which is continued by the three words and a full stop. Keys and words are made-up four-letter words.

Every function draws from the `random.Random` that it is given, in a fixed order: the same seed gives the same text.
"""

from __future__ import annotations

import random

ADJECTIVES = (
    "red blue green amber silver golden quiet rapid ancient gentle "
    "hollow bright misty frozen rusty crimson distant narrow humble lively"
).split()
NOUNS = (
    "falcon harbor lantern river castle meadow engine garden mirror temple "
    "bridge forest market compass anchor violin hammer candle ladder rocket"
).split()
PEOPLE = (
    "Alice Boris Clara David Elena Felix Grace Hugo Irene Jonas "
    "Karin Lucas Maria Nadia Oscar Paula Quinn Rosa Simon Tessa"
).split()
VERBS = (
    "watched painted followed repaired crossed measured visited ignored "
    "remembered described carried guarded opened closed admired sketched"
).split()
PLACES = (
    "near the shore|behind the mill|under the old roof|beside the road|across the valley|"
    "in the early morning|before the storm|after the long winter|at the edge of town|during the festival"
).split("|")
TAILS = [
    "",
    "",
    "",
    " and then went home",
    " without a word",
    " for the second time",
    " while it rained",
    " with great care",
]


def _made_up_words() -> list[str]:
    """All consonant-vowel-consonant-vowel words, shuffled with a fixed seed."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    words = [a + b + c + d for a in consonants for b in vowels for c in consonants for d in vowels]
    random.Random(42).shuffle(words)
    return words


_WORDS = _made_up_words()
KEYS = _WORDS[:256]
VALUES = _WORDS[256:512]


def filler(rng: random.Random) -> str:
    """A sentence that says nothing that is asked for."""
    choose = rng.choice
    kind = rng.randrange(4)
    if kind == 0:
        return (
            f"{choose(PEOPLE)} {choose(VERBS)} the {choose(ADJECTIVES)} {choose(NOUNS)} "
            f"{choose(PLACES)}{choose(TAILS)}."
        )
    if kind == 1:
        return f"The {choose(ADJECTIVES)} {choose(NOUNS)} stood {choose(PLACES)}{choose(TAILS)}."
    if kind == 2:
        return f"{choose(PEOPLE)} and {choose(PEOPLE)} {choose(VERBS)} a {choose(NOUNS)} {choose(PLACES)}."
    return f"Nobody {choose(VERBS)} the {choose(NOUNS)} {choose(PLACES)}{choose(TAILS)}."


def random_key(rng: random.Random) -> str:
    """What a fact is about."""
    return rng.choice(KEYS)


def random_value(rng: random.Random) -> str:
    """The three words of a fact."""
    return f"{rng.choice(VALUES)} {rng.choice(VALUES)} {rng.choice(VALUES)}"


def fact(key: str, value: str) -> str:
    """The sentence that states a fact."""
    return f"The password of {key} {value}."


def question(key: str) -> str:
    """The words that ask for a fact; its value follows."""
    return f"Recall {key}"


def document(rng: random.Random, n_sentences: int, p_fact: float, p_recall: float) -> str:
    """A text of filler, facts with probability `p_fact` and answered questions with probability `p_recall`."""
    sentences: list[str] = []
    facts: dict[str, str] = {}
    for _ in range(n_sentences):
        draw = rng.random()
        if draw < p_fact:
            key = random_key(rng)
            if key in facts:
                continue
            facts[key] = random_value(rng)
            sentences.append(fact(key, facts[key]))
        elif draw < p_fact + p_recall and facts:
            key = rng.choice(list(facts))
            sentences.append(f"{question(key)} {facts[key]}.")
        else:
            sentences.append(filler(rng))
    return " ".join(sentences)


def needle_prompt(rng: random.Random, n_sentences: int, depth: float, n_distractors: int = 8) -> tuple[str, str]:
    """A prompt that asks for one fact at `depth` (0: at its start, 1: at its end), and the answer.

    `n_sentences` are filler; `n_distractors` other facts lie at random places.
    """
    sentences = [filler(rng) for _ in range(n_sentences)]
    key, *other_keys = rng.sample(KEYS, n_distractors + 1)
    value = random_value(rng)
    for other in other_keys:
        place = rng.randrange(len(sentences) + 1)
        sentences.insert(place, fact(other, random_value(rng)))
    sentences.insert(int(depth * len(sentences)), fact(key, value))
    return " ".join(sentences) + " " + question(key), " " + value
