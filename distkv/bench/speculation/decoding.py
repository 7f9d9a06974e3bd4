"""An engine that drafts, whose context lies below the device in part, and the time that its answers take."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from distkv.bench.ceilings import bytes_from_disk, flush
from distkv.bench.decoder import ColdPageCache
from distkv.bench.speculation.tasks import Prompt
from distkv.config import EngineConfig
from distkv.engine.drive import drain, drive
from distkv.engine.protocol import EngineRequest
from distkv.engine.stats import EngineStats, SpeculationStats
from distkv.launch.launch import launch
from distkv.sampling_params import SamplingParams
from distkv.speculative_config import MAX_DRAFT
from distkv.storage.disk.page_arrays import ARRAY
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec

NO_LIMIT = 2**62  # bytes, so that no step leaves the sequence out
STEP_TOKENS = 2048  # the most of a step, as an engine has it unless told otherwise
SEED = 3  # of what is sampled


@dataclass(frozen=True)
class Place:
    """Where the context lies."""

    tier: str  # host or disk, below the device
    share: int  # percent of the context's pages that lie there

    @property
    def name(self) -> str:
        return f"{self.share} % on {self.tier}" if self.share else "all on device"


@dataclass(frozen=True)
class Decoded:
    """One answer, from its first token on, which is the prompt's: that one is not timed."""

    tokens: list[int]
    seconds: float
    num_steps: int
    host_bytes: int  # that were streamed in all these steps, from each tier
    disk_bytes: int
    bytes_from_disk: int | None  # of these, those that the page cache did not have
    speculation: SpeculationStats

    @property
    def timed_tokens(self) -> int:
        """All but the first."""
        return len(self.tokens) - 1


class SpeculatingEngine:
    """One engine for answers with drafts and without: a request may go without, so that both find their pages in the
    same places. A context manager."""

    def __init__(
        self, model: Path, place: Place, method: str, context: int, answer: int, page_size: int, dtype: str,
        num_threads: int | None, folder: Path,
    ):  # fmt: skip
        """
        Args:
            context: tokens that all prompts begin with, whole pages.
            answer: the most tokens behind them, of question and answer.
            folder: for pages on disk.
        """
        config = ModelConfig.load(model)
        spec = model_page_spec(config, page_size, config.run_dtype(dtype))
        pages, rest = context // page_size, spec.pages_for(answer)
        cold = round(pages * place.share / 100)
        device = pages - cold + rest
        options: dict[str, Any] = {"host_kv_bytes": 0}
        if cold:
            options["host_kv_bytes"] = (1 if place.tier == "disk" else pages + rest) * spec.page_bytes
        if cold and place.tier == "disk":
            options |= {"disk_kv_bytes": (pages + rest + MAX_DISK_WRITES) * spec.page_bytes, "cache_dir": folder}
        self._page_cache = ColdPageCache()
        self.place = place
        self._engine = launch(
            EngineConfig(
                model, dtype=dtype, page_size=page_size, num_threads=num_threads, max_num_seqs=MAX_DRAFT + 1,
                max_num_batched_tokens=min(STEP_TOKENS, (device - 1) * page_size), max_model_len=context + answer,
                max_cold_bytes_per_step=NO_LIMIT if cold else None,
                device_kv_bytes=device * spec.page_bytes, speculative_config={"method": method},
                **options,
            ),
            observer=self._page_cache,
        )  # fmt: skip

    def answer(self, prompt: Prompt, num_tokens: int, drafts: bool) -> Decoded:
        """Has a prompt answered with drafts or without, the page cache dropped before each step where pages lie on
        disk."""
        params = SamplingParams(
            temperature=prompt.task.temperature, ignore_eos=True, num_speculative_tokens=None if drafts else 0
        )
        self._page_cache.files = []
        if self.place.tier == "disk" and self._engine.info.cache_dir is not None:
            self._page_cache.files = sorted((Path(self._engine.info.cache_dir) / ARRAY).glob("c.*"))
            flush(self._page_cache.files)
        tokens: list[int] = []
        start, steps = 0.0, 0
        before, dropping, fetched = self._engine.stats(), 0.0, bytes_from_disk()
        for outputs in drive(self._engine, [EngineRequest("0", prompt.token_ids, params, num_tokens, SEED)]):
            if not outputs:
                continue
            if not tokens:
                start, before, fetched = time.perf_counter(), self._engine.stats(), bytes_from_disk()
                dropping = self._page_cache.seconds
            else:
                steps += 1
            tokens += [output.token_id for output in outputs]
        seconds = time.perf_counter() - start - (self._page_cache.seconds - dropping)
        after, now = self._engine.stats(), bytes_from_disk()
        self._page_cache.files = []
        drain(self._engine)
        host, disk = (
            after.bytes_moved.get(route, 0) - before.bytes_moved.get(route, 0)
            for route in ("host_streamed", "disk_streamed")
        )
        read = None if fetched is None or now is None else now - fetched
        return Decoded(tokens, seconds, steps, host, disk, read, _between(before, after))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()


def _between(before: EngineStats, after: EngineStats) -> SpeculationStats:
    """What was drafted between two readings."""
    first, last = before.speculation, after.speculation
    return SpeculationStats(
        last.num_drafts - first.num_drafts,
        last.num_draft_tokens - first.num_draft_tokens,
        last.num_accepted_tokens - first.num_accepted_tokens,
    )
