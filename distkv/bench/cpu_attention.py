"""`distkv bench cpu-attention`: decode of a context four times as long as the window of a simulated device, with shares
of the pages left to the CPU and links of several rates, beside what link and CPU give by themselves.

All variants of a link take turns and must sample the same tokens with the same logprobs; what crosses the link and what
the CPU attends to is counted.
"""

import random
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distkv.bench.decoder import Decoder, Variant, least_tokens
from distkv.bench.harness import Bench, Figure
from distkv.bench.offload import check_answers
from distkv.bench.options import BenchOptions
from distkv.config import EngineConfig
from distkv.errors import ConfigError, DistKVError
from distkv.kernels.native.library import load_best
from distkv.reporting.tables import Column
from distkv.storage.device import CpuDevice
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import is_hosts
from distkv.workers.bandwidth import host_attention_rate
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec
from distkv.workers.sizes import PoolSizes

WINDOWS = 4  # the context, in windows of the device
CPU_ALONE = "the CPU alone"
PROBE_PAGES = 64  # over which the CPU's rate is measured
SLACK_PAGES = 2  # the newest ones, which may be the host's and lie on the device as well

COLUMNS = [
    Column("link GB/s", "link", 1e-9, ".2f"),
    Column("share", "share"),
    Column("MB over the link", "streamed_bytes_per_step", 1e-6, ".1f"),
    Column("MB on the CPU", "attended_bytes_per_step", 1e-6, ".1f"),
    Column("ms per token", "decode_ms_per_token", form=".1f"),
    Column("tokens/s", "tokens_per_s", form=".2f"),
    Column("of the link alone", "link_tokens_per_s", form=".2f"),
    Column("of link + CPU", "both_tokens_per_s", form=".2f"),
    Column("reached", "reached", form=".0%"),
]


@dataclass(frozen=True)
class Sizes:
    """What is decoded."""

    model: Path  # whose config alone counts: weights are made up
    context: int  # tokens, in whole windows of whole pages
    new_tokens: int
    dtype: str
    page_size: int

    @property
    def spec(self) -> PageSpec:
        """Of the model's pages."""
        config = ModelConfig.load(self.model)
        return model_page_spec(config, self.page_size, config.run_dtype(self.dtype))

    @property
    def num_pages(self) -> int:
        """Of the context."""
        return self.context // self.page_size

    @property
    def window(self) -> int:
        """Pages of the device."""
        return self.num_pages // WINDOWS

    @property
    def cold_bytes(self) -> int:
        """Of the context, beside what fits on the device with the page that is being written."""
        return (self.num_pages - (self.window - 1)) * self.spec.page_bytes


class SharedDecoder(Decoder):
    """A `Decoder` whose CPU attends to a share of the pages."""

    def __init__(self, sizes: Sizes, link: int, share: str, num_threads: int | None):
        spec = sizes.spec
        variant = Variant(share, sizes.window, sizes.num_pages + 1, 0, sizes.num_pages - (sizes.window - 1))
        config = EngineConfig(
            sizes.model, device="simulated", link_bytes_per_second=link, cpu_attention=share, load_format="dummy",
            dtype=sizes.dtype, page_size=sizes.page_size, num_threads=num_threads, max_num_seqs=1,
            max_model_len=sizes.context + sizes.page_size, max_num_batched_tokens=sizes.page_size,
            device_kv_bytes=variant.device * spec.page_bytes, host_kv_bytes=variant.host * spec.page_bytes,
            enable_prefix_caching=False,
        )  # fmt: skip
        super().__init__(variant, config, sizes.cold_bytes)
        self.share = self._engine.info.host_share
        mine = sum(is_hosts(page, self.share) for page in range(sizes.num_pages)) if self.share else 0
        self.attended_bytes = mine * spec.page_bytes
        self._slack = SLACK_PAGES * spec.page_bytes

    def _check(self, before: dict[str, int], after: dict[str, int]) -> tuple[int, int]:
        moved = {route: count - before.get(route, 0) for route, count in after.items() if count != before.get(route, 0)}
        attended, streamed = moved.pop("host_attended", 0), moved.pop("host_streamed", 0)
        least = max(0, self.cold_bytes - self.attended_bytes)
        most = least + self._slack if self.share else least
        if attended != self.attended_bytes or not least <= streamed <= most or moved:
            raise DistKVError(
                f"share {self.variant.name}: a step streamed {streamed} bytes and the CPU attended to {attended} where "
                f"they must be {least} to {most} and {self.attended_bytes}, and moved {moved}; report it"
            )
        return streamed, 0


