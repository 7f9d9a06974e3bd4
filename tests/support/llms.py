"""Whole LLMs over tiers of a few pages of the tiny model."""

import time
from pathlib import Path
from typing import Any

from distkv import LLM
from distkv.engine.engine import Engine

PAGE_SIZE, PAGE_BYTES = 16, 8192  # of the tiny model in fp32
OPTIONS: dict[str, Any] = {"page_size": PAGE_SIZE, "max_num_batched_tokens": 32, "max_num_seqs": 4}


def idle_engine(llm: LLM) -> Engine:
    """The engine of an LLM without requests, once it has nothing left to do and may be called from here."""
    engine = llm._engine
    assert isinstance(engine, Engine)
    while llm.stats() and engine.has_work:  # stats come after the commands that were given before
        time.sleep(0.001)
    return engine


def tiered_options(pages: tuple[int, int, int], cache_dir: Path | None = None, **options: Any) -> dict[str, Any]:
    """The options of an LLM with so many pages on device, host and disk. JSON can carry them to another process."""
    sizes: dict[str, Any] = {"device_kv_bytes": pages[0] * PAGE_BYTES, "host_kv_bytes": pages[1] * PAGE_BYTES}
    if pages[2]:
        sizes |= {"cache_dir": str(cache_dir), "disk_kv_bytes": pages[2] * PAGE_BYTES}
    return OPTIONS | sizes | options


def tiered(folder: Path, pages: tuple[int, int, int], cache_dir: Path | None = None, **options: Any) -> LLM:
    """An LLM with `tiered_options`."""
    return LLM(folder, **tiered_options(pages, cache_dir, **options))
