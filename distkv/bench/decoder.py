"""An engine that decodes one request after another over tiers of given sizes, and is timed.

An engine starts its next step before it returns the tokens of the last one. So a token's time is that since the token
before it, whoever calls; each turn is a request of its own, after whose end nothing is left to do while others have
their turn; and the page cache is dropped between two steps, not beside one.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from distkv.bench.ceilings import bytes_from_disk, drop_page_cache, flush
from distkv.config import EngineConfig
from distkv.engine.drive import drain, next_tokens
from distkv.engine.observer import StepObserver
from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.engine.step import Step
from distkv.errors import CapacityError, DistKVError, StoreError
from distkv.launch.launch import launch
from distkv.sampling_params import SamplingParams
from distkv.storage.disk.page_arrays import ARRAY
from distkv.workers.sampling.sampled_token import TokenLogprobs

WARM_UP = 4  # tokens decoded before those that count, at least
PAUSE = 0.1  # seconds after each of them, in which pages go to the tier where they will stay
SEED = 1


@dataclass(frozen=True)
class Variant:
    """Where the context lies; sizes in pages."""

    name: str
    device: int
    host: int
    disk: int
    cold_pages: int  # of the context: all that are not on the device


Answer = list[tuple[int, TokenLogprobs | None]]
"""Tokens and their log-probabilities."""


@dataclass(frozen=True)
class Turn:
    """One variant's turn: the seconds of each step, and the bytes of all steps together."""

    answer: Answer  # with the tokens that are not timed
    seconds: list[float]
    host_bytes: int
    disk_bytes: int
    stored_bytes: int  # that files gave for disk_bytes, less where they are compressed
    bytes_from_disk: int | None  # of these, those that the page cache did not have


class ColdPageCache(StepObserver):
    """Has the page cache forget the files of the disk tier when a step has ended and the next one has not begun."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.seconds = 0.0  # that this took, all in all

    def reported(self, step: Step) -> None:
        start = time.perf_counter()
        drop_page_cache(self.files)
        self.seconds += time.perf_counter() - start


class Decoder:
    """One engine that decodes a request in each turn, whose context is random keys and values."""

    def __init__(self, variant: Variant, config: EngineConfig, cold_bytes: int, drops_page_cache: bool = True):
        """`cold_bytes` is what a step has to stream; `drops_page_cache` has it come from the disk itself."""
        self.variant = variant
        self.cold_bytes = cold_bytes
        self._drops_page_cache = drops_page_cache
        self._page_cache = ColdPageCache()
        self._engine = launch(config, observer=self._page_cache)
        cache_dir = self._engine.info.cache_dir
        self._array = None if cache_dir is None else Path(cache_dir) / ARRAY

    @property
    def files(self) -> list[Path]:
        """Of the disk tier, once it has had a turn."""
        return self._page_cache.files

    def turn(self, prompt: list[int], new_tokens: int) -> Turn:
        """Makes the context, decodes until every page lies where it stays, and times so many tokens.

        Raises DistKVError when a step streams other bytes than it has to, moves others, or brings no token.
        """
        name, page_size = self.variant.name, self._engine.info.page_size
        params = SamplingParams(temperature=0, max_tokens=page_size, ignore_eos=True, logprobs=1)
        self._page_cache.files = []
        self._engine.add([EngineRequest("0", prompt, params, page_size, SEED, synthetic_kv_seed=SEED)])
        answer: Answer = []
        while len(answer) < 1 + WARM_UP or not self._is_settled(len(prompt) // page_size):
            answer += self._step()
            if answer:
                time.sleep(PAUSE)
            if len(answer) + 1 + new_tokens > page_size:
                raise DistKVError(f"{name}: pages are still on their way after {len(answer)} tokens; raise page-size")
        if self._array is not None and self._drops_page_cache:
            self._page_cache.files = sorted(self._array.glob("c.*"))
            flush(self.files)
        answer += self._step()  # that of a step which ran in the last pause
        seconds, host_bytes, disk_bytes = [], 0, 0
        read_before = self._engine.stats().disk_read_bytes
        start, last, dropping = bytes_from_disk(), time.perf_counter(), self._page_cache.seconds
        for _ in range(new_tokens):
            before = self._engine.stats().bytes_moved
            tokens = self._step()
            now = time.perf_counter()
            seconds.append(now - last - (self._page_cache.seconds - dropping))
            last, dropping = now, self._page_cache.seconds
            if len(tokens) != 1:
                raise DistKVError(f"{name}: a page could not be read and was computed again; see the log")
            answer += tokens
            host, disk = self._check(before, self._engine.stats().bytes_moved)
            host_bytes, disk_bytes = host_bytes + host, disk_bytes + disk
        end, stored_bytes = bytes_from_disk(), self._engine.stats().disk_read_bytes - read_before
        self._engine.abort([("0", None)])
        drain(self._engine)
        fetched = None if start is None or end is None else end - start
        return Turn(answer, seconds, host_bytes, disk_bytes, stored_bytes, fetched)

    def _check(self, before: dict[str, int], after: dict[str, int]) -> tuple[int, int]:
        """The bytes that a step has streamed from host and disk. Raises DistKVError where they are not what they must
        be."""
        return check_streamed(self.variant.name, before, after, self.cold_bytes)

    def _is_settled(self, num_pages: int) -> bool:
        """Whether all full pages of the context have reached the lowest tier: then nothing is left to move."""
        stats = self._engine.stats()
        if self.variant.disk:
            return stats.disk_pages == num_pages and not stats.host_pages
        return not self.variant.host or stats.host_pages == num_pages

    def close(self) -> None:
        self._engine.close()

    def _step(self) -> Answer:
        """The tokens of one more step."""
        try:
            tokens: list[TokenOutput] = next_tokens(self._engine)
        except (StoreError, CapacityError) as error:  # what a request fails with
            raise DistKVError(f"{self.variant.name}: {type(error).__name__}: {error}") from error
        return [(token.token_id, token.logprobs) for token in tokens]


def least_tokens(new_tokens: int) -> int:
    """Of a turn's answer: the first one, the warm-up, one more, and those that are timed."""
    return 1 + WARM_UP + 1 + new_tokens


def check_streamed(name: str, before: dict[str, int], after: dict[str, int], expected: int) -> tuple[int, int]:
    """Bytes that reached attention from host and disk between two readings of `EngineStats.bytes_moved`.

    Raises DistKVError unless they are what a step had to stream, and nothing else moved.
    """
    moved = {route: count - before.get(route, 0) for route, count in after.items() if count != before.get(route, 0)}
    host, disk = (moved.pop(f"{tier}_streamed", 0) for tier in ("host", "disk"))
    if host + disk != expected:
        raise DistKVError(f"{name}: a step streamed {host + disk} bytes and its cold tokens take {expected}; report it")
    if moved:
        raise DistKVError(f"{name}: pages moved between tiers in a step that was timed, bytes {moved}; report it")
    return host, disk
