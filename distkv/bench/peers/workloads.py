"""The work that all engines do: seeded token ids, answers of a fixed length."""

import random
from collections.abc import Collection
from dataclasses import dataclass, replace

from distkv.bench.prompts import FIRST_RANDOM
from distkv.errors import ConfigError

PARTS = ("single", "mixed", "http")
SHORT = 4  # tokens of an answer that only warms up


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens; a pair is the least and the most of what is drawn for each request."""

    contexts: tuple[int, ...] = (128, 1024, 4096, 8000)
    new_tokens: int = 32
    mixed_requests: int = 64
    mixed_prompt: tuple[int, int] = (32, 1024)
    mixed_answer: tuple[int, int] = (8, 128)
    streams: tuple[int, ...] = (1, 8, 32)
    http_prompt: int = 512
    http_answer: int = 64

    def http_requests(self, streams: int) -> int:
        """Four for each stream, within reason, and at least two."""
        return max(8, min(4 * streams, 64), 2 * streams)

    def longest(self, parts: Collection[str]) -> int:
        """Most tokens of a prompt and its answer."""
        lengths = {
            "single": max(self.contexts, default=0) + self.new_tokens + 1,
            "mixed": self.mixed_prompt[1] + self.mixed_answer[1],
            "http": self.http_prompt + self.http_answer,
        }
        return max(lengths[part] for part in parts)

    def check(self, positions: int, parts: Collection[str]) -> None:
        """Raises ConfigError for what a model of so many positions cannot do."""
        longest = self.longest(parts)
        if longest > positions:
            raise ConfigError(
                f"the longest prompt and its answer have {longest} tokens, and the model has {positions} positions; "
                "use a smaller --context, or --quick, or --only"
            )


QUICK = Sizes(
    contexts=(128, 1024), new_tokens=16, mixed_requests=16, mixed_prompt=(32, 256), mixed_answer=(8, 32),
    streams=(1, 8), http_prompt=128, http_answer=16,
)  # fmt: skip


def sizes(is_quick: bool, contexts: list[int] | None, streams: list[int] | None) -> Sizes:
    """The usual sizes, but for those that are given."""
    usual = QUICK if is_quick else Sizes()
    return replace(usual, contexts=tuple(contexts or usual.contexts), streams=tuple(streams or usual.streams))


@dataclass(frozen=True)
class Work:
    """Requests that are submitted at once, or over HTTP by so many streams; one request alone is timed by tokens."""

    part: str  # of PARTS
    size: int  # tokens of context, requests, or streams
    prompts: list[list[int]]
    new_tokens: list[int]

    @property
    def title(self) -> str:
        unit = {"single": "token", "mixed": "request", "http": "stream"}[self.part]
        return f"{self.size} {unit}{'' if self.size == 1 else 's'}"

    def warm_up(self) -> "Work":
        """What comes before the turns that count: many requests have short answers then."""
        if self.part == "single":
            return self
        return replace(self, new_tokens=[min(SHORT, count) for count in self.new_tokens])


def works(part: str, sizes: Sizes, vocab_size: int) -> list[Work]:
    """All work of one part."""
    match part:
        case "single":
            return [_single(context, sizes, vocab_size) for context in dict.fromkeys(sizes.contexts)]
        case "mixed":
            return [_mixed(sizes, vocab_size)]
        case _:
            return [_streamed(streams, sizes, vocab_size) for streams in dict.fromkeys(sizes.streams)]


def _single(context: int, sizes: Sizes, vocab_size: int) -> Work:
    """One request; the first token, which the prefill draws, comes before the `new_tokens` that are timed."""
    prompt = _tokens(random.Random(context), context, vocab_size)
    return Work("single", context, [prompt], [sizes.new_tokens + 1])


def _mixed(sizes: Sizes, vocab_size: int) -> Work:
    """Many requests of mixed lengths."""
    rng = random.Random(sizes.mixed_requests)
    prompts, answers = [], []
    for _ in range(sizes.mixed_requests):
        prompts.append(_tokens(rng, rng.randint(*sizes.mixed_prompt), vocab_size))
        answers.append(rng.randint(*sizes.mixed_answer))
    return Work("mixed", sizes.mixed_requests, prompts, answers)


def _streamed(streams: int, sizes: Sizes, vocab_size: int) -> Work:
    """Requests for so many streams."""
    rng = random.Random(streams)
    count = sizes.http_requests(streams)
    prompts = [_tokens(rng, sizes.http_prompt, vocab_size) for _ in range(count)]
    return Work("http", streams, prompts, [sizes.http_answer] * count)


def _tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(FIRST_RANDOM, vocab_size) for _ in range(count)]
