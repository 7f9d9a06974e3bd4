"""Prompts of the benchmarks: real text where the model can read it."""

import random
import sysconfig
from itertools import cycle
from pathlib import Path

from distkv.errors import ConfigError
from distkv.frontend.tokenizer import TOKENIZER_FILES, Tokenizer
from distkv.workers.model.model_config import ModelConfig

STDLIB = "the sources of Python's standard library"
RANDOM = "random tokens, since the model has no tokenizer"
FIRST_RANDOM = 10  # tokens below it are often special


class Prompts:
    """Tokens for one model: of a text where it has a tokenizer, else seeded random ones."""

    def __init__(self, model: Path):
        has_tokenizer = any((model / name).is_file() for name in TOKENIZER_FILES)
        self._tokenizer = Tokenizer(model) if has_tokenizer else None
        self._vocab_size = ModelConfig.load(model).vocab_size
        self.source = STDLIB if has_tokenizer else RANDOM

    def text(self, count: int) -> list[int]:
        """The first `count` tokens of a long text."""
        if self._tokenizer is None:
            return self._random(count, seed=0)
        token_ids: list[int] = []
        for path in cycle(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
            if len(token_ids) >= count:
                break
            token_ids += self._tokenizer.encode(path.read_text(encoding="utf-8", errors="replace") + "\n")
        return token_ids[:count]

    def file(self, path: Path) -> list[int]:
        """The tokens of a text file. Raises ConfigError when there are none to be had."""
        if self._tokenizer is None:
            raise ConfigError("--text is given and the model has no tokenizer; leave it out")
        return self._tokenizer.encode(read_text(path))

    def question(self, number: int) -> list[int]:
        """A few dozen tokens that follow a text and are others for each number, from the first one on."""
        if self._tokenizer is None:
            return self._random(24, seed=1 + number)
        names = ("writes a file", "reads a file", "raises an error", "takes a list", "returns a string", "has a loop")
        text = f"{number + 1}. Name a function in the sources above that {names[number % len(names)]}, and say in one "
        return self._tokenizer.encode(text + "short sentence what it is good for.\nAnswer: The function")

    def _random(self, count: int, seed: int) -> list[int]:
        generator = random.Random(seed)
        return [generator.randrange(FIRST_RANDOM, self._vocab_size) for _ in range(count)]


def read_text(path: Path) -> str:
    """A text file as it is. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror}; name another file with --text") from error
