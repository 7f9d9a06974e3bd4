"""`distkv bench disk-codec`: what each way of storing pages on disk takes, and how fast they come back.

A model reads a real text, whose pages are written once for each codec. They are read back in the order of a step, layer
by layer over all pages: by one thread, as an engine on a CPU does, and by several, as one on a GPU does.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distkv.bench.ceilings import bytes_from_disk, drop_page_cache, flush
from distkv.bench.harness import Bench, Figure
from distkv.bench.options import BenchOptions
from distkv.bench.prompts import Prompts
from distkv.errors import ConfigError, DistKVError
from distkv.llm import LLM
from distkv.reporting.out_file import temporary_folder
from distkv.reporting.tables import Column
from distkv.sampling_params import SamplingParams
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.disk.disk_array import make_array
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.dtypes import torch_dtype
from distkv.storage.moving.read_ahead import READ_THREADS
from distkv.storage.page_spec import DISK_CODECS, PageSpec
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.host_memory import as_integers
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec

COLUMNS = [
    Column("codec", "codec"),
    Column("of its size", "share", form=".3f"),
    Column("encode GB/s", "encode_gb_per_s", form=".2f"),
    Column("from memory GB/s", "cached_gb_per_s", form=".2f"),
    Column("from disk GB/s", "disk_gb_per_s", form=".2f"),
    Column(f"in {READ_THREADS} threads", "threads_gb_per_s", form=".2f"),
    Column("MB from disk", "bytes_from_disk", 1e-6, ".1f"),
]


def run(
    model: Path, context: int, text: Path | None, dtype: str, page_size: int, num_threads: int | None,
    cache_dir: Path | None, options: BenchOptions,
) -> None:  # fmt: skip
    """Measures and prints a table; see `distkv bench disk-codec --help`. Raises ConfigError for a text or a
    context that cannot be used, DistKVError when a bit does not come back."""
    tokens, source = _tokens(model, context, text)
    config = ModelConfig.load(model)
    spec = model_page_spec(config, page_size, config.run_dtype(dtype))
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder(cache_dir))
        bench = Bench(
            "disk-codec", options, num_threads, model=model.name, dtype=spec.dtype, context=context, text=source,
            page_size=page_size, kv_bytes=context * spec.bytes_per_token,
        )  # fmt: skip
        stack.enter_context(bench)
        bench.doing("reading the text")
        pages = _pages(model, tokens, spec, num_threads, folder / "engine")
        stored = [_Stored(replace(spec, disk_codec=codec), folder / codec, pages) for codec in DISK_CODECS]
        _measure(bench, stored)
        bench.table(COLUMNS)
        bench.line("GB/s are of KV as it is used, whatever the disk gives for it; every bit came back.")
        bench.line(_verdict(*bench.rows))


def _tokens(model: Path, context: int, text: Path | None) -> tuple[list[int], str]:
    """Of a text, from its beginning, and whose it is."""
    prompts = Prompts(model)
    if text is None:
        return prompts.text(context), prompts.source
    tokens = prompts.file(text)
    if len(tokens) < context:
        raise ConfigError(f"--text {str(text)!r} has {len(tokens)} tokens; use a longer one, or a shorter --context")
    return tokens[:context], text.name


def _pages(model: Path, tokens: list[int], spec: PageSpec, num_threads: int | None, cache_dir: Path) -> list[Tensor]:
    """The keys and values of the text, as an engine keeps them."""
    num_pages = spec.pages_for(len(tokens))
    if len(tokens) != num_pages * spec.page_size:
        raise ConfigError(
            f"--context {len(tokens)} is not a whole number of pages of {spec.page_size} tokens; use "
            f"{num_pages * spec.page_size}"
        )
    size = (num_pages + 1) * spec.page_bytes
    with LLM(
        model, dtype=spec.dtype, page_size=spec.page_size, num_threads=num_threads, max_num_seqs=1, cache_dir=cache_dir,
        max_model_len=len(tokens) + 1, device_kv_bytes=size, host_kv_bytes=size, disk_kv_bytes=size,
    ) as llm:  # fmt: skip
        llm.generate([tokens], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
        folder = Path(llm.info.cache_dir or "")
    with closing(Catalogue(folder, read_only=True)) as catalogue:
        entries = sorted(catalogue.entries(), key=lambda entry: entry.index)
    assert len(entries) == num_pages
    pool = DiskPool(spec, folder, num_pages + 1, DiskShare.of_all(spec))
    pool.adopt({entry.slot: entry.crc32c for entry in entries})
    pages = [torch.empty(spec.page_shape, dtype=torch_dtype(spec.dtype)) for _ in entries]
    for entry, page in zip(entries, pages, strict=True):
        pool.load(entry.slot, page)
    return pages


class _Stored:
    """All pages in files of one codec."""

    def __init__(self, spec: PageSpec, folder: Path, pages: list[Tensor]):
        """Raises DistKVError when a bit of what is read back is not as it was."""
        make_array(folder, spec, len(pages))
        self.pool = DiskPool(spec, folder, len(pages), DiskShare.of_all(spec))
        self.num_bytes = len(pages) * spec.page_bytes
        self.spec, self._pages = spec, pages
        found = torch.empty_like(pages[0])
        for slot, page in enumerate(pages):
            self.pool.store(slot, page)
            self.pool.load(slot, found)
            if not np.array_equal(as_integers(found), as_integers(page)):  # a NaN is not equal to itself
                raise DistKVError(f"page {slot} is not what it was when it was stored as {spec.disk_codec}; report it")
        self.files = [Path(name) for slot in range(len(pages)) for name in self.pool.files(slot)]
        self.file_bytes = sum(file.stat().st_size for file in self.files)
        self.share = self.file_bytes / self.num_bytes
        flush(self.files)

    def works(self) -> dict[str, Callable[[], "_Turn"]]:
        """What is measured, by the beginning of the row's field."""
        return {
            "encode": self._encode,
            "cached": partial(self._read, 1, is_cached=True),  # by the one who wrote or read the files before
            "disk": partial(self._read, 1),
            "threads": partial(self._read, READ_THREADS),
        }

    def _encode(self) -> "_Turn":
        """Makes the content of all files, without writing it."""
        start = perf_counter()
        for page in self._pages:
            bits = as_integers(page)
            for head in range(self.spec.num_kv_heads):
                self.pool.codec.encode(bits[:, :, head])
        return _Turn(perf_counter() - start)

    def _read(self, num_threads: int, is_cached: bool = False) -> "_Turn":
        """Reads all pages, layer by layer."""
        slots = range(len(self._pages))
        jobs = [(index, layer) for layer in range(self.spec.num_layers) for index in slots]
        outs = [torch.empty(self.spec.slice_shape, dtype=torch_dtype(self.spec.dtype)) for _ in range(num_threads)]
        if not is_cached:
            drop_page_cache(self.files)
        before, start = bytes_from_disk(), perf_counter()
        with self.pool.open(slots) as opened, ThreadPoolExecutor(num_threads) as threads:

            def work(number: int) -> None:
                parts = self.pool.parts(outs[number])
                for index, layer in jobs[number::num_threads]:
                    opened.read(index, layer, parts)

            list(threads.map(work, range(num_threads)))
        seconds, after = perf_counter() - start, bytes_from_disk()
        return _Turn(seconds, None if before is None or after is None else after - before)


