"""Runs one request on an engine and takes down what happens meanwhile."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from distkv.engine.client import EngineClient
from distkv.engine.drive import next_tokens
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.engine.stats import EngineStats, PolicyStats

TIERS = ("device", "host", "disk")
POLL_SECONDS = 0.1  # between questions to an engine that runs by itself
CALM_SECONDS = 1.0  # before the first token, when asking ends so that its time is not missed
KEEP_SECONDS = 0.01  # least time between samples of the fill that are kept
SAMPLES_KEPT = 200  # about so many in the first seconds, and as many again whenever the time grows e-fold


@dataclass(frozen=True)
class Sample:
    """The cache at one moment."""

    seconds: float  # since the request was queued
    tokens: int  # of the context that have been filled, and of the answer
    new_tokens: int  # of the answer; 0 during the fill
    in_fill: bool  # the request waits for its first token
    pages_in_use: int  # distinct ones
    pages: dict[str, int]  # by tier; one that lies in several counts for each
    bytes_moved: dict[str, int]  # bytes by route since the engine started, see `EngineStats`

    @property
    def streamed(self) -> int:
        """Bytes that passed through the staging ring so far."""
        return sum(count for route, count in self.bytes_moved.items() if route.endswith("_streamed"))


@dataclass(frozen=True)
class Stage:
    """One request from its queueing to its last token."""

    request: EngineRequest
    outputs: list[TokenOutput]
    times: list[float]  # seconds at which each token came, since the request was queued
    samples: list[Sample]  # during the fill now and then, and after each token
    policy: PolicyStats  # of this request alone

    @property
    def context(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def fill_seconds(self) -> float:
        """To the first token."""
        return self.times[0]

    @cached_property
    def decode_ms(self) -> list[float]:
        """Milliseconds of each token after the first."""
        return [1e3 * (later - earlier) for earlier, later in pairwise(self.times)]

    @property
    def full(self) -> Sample:
        """The last moment before the request ended and gave up its pages."""
        return next((sample for sample in reversed(self.samples) if sample.pages_in_use), self.samples[-1])

    @property
    def bytes_moved(self) -> dict[str, int]:
        """Bytes by route during this request."""
        before, after = self.samples[0].bytes_moved, self.samples[-1].bytes_moved
        return {route: count - before.get(route, 0) for route, count in after.items() if count != before.get(route, 0)}

    @property
    def streamed_per_step(self) -> int:
        """Bytes that a decode step streamed; the median of the steps."""
        decoding = [sample for sample in self.samples if sample.new_tokens]
        return int(statistics.median_low(later.streamed - earlier.streamed for earlier, later in pairwise(decoding)))

    @property
    def cold_pages(self) -> int:
        """Pages below the device alone at a decode step; the median of the steps."""
        decoding = [sample for sample in self.samples if sample.new_tokens and sample.pages_in_use] or [self.full]
        return int(statistics.median_low(sample.pages_in_use - sample.pages["device"] for sample in decoding))


def run_stage(engine: EngineClient, request: EngineRequest, watch: Callable[[Sample], None]) -> Stage:
    """Runs a request alone; `watch` is called at each step or some times a second, and at each token.

    An engine in this process runs a step when it is asked to, and one on a cluster runs by itself and says nothing
    until a token is there; so its state is asked for meanwhile. Raises as `EngineClient` does, and what a request that
    cannot go on has failed with.
    """
    runs_by_itself = not isinstance(engine, Engine)
    outputs: list[TokenOutput] = []
    times: list[float] = []
    samples: list[Sample] = []
    before = engine.stats().policy
    start = time.perf_counter()

    def poll(keep: bool) -> Sample:
        stats = engine.stats()
        sample = _sample(stats, time.perf_counter() - start, request, len(outputs), engine.info.page_size)
        if keep or sample.seconds - samples[-1].seconds > max(KEEP_SECONDS, sample.seconds / SAMPLES_KEPT):
            samples.append(sample)
        watch(sample)
        return sample

    poll(keep=True)
    engine.add([request])
    latest = poll(keep=False)
    while len(outputs) < request.max_tokens:
        if runs_by_itself and _seconds_left(latest, len(request.prompt_token_ids)) > CALM_SECONDS:
            time.sleep(POLL_SECONDS)
            latest = poll(keep=False)
            continue
        for output in next_tokens(engine):
            outputs.append(output)
            times.append(time.perf_counter() - start)
            latest = poll(keep=True)
        if not outputs and not runs_by_itself:
            latest = poll(keep=False)
    after = engine.stats().policy
    names = PolicyStats.__struct_fields__
    policy = PolicyStats(**{name: getattr(after, name) - getattr(before, name) for name in names})
    return Stage(request, outputs, times, samples, policy)


def _seconds_left(sample: Sample, context: int) -> float:
    """Seconds of the fill, if it goes on as it has so far; at the start nobody knows, which counts as long."""
    if not sample.in_fill:
        return 0.0
    return sample.seconds * (context - sample.tokens) / sample.tokens if sample.tokens else float("inf")


def _sample(stats: EngineStats, seconds: float, request: EngineRequest, new_tokens: int, page_size: int) -> Sample:
    filled = min(len(request.prompt_token_ids), stats.pages_in_use * page_size)
    return Sample(
        seconds=seconds,
        tokens=len(request.prompt_token_ids) + new_tokens if new_tokens else filled,
        new_tokens=new_tokens,
        in_fill=not new_tokens and bool(stats.num_running or stats.num_waiting),
        pages_in_use=stats.pages_in_use,
        pages={tier: getattr(stats, f"{tier}_pages") for tier in TIERS},
        bytes_moved=stats.bytes_moved,
    )
