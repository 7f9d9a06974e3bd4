"""The sizes of an engine's pools and what follows from them, from options and measured facts. It touches nothing: the
launch and a planner reckon alike."""

import math
from dataclasses import replace

from distkv.config import EngineConfig
from distkv.errors import CapacityError
from distkv.option_checks import raise_to
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS, pages_for
from distkv.storage.tier import Tier
from distkv.workers.attention.policies.registry import parse_policy
from distkv.workers.kinds import KINDS
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import Shard
from distkv.workers.rank_config import RankConfig, rank_page_spec
from distkv.workers.sizes import Bandwidth, Capacity, PoolSizes

KEPT_PAGES = 2**18  # most pages of a disk tier that outlives the engine, unless a size is given: each takes memory here
STREAM_SECONDS = 1.0  # what a step may spend on cold pages, unless a number of bytes is given


def needs_capacity(config: EngineConfig) -> bool:
    """Whether the ranks must be asked how much memory they have."""
    return config.device_kv_bytes is None or config.host_kv_bytes is None


def needs_bandwidth(config: EngineConfig, sizes: PoolSizes) -> bool:
    """Whether the ranks must measure how fast cold pages come."""
    return bool(sizes.host) and (config.max_cold_bytes_per_step is None or config.cpu_attention == "auto")


def shares_prefixes(config: EngineConfig, model: ModelConfig) -> bool:
    """Whether pages of equal tokens are equal and are to be kept."""
    return config.enable_prefix_caching and model.rope.rope_type != "dynamic"


def keeps_cache(config: EngineConfig, model: ModelConfig) -> bool:
    """Whether pages on disk outlive the engine."""
    return config.cache_dir is not None and shares_prefixes(config, model)


def staging_pages(config: EngineConfig, device: str) -> int:
    """Pages of the staging ring, as given or what a kind of machine (a key of `KINDS`) needs; each holds one layer."""
    if config.staging_pages is not None:
        return config.staging_pages
    return config.min_staging_pages * KINDS[device].load_pieces


def page_specs(ranks: RankConfig) -> list[PageSpec]:
    """The pages of each rank."""
    shards = (Shard.of(ranks.model, ranks.layout, rank) for rank in range(ranks.layout.size))
    return [rank_page_spec(ranks, shard) for shard in shards]


def page_bytes(ranks: RankConfig, specs: list[PageSpec]) -> tuple[int, int, int]:
    """Bytes of a page in each tier, over all ranks: a head that several of them hold lies on disk once."""
    on_device, on_host = (sum(spec.page_bytes_in(tier) for spec in specs) for tier in (Tier.DEVICE, Tier.HOST))
    model = ranks.model
    whole = replace(specs[0], num_layers=model.num_hidden_layers, num_kv_heads=model.num_key_value_heads)
    return on_device, on_host, whole.page_bytes_in(Tier.DISK) * ranks.layout.decode_context_parallel_size


def summary_bytes(ranks: RankConfig, specs: list[PageSpec]) -> int:
    """Bytes of a page's summary, over all ranks; 0 where no policy of attention chooses by them."""
    policy = parse_policy(ranks.attention_policy)
    return 0 if policy is None or not policy.needs_summaries else sum(spec.summary_bytes for spec in specs)


def pages_with_summaries(room: int, page_bytes: int, summary_bytes: int, others: int, most: int) -> int:
    """The pages that fit into the bytes of `room` of them together with all summaries: of these pages and of `others`
    in other tiers, but of no more than `most`. Raises CapacityError where not one does."""
    num_bytes = room * page_bytes
    pages = max(
        (num_bytes - others * summary_bytes) // (page_bytes + summary_bytes),
        (num_bytes - most * summary_bytes) // page_bytes,
    )
    if summary_bytes and pages < 1:
        raise CapacityError(
            f"{num_bytes} bytes are free for KV, and the policy of attention keeps summaries of {summary_bytes} bytes "
            f"of up to {most} pages, which leave no room: lower max_num_seqs, max_model_len or disk_kv_bytes, or set "
            "device_kv_bytes and host_kv_bytes, which do not count them"
        )
    return pages