def run(sizes: Sizes, links: list[int], shares: list[str], num_threads: int | None, options: BenchOptions) -> None:
    """Measures and prints. Raises ConfigError for sizes that do not go together, DistKVError when answers differ or
    other bytes move than must."""
    _check_sizes(sizes)
    with Bench("cpu-attention", options, num_threads, **_facts(sizes)) as bench:
        for link in links:
            _measure(bench, sizes, link, ["off", *(one for one in shares if one != "off")], num_threads)
        bench.table(COLUMNS)
        rates = sorted(row["cpu_bytes_per_s"] / 1e9 for row in bench.rows)
        for line in (
            f"The context is {WINDOWS} windows of the device; {sizes.cold_bytes / 1e6:.1f} MB of it do not fit there.",
            "A ceiling is that many bytes at the rate of the link, or at that and the rate at which as many threads of "
            f"this CPU attend to pages and do nothing else, {rates[0]:.2f} to {rates[-1]:.2f} GB/s between the turns; "
            "products count in neither.",
            "The simulated device computes on cores of this CPU too: where its part takes longer than the link, that "
            "is the limit.",
            "All shares of a link drew the same tokens with the same logprobs, bit for bit.",
        ):
            bench.line(line)


def _measure(bench: Bench, sizes: Sizes, link: int, shares: list[str], num_threads: int | None) -> None:
    rng = random.Random(sizes.context)
    prompt = [rng.randrange(10, ModelConfig.load(sizes.model).vocab_size) for _ in range(sizes.context + 1)]
    with ExitStack() as stack:
        bench.doing("making the engines")
        decoders = [stack.enter_context(closing(SharedDecoder(sizes, link, one, num_threads))) for one in shares]
        works: dict[str, Callable[[], Any]] = {
            decoder.variant.name: partial(decoder.turn, prompt, sizes.new_tokens) for decoder in decoders
        }
        works[CPU_ALONE] = partial(_cpu_rate, sizes)
        # each turn has tokens that are not timed
        taken = bench.in_turns(works, f"link of {link / 1e9:g} GB/s", warm_up=0)
    rate = Figure.of(taken.pop(CPU_ALONE)).median
    answers = {f"{name}, turn {n}": turn.answer for name, turns in taken.items() for n, turn in enumerate(turns)}
    shortest = min(map(len, answers.values()))
    check_answers({name: answer[:shortest] for name, answer in answers.items()})
    for decoder in decoders:
        turns = taken[decoder.variant.name]
        seconds = Figure.of(second for turn in turns for second in turn.seconds)
        steps = sum(len(turn.seconds) for turn in turns)
        both = (link + rate) / sizes.cold_bytes
        bench.add(
            {
                "link": link, "share": decoder.share, "asked": decoder.variant.name,
                "streamed_bytes_per_step": sum(turn.host_bytes for turn in turns) / steps,
                "attended_bytes_per_step": decoder.attended_bytes,
                "decode_ms_per_token": seconds.scaled(1e3), "tokens_per_s": 1 / seconds.median,
                "cpu_bytes_per_s": rate, "link_tokens_per_s": link / sizes.cold_bytes, "both_tokens_per_s": both,
                "reached": 1 / seconds.median / both, "tokens_compared": shortest,
            }
        )  # fmt: skip


def _cpu_rate(sizes: Sizes) -> float:
    """Bytes per second at which the threads of this process attend to pages."""
    pools = KVPools(sizes.spec, PoolSizes(device=1, host=PROBE_PAGES), CpuDevice())
    with closing(pools):
        return host_attention_rate(load_best(), pools, ModelConfig.load(sizes.model).num_attention_heads)


def _facts(sizes: Sizes) -> dict[str, Any]:
    return {
        "model": sizes.model.name, "weights": "made up", "dtype": sizes.dtype, "context": sizes.context,
        "window": sizes.window * sizes.page_size, "page_size": sizes.page_size, "cold_bytes": sizes.cold_bytes,
    }  # fmt: skip


def _check_sizes(sizes: Sizes) -> None:
    whole = WINDOWS * sizes.page_size
    if sizes.context % whole or sizes.window < 2:
        raise ConfigError(
            f"context {sizes.context} is not {WINDOWS} windows of whole pages of {sizes.page_size} tokens, at least 2 "
            f"each; use {max(2, -(-sizes.context // whole)) * whole}"
        )
    if least_tokens(sizes.new_tokens) > sizes.page_size:
        raise ConfigError(
            f"warm-up and new-tokens take {least_tokens(sizes.new_tokens)} tokens and must stay within one page of "
            f"{sizes.page_size}; lower new-tokens or raise page-size"
        )
