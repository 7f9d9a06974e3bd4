"""Every metric by its name: where it comes from, and what it means.

Where vLLM has the same thing, the name behind the prefix, the unit and the labels are vLLM's, so that dashboards and
alerts for it work with another prefix.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from distkv.engine.protocol import EngineInfo
from distkv.engine.stats import EngineStats, Histogram

PREFIX = "distkv:"

Value = float | Histogram
Sample = tuple[tuple[str, ...], Value]
"""The values of a metric's labels, and its own."""


@dataclass(frozen=True)
class Metric:
    """One name. A counter is exported as `name_total`."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    samples: Callable[[EngineStats, EngineInfo], Iterator[Sample]]
    labels: tuple[str, ...] = ()
    field: str = ""  # of `RequestStats`, where it is one of that
    of_engine: bool = True  # else only its owner can tell


def _one(value: Callable[[EngineStats], Value]) -> Callable[[EngineStats, EngineInfo], Iterator[Sample]]:
    """The samples of a metric without labels."""

    def samples(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
        yield (), value(stats)

    return samples


def _gauge(name: str, text: str, value: Callable[[EngineStats], float]) -> Metric:
    return Metric(name, "gauge", text, _one(value))


def _counter(name: str, text: str, value: Callable[[EngineStats], float]) -> Metric:
    return Metric(name, "counter", text, _one(value))


def _histogram(name: str, text: str, field: str) -> Metric:
    return Metric(name, "histogram", text, _one(lambda stats: getattr(stats.requests, field)), field=field)


# --- those with labels ---


def _cache_config(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
    blocks = info.num_pages, info.num_host_pages, info.num_disk_pages
    kinds = info.enable_prefix_caching, info.kv_cache_dtype, info.attention_policy
    sizes = info.kv_bytes_per_token, info.cold_kv_bytes_per_token
    yield tuple(map(str, (info.page_size, *blocks, *kinds, *sizes))), 1.0


def _tier(field: str) -> Callable[[EngineStats, EngineInfo], Iterator[Sample]]:
    def samples(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
        for tier, one in stats.tiers.items():
            yield (tier,), getattr(one, field)

    return samples


def _summaries(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
    yield (), info.summary_bytes * stats.num_engines  # as stats, of all of them


def _idle_bytes(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
    for tier, one in stats.tiers.items():
        yield (tier,), one.used_bytes * one.idle_pages // one.used_pages if one.used_pages else 0


def _prefix_hits(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
    for tier, count in stats.requests.prefix_hits.items():
        yield (tier,), count


def _finished(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
    for reason, count in stats.requests.finished.items():
        yield (reason,), count


ROUTES = {
    "device_to_host": ("device", "host"),
    "host_to_device": ("host", "device"),
    "host_to_disk": ("host", "disk"),
    "disk_to_host": ("disk", "host"),
    "host_streamed": ("host", "staging"),
    "host_attended": ("host", "cpu"),
    "disk_streamed": ("disk", "staging"),
}
"""From where to where pages move, by the routes of `EngineStats.bytes_moved`."""


def _routes(field: str) -> Callable[[EngineStats, EngineInfo], Iterator[Sample]]:
    def samples(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
        for route, ends in ROUTES.items():
            yield ends, getattr(stats, field).get(route, 0)

    return samples


def _offload(field: str) -> Callable[[EngineStats, EngineInfo], Iterator[Sample]]:
    def samples(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
        moved = getattr(stats, field)
        yield ("GPU_to_CPU",), moved.get("device_to_host", 0)
        yield ("CPU_to_GPU",), moved.get("host_to_device", 0) + moved.get("host_streamed", 0)

    return samples


def _disk(field: str) -> Callable[[EngineStats, EngineInfo], Iterator[Sample]]:
    def samples(stats: EngineStats, info: EngineInfo) -> Iterator[Sample]:
        yield ("disk",), getattr(stats, field)

    return samples


def _device_usage(stats: EngineStats) -> float:
    device = stats.tiers.get("device")
    return (device.used_pages - device.idle_pages) / device.num_pages if device and device.num_pages else 0.0


TIER, ENDS, TRANSFER = ("tier",), ("from", "to"), ("transfer_type",)
CACHE_CONFIG = (
    "block_size", "num_gpu_blocks", "num_cpu_blocks", "num_disk_blocks", "enable_prefix_caching", "cache_dtype",
    "attention_policy", "kv_bytes_per_token", "cold_kv_bytes_per_token",
)  # fmt: skip

CATALOGUE = (
    # requests
    _gauge("num_requests_running", "Answers that are being computed.", lambda stats: stats.num_running),
    _gauge("num_requests_waiting", "Requests that wait to be admitted.", lambda stats: stats.num_waiting),
    _gauge(
        "num_requests_parked",
        "Running answers that wait for their turn to stream cold pages.",
        lambda stats: stats.num_parked,
    ),
    _gauge(
        "num_requests_lacking_room",
        "Running answers that wait for KV pages of others.",
        lambda stats: stats.num_lacking_room,
    ),
    Metric("request_success", "counter", "Answers that have ended, by why.", _finished, ("finished_reason",)),
    Metric(
        "requests_refused",
        "counter",
        "Answers that were not begun since too many waited.",
        _one(lambda stats: stats.num_refused),
        of_engine=False,
    ),
    _counter("prompt_tokens", "Tokens of prompts read or found.", lambda stats: stats.requests.prompt_tokens),
    _counter("generation_tokens", "Tokens sampled.", lambda stats: stats.requests.generation_tokens),
    _counter(
        "num_preemptions",
        "Answers that gave their KV pages up since they were longer than expected.",
        lambda stats: stats.num_preemptions,
    ),
    _histogram("time_to_first_token_seconds", "From arrival in the engine to the first token.", "time_to_first_token"),
    _histogram("inter_token_latency_seconds", "Between tokens of an answer.", "inter_token_latency"),
    _histogram("e2e_request_latency_seconds", "From arrival in the engine to the last token.", "e2e_latency"),
    _histogram("request_queue_time_seconds", "From arrival to admission.", "queue_time"),
    _histogram("request_prefill_time_seconds", "From admission to the first token.", "prefill_time"),
    _histogram("request_decode_time_seconds", "From the first token to the last one.", "decode_time"),
    _histogram("request_prompt_tokens", "Tokens of a prompt.", "prompt_length"),
    _histogram("request_generation_tokens", "Tokens of an answer.", "answer_length"),
    # the cache
    Metric("cache_config_info", "gauge", "Always 1; what the cache is, in labels.", _cache_config, CACHE_CONFIG),
    _gauge(
        "kv_cache_usage_perc", "Share of the device's KV pages that requests hold; 1 is 100 percent.", _device_usage
    ),
    Metric("tier_used_bytes", "gauge", "KV bytes that lie in a tier.", _tier("used_bytes"), TIER),
    Metric("tier_idle_bytes", "gauge", "Of these, what no request holds: kept for later ones.", _idle_bytes, TIER),
    Metric("tier_capacity_bytes", "gauge", "KV bytes that a tier may hold.", _tier("capacity_bytes"), TIER),
    Metric(
        "page_summaries_capacity_bytes",
        "gauge",
        "With a policy of attention that chooses by summaries of pages: what these may take, beside the tiers.",
        _summaries,
    ),
    _counter("prefix_cache_queries", "Tokens of prompts looked for.", lambda stats: stats.requests.prefix_queries),
    Metric("prefix_cache_hits", "counter", "Tokens of prompts found, by where they lay.", _prefix_hits, TIER),
    _counter(
        "prefix_cache_recomputed",
        "Tokens of prompts found and computed again, since that was faster than bringing them.",
        lambda stats: stats.requests.prefix_recomputed,
    ),
    _counter(
        "attention_pages_visible",
        "With attention_policy: pages that tokens of answers could attend to, by token, layer and KV head.",
        lambda stats: stats.policy.pages_visible,
    ),
    _counter("attention_pages_chosen", "Of these, those that they chose.", lambda stats: stats.policy.pages_chosen),
    _counter(
        "attention_audited",
        "With attention_audit: query heads of tokens whose attention to all pages was measured, over all layers.",
        lambda stats: stats.policy.num_audited,
    ),
    _counter(
        "attention_mass_covered",
        "Of these, the sum of the parts of it that lay on the chosen pages.",
        lambda stats: stats.policy.mass_covered,
    ),
    _counter(
        "spec_decode_num_drafts",
        "With speculative_config: drafts that steps have checked, one for each answer and step that had one.",
        lambda stats: stats.speculation.num_drafts,
    ),
    _counter(
        "spec_decode_num_draft_tokens", "Tokens of these drafts.", lambda stats: stats.speculation.num_draft_tokens
    ),
    _counter(
        "spec_decode_num_accepted_tokens",
        "Of these, those that the answer goes on with.",
        lambda stats: stats.speculation.num_accepted_tokens,
    ),
    _counter(
        "spec_decode_num_drafting_steps",
        "Steps in which the model drafted for itself, over resident pages.",
        lambda stats: stats.speculation.num_drafting_steps,
    ),
    # what moves
    Metric("transfer_bytes", "counter", "KV bytes moved, all ranks together.", _routes("bytes_moved"), ENDS),
    Metric("transfer_seconds", "counter", "Time that this took, summed over ranks.", _routes("seconds_moved"), ENDS),
    Metric("kv_offload_total_bytes", "counter", "KV bytes between device and host.", _offload("bytes_moved"), TRANSFER),
    Metric("kv_offload_total_time", "counter", "Seconds that this took.", _offload("seconds_moved"), TRANSFER),
    Metric("kv_offload_tiering_read_bytes", "counter", "Bytes read from disk.", _disk("disk_read_bytes"), TIER),
    Metric("kv_offload_tiering_read_time", "counter", "Seconds that this took.", _disk("disk_read_seconds"), TIER),
    Metric("kv_offload_tiering_write_bytes", "counter", "Bytes written to disk.", _disk("disk_written_bytes"), TIER),
    Metric("kv_offload_tiering_write_time", "counter", "Seconds that this took.", _disk("disk_write_seconds"), TIER),
    _counter(
        "pipeline_stage_seconds",
        "With pipeline_parallel_size: time that ranks were at steps, summed over them.",
        lambda stats: stats.stage_seconds,
    ),
    _counter(
        "pipeline_stage_wait_seconds",
        "Of this, what they waited for other stages.",
        lambda stats: stats.stage_wait_seconds,
    ),
    _counter(
        "checksum_failures",
        "Parts of KV pages that came back from disk with another content.",
        lambda stats: stats.checksum_failures,
    ),
    _counter(
        "pages_recomputed",
        "KV pages that could not be read back and were computed again.",
        lambda stats: stats.pages_recomputed,
    ),
)