def pool_sizes(
    config: EngineConfig, ranks: RankConfig, max_model_len: int, capacity: Capacity | None, free_disk: int | None
) -> PoolSizes:
    """Pages of each tier, where sizes in the options are of all ranks together.

    Args:
        capacity: of the rank with the least room; None when `needs_capacity` says that nobody asks.
        free_disk: bytes that are free in the cache folder or taken by the pages in it, on the node with the least; None
            where there is no folder.

    Raises CapacityError when a tier is too small to work with. Sizes that are found count the summaries of pages that a
    policy of attention chooses by; those that are given are of pages alone.
    """
    specs = page_specs(ranks)
    on_device, on_host, on_disk = page_bytes(ranks, specs)
    summary = summary_bytes(ranks, specs)
    most = config.max_num_seqs * pages_for(max_model_len, config.plan_page_size)  # that running requests can fill
    window = _window_pages(config, max_model_len)
    device = _given(config, "device_kv_bytes", on_device, 1 if config.host_kv_bytes == 0 else window)
    if device is None:
        assert capacity is not None
        device = min(pages_with_summaries(capacity.device, on_device, summary, 0, most), most)
    host = _given(config, "host_kv_bytes", on_host)
    if host is None:
        assert capacity is not None
        # what is to reach the disk passes through the host
        host = min(capacity.host, most) if device < most or keeps_cache(config, ranks.model) else 0
    staging = ranks.staging_pages if host else 0
    disk = 0 if free_disk is None or not host else _disk_pages(config, ranks, on_disk, free_disk, most)
    if config.device_kv_bytes is None:  # beside it lie the summaries of all tiers' pages
        assert capacity is not None
        device = min(device, pages_with_summaries(capacity.device, on_device, summary, host + disk, most))
    elif config.host_kv_bytes is None and host:
        assert capacity is not None
        host = min(host, pages_with_summaries(capacity.host, on_host, summary, device + disk, most))
    ahead = 0
    if disk and KINDS[ranks.device].reads_ahead:  # into host memory, which counts as the host's
        ahead = _read_ahead_pages(host, staging, specs[0], on_host)
        host -= ahead
    if config.host_kv_bytes is not None or disk:  # else each request is checked by itself
        _check_window(config, device, host, max_model_len, on_device)
    if not shares_prefixes(config, ranks.model):
        device, host, disk = min(device, most), min(host, most), min(disk, most)
    summaries = min(device + host + disk, most) if summary else 0
    return PoolSizes(device, host, disk, staging, ahead * specs[0].num_layers, summaries)


def _given(config: EngineConfig, option: str, page_bytes: int, least: int = 1) -> int | None:
    """The pages that a number of bytes in the options holds; None where none is given. `least` are those with which an
    engine works."""
    size = getattr(config, option)
    if size is None or size == 0:
        return size
    if size < page_bytes:
        raise CapacityError(
            f"{option} {size} is less than one page of {config.plan_page_size} tokens, {page_bytes} bytes over all "
            f"ranks; {raise_to(option, least * page_bytes)} or lower page_size"
        )
    return size // page_bytes


def _disk_pages(config: EngineConfig, ranks: RankConfig, page_bytes: int, free: int, most: int) -> int:
    """Pages of the disk tier: as given, or what half of the free bytes hold."""
    room = free // 2 // page_bytes
    pages = _given(config, "disk_kv_bytes", page_bytes)
    pages = pages or min(room, max(most, KEPT_PAGES) if keeps_cache(config, ranks.model) else most)
    if not pages:
        raise CapacityError(
            f"there is no room for a KV page of {page_bytes} bytes in cache_dir, of whose free bytes half are taken; "
            "make room on the disk"
        )
    return pages


