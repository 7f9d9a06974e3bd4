"""Requests whose answers are known, and what has come of them."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from support.prompts import random_prompt

_numbers = itertools.count()


@dataclass(frozen=True)
class Request:
    """One of a fixed set; `params` are fields of SamplingParams."""

    key: int  # tells it from the others of the set
    prompt: list[int]
    params: dict[str, Any]


def requests(count: int, end: int, prompt_len: int, answer_len: int) -> list[Request]:
    """A fixed set: every other one is sampled, one in four has two answers, and lengths are between a half and all of
    what is given."""
    made = []
    for key in range(count):
        share = (key % 5 + 4) / 8
        params: dict[str, Any] = {"max_tokens": int(share * answer_len), "temperature": 0.0}
        if key % 2:
            params |= {"temperature": 1.0, "seed": 1000 + key, "n": 2 if key % 4 == 3 else 1}
        made.append(Request(key, random_prompt(int((12 - key % 7) / 12 * prompt_len), key, end), params))
    return made


@dataclass
class Load:
    """Requests in flight."""

    requests: list[Request]
    answers: dict[str, dict[int, list[int]]] = field(default_factory=dict)  # by request, and index of the answer
    ended: dict[str, str | None] = field(default_factory=dict)  # the error, or None
    cached: dict[str, int] = field(default_factory=dict)  # tokens of the prompt
    times: list[float] = field(default_factory=list)  # monotonic, of each event

    def __post_init__(self) -> None:
        self._names = {request.key: f"{request.key}.{next(_numbers)}" for request in self.requests}
        for request in self.requests:
            self.answers[self.name_of(request)] = {index: [] for index in range(request.params.get("n", 1))}

    def name_of(self, request: Request) -> str:
        """One that no other load has for it."""
        return self._names[request.key]

    def take(self, event: dict[str, Any]) -> None:
        """Takes in an event, if it is of one of these requests."""
        name = event["request"]
        if name not in self.answers:
            return
        self.times.append(event["at"])
        if event["event"] == "tokens":
            self.answers[name][event["index"]] += event["tokens"]
        else:
            self.ended[name], self.cached[name] = event["error"], event["cached"]

    @property
    def is_done(self) -> bool:
        return len(self.ended) == len(self.requests)

    @property
    def num_tokens(self) -> int:
        """That have come."""
        return sum(len(tokens) for each in self.answers.values() for tokens in each.values())

    @property
    def num_expected(self) -> int:
        """That come in all."""
        return sum(one.params.get("n", 1) * one.params["max_tokens"] for one in self.requests)

    def pause_after(self, moment: float) -> float:
        """Seconds of the longest silence that ended after a moment; zero where nothing came after it."""
        gaps = [later - earlier for earlier, later in itertools.pairwise(self.times) if later >= moment]
        return max(gaps, default=0.0)