@dataclass(frozen=True)
class _Turn:
    """What one turn took."""

    seconds: float
    from_disk: int | None = None  # bytes that the page cache did not have


def _measure(bench: Bench, stored: list[_Stored]) -> None:
    works = {f"{one.spec.disk_codec}, {name}": work for one in stored for name, work in one.works().items()}
    taken = bench.in_turns(works)
    for one in stored:
        row: dict[str, Any] = {"codec": one.spec.disk_codec, "file_bytes": one.file_bytes, "share": one.share}
        for name in one.works():
            turns = taken[f"{one.spec.disk_codec}, {name}"]
            seconds = Figure.of(turn.seconds for turn in turns)
            row[f"{name}_gb_per_s"] = seconds.rate(one.num_bytes).scaled(1e-9)
            fetched = [turn.from_disk for turn in turns if turn.from_disk is not None]
            if name == "disk":
                row["bytes_from_disk"] = Figure.of(fetched) if fetched else None
        bench.add(row)


def _verdict(plain: dict[str, Any], packed: dict[str, Any]) -> str:
    alone, together = (packed[field].median / plain[field].median for field in ("disk_gb_per_s", "threads_gb_per_s"))
    # of a disk that takes as long for the bytes that are saved as decoding takes, where one waits for the other:
    # share / rate + 1 / decode = 1 / rate
    rate = (1 - packed["share"]) * packed["cached_gb_per_s"].median
    return (
        f"From this disk lossless brings KV {alone:.2f} times as fast as none in one thread, and {together:.2f} times "
        f"in {READ_THREADS}. It pays where a disk gives a thread less than about {rate:.2f} GB/s."
    )