def _read_ahead_pages(host: int, staging: int, spec: PageSpec, page_bytes: int) -> int:
    """Host pages that reading from disk takes: a sixteenth, a buffer of the staging ring at least."""
    pages = max(-(-(staging // NUM_BUFFERS) // spec.num_layers), host // 16)
    if host <= pages:
        raise CapacityError(
            f"host_kv_bytes holds {host} pages and reading from disk takes {pages} of them; "
            f"{raise_to('host_kv_bytes', (pages + 1) * page_bytes)}"
        )
    return pages


def _check_window(config: EngineConfig, device: int, host: int, max_model_len: int, page_bytes: int) -> None:
    """Raises CapacityError when a step of the largest size does not fit on the device, and a request may need more."""
    least = _window_pages(config, max_model_len)
    if not host or device >= least:
        return
    tokens = min(config.max_num_batched_tokens, max_model_len)
    fits = (device - 1) * config.plan_page_size
    lower = f", or lower max_num_batched_tokens to {fits}" if fits >= config.max_num_seqs else ""
    raise CapacityError(
        f"the device holds {device} KV pages of {config.plan_page_size} tokens, and a step of {tokens} tokens fills "
        f"{pages_for(tokens, config.plan_page_size)} beside one being written: "
        f"{raise_to('device_kv_bytes', least * page_bytes)}{lower}"
    )


def _window_pages(config: EngineConfig, max_model_len: int) -> int:
    """Pages on the device with which every step runs: the largest one's and one being written, or a whole request."""
    step = pages_for(min(config.max_num_batched_tokens, max_model_len), config.plan_page_size)
    return min(step + 1, pages_for(max_model_len, config.plan_page_size))


def host_share(
    config: EngineConfig, device: str, max_model_len: int, sizes: PoolSizes, rates: list[Bandwidth]
) -> float:
    """`EngineInfo.host_share`: as given, or that with which CPU and link are done at the same time when requests are as
    long and as many as may be, or as device and host hold: of what then lies below the device the CPU has the part that
    its rate is of both.

    Args:
        device: a key of `KINDS`; a CPU attends to everything where it lies.
        rates: of each rank; needed where `needs_bandwidth` says so.
    """
    if config.cpu_attention == "off" or not KINDS[device].has_link or not sizes.host:
        return 0.0
    if config.cpu_attention != "auto":
        return float(config.cpu_attention)
    cpu, link = min(rate.cpu for rate in rates), min(rate.host for rate in rates)
    most = min(config.max_num_seqs * pages_for(max_model_len, config.page_size), sizes.device + sizes.host)
    return round(max(0.0, 1 - sizes.device / most) * cpu / (cpu + link), 3)


def rate_with_host(rate: Bandwidth, share: float) -> float:
    """Bytes per second at which pages on the host are attended to, of which the CPU has a share."""
    by_link = rate.host / (1 - share) if share < 1 else math.inf
    by_cpu = rate.cpu / share if share and rate.cpu else math.inf
    return rate.host if by_link == by_cpu == math.inf else min(by_link, by_cpu)


def cold_budget(
    config: EngineConfig, sizes: PoolSizes, rates: list[Bandwidth], host_share: float = 0.0
) -> tuple[int, float]:
    """`EngineInfo.max_cold_bytes_per_step` and `disk_cost`: the bytes as given, or what the host brings in
    STREAM_SECONDS, of which the disk takes more for each byte as it is slower.

    Args:
        rates: of each rank; needed where `needs_bandwidth` says so.
    """
    if not sizes.host:
        return 0, 1.0
    if config.max_cold_bytes_per_step is not None:
        return int(config.max_cold_bytes_per_step), 1.0
    host, disk = min(rate_with_host(rate, host_share) for rate in rates), min(rate.disk for rate in rates)
    return int(host * STREAM_SECONDS) * len(rates), max(1.0, host / disk) if disk else 1.0


def cold_page_seconds(specs: list[PageSpec], rates: list[Bandwidth]) -> tuple[float, float]:
    """`EngineInfo.cold_page_seconds`: of the slowest rank.

    Args:
        rates: of each rank, as for `cold_budget`; none where they were not measured.
    """

    def seconds(tier: Tier, bandwidths: list[float]) -> float:
        pairs = zip(specs, bandwidths, strict=False)
        return max((spec.page_bytes_in(tier) / rate for spec, rate in pairs if rate), default=0.0)

    return seconds(Tier.HOST, [rate.host for rate in rates]), seconds(Tier.DISK, [rate.disk for rate in rates])


def cold_rates(budget: tuple[int, float], num_ranks: int) -> Bandwidth:
    """The measured rates of each rank that a `cold_budget` of no option came from."""
    host = budget[0] / STREAM_SECONDS / num_ranks
    return Bandwidth(host, host / budget[1])
