"""Counts what becomes of requests, where it happens; the engine's thread alone uses it."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

from distkv.engine.protocol import EngineRequest
from distkv.engine.sequence import Sequence
from distkv.engine.stats import Histogram, RequestStats
from distkv.storage.tier import Tier

TIERS = tuple(tier.name.lower() for tier in Tier)
REASONS = ("stop", "length", "abort", "error")

# vLLM's bounds, with finer ones below where a CPU with a small model is, and coarser ones above for streamed contexts
TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))


class Distribution:
    """A `Histogram` that grows."""

    def __init__(self, bounds: tuple[float, ...]):
        self.listener: Callable[[float], None] | None = None  # is told each value too
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Takes one more value in."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self._total += value
        if self.listener is not None:
            self.listener(value)

    def taken(self) -> Histogram:
        """All values so far."""
        return Histogram(self.bounds, tuple(self._counts), self._total)


class RequestMeter:
    """Is told of each stage of a request, or of an answer of it."""

    def __init__(self) -> None:
        self.distributions = {
            "time_to_first_token": Distribution(FIRST_TOKEN_SECONDS),
            "inter_token_latency": Distribution(TOKEN_SECONDS),
            "e2e_latency": Distribution(REQUEST_SECONDS),
            "queue_time": Distribution(REQUEST_SECONDS),
            "prefill_time": Distribution(REQUEST_SECONDS),
            "decode_time": Distribution(REQUEST_SECONDS),
            "prompt_length": Distribution(TOKENS),
            "answer_length": Distribution(TOKENS),
        }
        self._now = 0.0  # when the tokens came that are being told
        self._inter_token = self.distributions["inter_token_latency"]
        self._prompt_tokens = self._generation_tokens = self._prefix_queries = 0
        self._prefix_hits = Counter(dict.fromkeys(TIERS, 0))
        self._prefix_recomputed = 0
        self._finished = Counter(dict.fromkeys(REASONS, 0))

    def admitted(self, sequence: Sequence, num_passed_over: int) -> None:
        """A request begins to run for the first time, with what was found of its prompt.

        Args:
            num_passed_over: pages that were found behind those and are computed again.
        """
        self._prefix_recomputed += num_passed_over * sequence.table.page_size
        sequence.admitted_at = time.perf_counter()
        if sequence.root is not None:
            self._prefix_queries += sequence.num_to_read
            for tier, count in zip(TIERS, sequence.num_cached, strict=True):
                self._prefix_hits[tier] += count

    def refused(self, request: EngineRequest) -> None:
        """A request cannot run, which was found when it came."""
        self._finished["error"] += request.params.n

    def began(self, sequence: Sequence) -> None:
        """The first tokens of all answers of a request are there, which are not forked yet."""
        sequence.has_begun = True
        self._prompt_tokens += sequence.prompt_len

    def tick(self) -> None:
        """The tokens of a step have come."""
        self._now = time.perf_counter()

    def sampled(self, sequence: Sequence) -> None:
        """An answer goes on by a token. Of several tokens of one step, those behind the first have no time of their
        own."""
        now = self._now
        self._generation_tokens += 1
        if now == sequence.last_token_at:
            return
        if sequence.last_token_at:
            self._inter_token.add(now - sequence.last_token_at)
        else:
            sequence.first_token_at = now
            self.distributions["time_to_first_token"].add(now - sequence.arrived_at)
        sequence.last_token_at = now

    def ended(self, sequence: Sequence, reason: str) -> None:
        """An answer has ended, or all that a sequence stands for; what was cut off says nothing of times."""
        self._finished[reason] += 1 if sequence.has_begun else sequence.num_answers
        if reason not in ("stop", "length"):
            return
        for name, value in (
            ("e2e_latency", sequence.last_token_at - sequence.arrived_at),
            ("queue_time", sequence.admitted_at - sequence.arrived_at),
            ("prefill_time", sequence.first_token_at - sequence.admitted_at),
            ("decode_time", sequence.last_token_at - sequence.first_token_at),
            ("prompt_length", sequence.prompt_len),
            ("answer_length", sequence.num_output_tokens),
        ):
            self.distributions[name].add(value)

    def stats(self) -> RequestStats:
        """All since the start."""
        return RequestStats(
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=dict(self._prefix_hits),
            prefix_recomputed=self._prefix_recomputed,
            finished=dict(self._finished),
            **{name: values.taken() for name, values in self.distributions.items()},
        )
