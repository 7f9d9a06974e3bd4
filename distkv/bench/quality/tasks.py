"""Questions about long texts, as in RULER: What's the Real Context Size of Your Long-Context Language Models?,
https://arxiv.org/abs/2404.06654, in sizes that a model of 135M parameters can do with full attention.

Sentences with facts lie among those of a real text. The question ends the prompt, and the words that lead up to what is
asked for begin the answer, so that all tokens that decide are of the answer.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ADJECTIVES = (
    "red", "blue", "happy", "quiet", "brave", "old", "sharp", "bitter", "silver", "hollow", "gentle", "rapid", "frozen",
    "golden", "narrow", "distant",
)  # fmt: skip
NOUNS = (
    "river", "candle", "engine", "garden", "window", "bottle", "mountain", "letter", "pocket", "harbor", "ladder",
    "hammer", "island", "curtain", "basket", "bridge",
)  # fmt: skip
KEYS = [" ".join(pair) for pair in itertools.product(ADJECTIVES, NOUNS)]
NAMES = ["".join(letters) for letters in itertools.product("ABCDEFGHKLMNPRSTVXYZ", repeat=3)]
DIGITS = 5  # of a number that is to be found
NEEDLE = "One of the special magic numbers for {} is: {}."
ORDER = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n"
)


@dataclass(frozen=True)
class Question:
    """One question about a text."""

    task: str
    prompt: str  # the text, with all that is asked
    lead: str  # what the answer begins with
    expected: tuple[str, ...]  # what it must go on to name

    def score(self, answer: str) -> float:
        """The share of what is expected that the first line of an answer names."""
        line = answer.lstrip("\n").partition("\n")[0]
        return sum(one in line for one in self.expected) / len(self.expected)


@dataclass(frozen=True)
class Task:
    """Questions of one kind."""

    name: str
    num_tokens: int  # of each text, about
    num_texts: int
    make: Callable[[random.Random, list[str], float], Iterator[Question]]

    def questions(self, sentences: list[str], tokens_per_word: float, seed: int) -> list[Question]:
        """The questions about all texts; those about one text follow each other.

        Args:
            sentences: what the texts are made of, from the first one on, and round.
            tokens_per_word: of these sentences.
        """
        text = take_words(sentences, round(self.num_tokens / tokens_per_word))
        found: list[Question] = []
        for number in range(self.num_texts):
            depth = number / max(1, self.num_texts - 1)
            found += self.make(random.Random(f"{seed}, {self.name}, {number}"), list(text), depth)
        return found


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without its line breaks."""
    return re.split(r"(?<=[.:;])\s+", " ".join(text.split()))


def take_words(sentences: list[str], num_words: int) -> list[str]:
    """So many sentences that they have about as many words."""
    taken: list[str] = []
    count = 0
    for sentence in itertools.cycle(sentences):
        count += len(sentence.split())
        if count > num_words:
            return taken
        taken.append(sentence)
    return taken


def single_needle(rng: random.Random, text: list[str], depth: float) -> Iterator[Question]:
    """One number in the text, at a depth from 0 to 1."""
    key, number = rng.choice(KEYS), _number(rng)
    text.insert(round(depth * len(text)), NEEDLE.format(key, number))
    yield _ask_needle("needle", text, key, number)


def several_needles(rng: random.Random, text: list[str], depth: float) -> Iterator[Question]:
    """Four numbers in the text, of which each is asked for in turn."""
    keys = rng.sample(KEYS, 4)
    numbers = [_number(rng) for _ in keys]
    scatter(rng, text, [NEEDLE.format(key, number) for key, number in zip(keys, numbers, strict=True)])
    for key, number in zip(keys, numbers, strict=True):
        yield _ask_needle("needles", text, key, number)


def key_value(rng: random.Random, text: list[str], depth: float) -> Iterator[Question]:
    """A list of 16 keys with their values, of which some are asked for. The question shows two others first, without
    which this model often does not see what is asked."""
    keys = rng.sample(KEYS, 16)
    lines = [f"{key}: {_number(rng, 4)}" for key in keys]
    at = rng.randrange(len(text) + 1)
    whole = " ".join(text[:at]) + "\n\n" + "\n".join(lines) + "\n\n" + " ".join(text[at:])
    first, second, *asked = rng.sample(lines, 6)
    for line in asked:
        key, value = line.split(": ")
        yield Question("key-value", f"{whole}\n\nThe same once more:\n{first}\n{second}\n", f"{key}:", (value,))


def variables(rng: random.Random, text: list[str], depth: float) -> Iterator[Question]:
    """A variable and another one that is set to it; all with the value are asked for. RULER's chains are longer."""
    first, second = rng.sample(NAMES, 2)
    number = _number(rng)
    scatter(rng, text, [f"VAR {first} = {number}.", f"VAR {second} = VAR {first}."])
    lead = f"The variables with the value {number} are VAR"
    yield Question("variables", " ".join(text) + "\n", lead, (first, second))


def scatter(rng: random.Random, text: list[str], facts: list[str]) -> None:
    """Puts sentences in random places of a text, in their order."""
    for moved, at in enumerate(sorted(rng.randrange(len(text) + 1) for _ in facts)):
        text.insert(at + moved, facts[moved])


TASKS = (
    Task("needle", 3600, 16, single_needle),
    Task("needles", 1800, 4, several_needles),
    Task("key-value", 1800, 4, key_value),
    Task("variables", 1800, 8, variables),
)
QUICK_TASKS = (Task("needle", 1800, 4, single_needle), Task("needles", 1800, 1, several_needles))


def _ask_needle(task: str, text: list[str], key: str, number: str) -> Question:
    asked = f"the special magic number for {key} mentioned in the text"
    return Question(task, f"{ORDER}{' '.join(text)}\nWhat is {asked}?", f" The{asked[3:]} is:", (number,))


def _number(rng: random.Random, digits: int = DIGITS) -> str:
    """Without zeros, so that each digit is a token that says something."""
    return "".join(rng.choice("123456789") for _ in range(digits))
