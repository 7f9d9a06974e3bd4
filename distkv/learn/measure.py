"""What the report shows, measured one benchmark after the other."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from distkv.bench import cache, gqa, offload, paging
from distkv.bench.harness import Bench
from distkv.bench.options import BenchOptions
from distkv.errors import DistKVError
from distkv.launch.this_machine import measured_cpu
from distkv.planner.hardware import GPUS, Hardware
from distkv.planner.model_shape import find_model
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest
from distkv.workers.model.model_config import ModelConfig

PLANNED_MODEL, PLANNED_GPU = "llama-3-8b", "h100"
PLANNED_CONTEXTS = (4096, 32768, 131072)
HOST_BYTES = 2**38  # of the planned machine
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Sizes:
    """Of the benchmarks; tokens, if nothing else is said."""

    lengths: tuple[int, ...] = (32, 64, 128, 256)  # that are made with and without a cache
    requests: int = 64  # that are served with pages and without; a number
    max_model_len: int = 2048  # of these
    gqa_context: int = 8192
    gqa_shape: str = "small"  # random weights, since a model has the KV heads that it has
    offload_context: int = 4096
    offload_tokens: int = 32
    page_size: int = 64  # of all but offload, whose answers stay within a page of the engine's own size
    offload_page_size: int = 256

    def within(self, positions: int) -> "Sizes":
        """The same for a model of so many positions."""
        page = self.offload_page_size
        return replace(
            self,
            max_model_len=min(self.max_model_len, positions),
            offload_context=min(self.offload_context, (positions // page - 1) * page),
        )


QUICK = Sizes((16, 32, 64), requests=24, max_model_len=512, gqa_context=2048, offload_context=1024, offload_tokens=8)


@dataclass(frozen=True)
class Planned:
    """PLANNED_MODEL on PLANNED_GPU at one context."""

    context: int
    on_device: Plan  # for as many requests as fit there
    with_host: Plan  # for as many as fit there and into HOST_BYTES


@dataclass(frozen=True)
class Measured:
    """Facts and rows of each benchmark; and plans, which are computed."""

    cache: Bench
    paging: Bench
    gqa: Bench
    offload: Bench
    planned: list[Planned]
    here: Plan  # of the measured model on this machine's CPU
    hardware: Hardware  # that CPU, as probes measure it


def measure(
    model: Path, sizes: Sizes, num_threads: int | None, options: BenchOptions, say: Callable[[str], None]
) -> Measured:
    """Runs everything; `say` is told what begins. Raises DistKVError when a benchmark finds something wrong: a report
    explains nothing with figures that are not right."""
    quiet = Console(quiet=True)
    sizes = sizes.within(ModelConfig.load(model).max_position_embeddings)

    say("1 of 5: decoding with and without a cache")
    with cache.make_bench(model, list(sizes.lengths), sizes.page_size, num_threads, options, quiet) as of_cache:
        _check(of_cache, cache.measure(of_cache, model, list(sizes.lengths), sizes.page_size))

    say("2 of 5: memory reserved and memory in pages")
    served = paging.Sizes(model, sizes.requests, sizes.max_model_len, (2,), 16, DTYPE)
    facts: dict[str, Any] = {"model": model.name, "max_model_len": sizes.max_model_len, "page_size": 16}
    with Bench("paging", options, num_threads, quiet, **facts) as of_paging:
        _check(of_paging, paging.measure(of_paging, served)[1])

    say("3 of 5: fewer KV heads")
    shape = gqa.Sizes(sizes.gqa_shape, sizes.gqa_context, 24, 2, sizes.page_size, DTYPE)
    with Bench("gqa", options, num_threads, quiet, shape=shape.shape, context=shape.context) as of_gqa:
        _check(of_gqa, gqa.measure(of_gqa, shape)[1])

    say("4 of 5: the cache below the device")
    context = offload.Sizes(model, sizes.offload_context, sizes.offload_tokens, DTYPE, sizes.offload_page_size)
    with offload.make_bench(context, num_threads, options, quiet) as of_offload:
        offload.measure(of_offload, context, num_threads, None)

    say("5 of 5: this machine's rates, for the planner")
    hardware = measured_cpu()
    here = PlanRequest(find_model(str(model)), hardware, dtype=DTYPE, context=sizes.offload_context)
    planned = [plan_for(context) for context in PLANNED_CONTEXTS]
    return Measured(of_cache, of_paging, of_gqa, of_offload, planned, make_plan(here), hardware)


def plan_for(context: int) -> Planned:
    """As many requests of a context as fit, on the device alone and with the host."""
    request = PlanRequest(find_model(PLANNED_MODEL), GPUS[PLANNED_GPU], context=context)
    both = replace(request, host_kv_bytes=HOST_BYTES)
    return Planned(context, *(make_plan(replace(one, concurrency=_most(one))) for one in (request, both)))


def _most(request: PlanRequest) -> int:
    """Requests that fit; those that run at a time take room too."""
    count = make_plan(request).fit.most_requests
    while (fits := make_plan(replace(request, concurrency=count)).fit.most_requests) < count:
        count = fits
    return count


def _check(bench: Bench, wrong: str) -> None:
    if wrong:
        raise DistKVError(f"bench {bench.facts['benchmark']}: {wrong}")
