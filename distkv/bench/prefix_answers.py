"""One question answered, by an engine that is there or by a process that begins with nothing but a cache folder."""

import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from distkv.bench.ceilings import bytes_from_disk, drop_page_cache
from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.drive import drain, drive
from distkv.engine.protocol import EngineRequest
from distkv.launch.launch import launch
from distkv.sampling_params import SamplingParams

WARM_UP = 128  # tokens; fewer would tell the engine nothing of how fast it reads prompts, see `Rank`


@dataclass(frozen=True)
class Answered:
    """One request."""

    seconds: float  # from adding it to its first token
    tokens: list[int]
    cached: tuple[int, int, int]  # tokens of the prompt that were found on device, host and disk
    recomputed: int  # tokens that were found too, and computed again since that was faster
    bytes_from_disk: int | None  # up to the first token, those that the page cache did not have


def answer(engine: EngineClient, prompt: list[int], num_tokens: int, salt: str | None) -> Answered:
    """Has a prompt answered greedily, and waits until what is to be saved is saved."""
    params = SamplingParams(temperature=0, ignore_eos=True)
    tokens: list[int] = []
    seconds, cached, from_disk = 0.0, (0, 0, 0), None
    before, recomputed = bytes_from_disk(), _recomputed(engine)
    start = time.perf_counter()
    for outputs in drive(engine, [EngineRequest("0", prompt, params, num_tokens, 0, cache_salt=salt)]):
        if outputs and not tokens:
            seconds = time.perf_counter() - start
            now = bytes_from_disk()
            cached, from_disk = outputs[0].num_cached_tokens, None if before is None or now is None else now - before
        tokens += [output.token_id for output in outputs]
    drain(engine)
    return Answered(seconds, tokens, cached, _recomputed(engine) - recomputed, from_disk)


def _recomputed(engine: EngineClient) -> int:
    return engine.stats().requests.prefix_recomputed


def warm_up(engine: EngineClient, prompt: list[int]) -> None:
    """With a short prompt of its own, which fills no page."""
    answer(engine, prompt[-min(WARM_UP, engine.info.page_size // 2) :], 4, "warm-up")


def answer_in_new_process(config: EngineConfig, files: list[Path], prompt: list[int], num_tokens: int) -> Answered:
    """The same by an engine in a process of its own, which has the page cache forget the files beforehand."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_die_of_interrupts) as process:
        # blocked there too, until the initializer runs
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            answering = process.submit(_answer_after_restart, config, files, prompt, num_tokens)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return answering.result()


def _answer_after_restart(config: EngineConfig, files: list[Path], prompt: list[int], num_tokens: int) -> Answered:
    """To be run by a new process: loads the model, warms up with another prompt, has the page cache forget the files,
    and answers."""
    with closing(launch(config)) as engine:
        warm_up(engine, prompt)
        drop_page_cache(files)
        return answer(engine, prompt, num_tokens, None)


def _die_of_interrupts() -> None:
    """Has Ctrl-C, which all processes of a terminal get, end this one without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
