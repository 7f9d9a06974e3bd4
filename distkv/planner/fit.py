"""What fits where: the memory of each rank, and how many tokens and requests each tier holds.

Pages and pools are those of the engine (`sizing.py`): every rank holds the same number of pages, each with that rank's
KV heads, so the rank with the least room decides.
"""

from dataclasses import dataclass

from distkv.config import EngineConfig
from distkv.errors import CapacityError
from distkv.planner.model_shape import find_shard
from distkv.planner.ranks import make_rank_config
from distkv.planner.request import PlanRequest
from distkv.planner.sizing import page_bytes, page_specs, pages_with_summaries, pool_sizes, summary_bytes
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import CPU_BUFFERS, NUM_BUFFERS, pages_for
from distkv.storage.tier import Tier
from distkv.workers.model.shard import Shard
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import STATE_BYTES, Capacity, PoolSizes, host_kv_bytes, ring_bytes

CONTEXT_BYTES = 2**29  # assumed: CUDA's own, its libraries' and the captured graphs'
GROUP_BYTES = 2**29  # assumed: of what carries tensors between ranks
LOGIT_COPIES = 4  # of fp32 logits while tokens are drawn: as they are, edited, sorted and summed up


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank's device, and what its pages take."""

    rank: int
    stage: int
    num_layers: int
    num_kv_heads: int
    memory: int  # that may be used; of a CPU, for KV
    weights: int
    workspace: int  # of the largest step; on CUDA the engine finds it by trial, here it is estimated
    context: int  # assumed
    staging: int
    left: int  # for pages; below 0 where even the rest does not fit
    kv_bytes_per_token: int  # of this rank's layers and heads, on the device; of a context group for its own tokens
    cold_kv_bytes_per_token: int  # the same below it
    page_bytes: int  # on the device


@dataclass(frozen=True)
class TierRoom:
    """Room of one tier, over all ranks."""

    name: str  # device, host or disk
    page_bytes: int  # of one page, also where there are none
    num_bytes: int  # of its pages
    pages: int
    tokens: int
    requests: int  # whole ones of the context that is planned, if all of each lay here
    used_pages: int  # by the requests that run


@dataclass(frozen=True)
class Fit:
    """What fits where. Requests that find no room wait for others to end."""

    ranks: list[RankMemory]
    tiers: list[TierRoom]
    kv_bytes_per_token: int  # on the devices of all ranks: KV heads whose tokens several ranks hold count for each
    cold_kv_bytes_per_token: int  # the same of full pages below them, which is what streaming moves
    kv_bytes_per_request: int  # on the devices, in whole pages
    pages_per_request: int
    most_requests: int  # that all tiers hold
    running: int  # of those that are asked for
    usual_requests: int | None  # by the usual arithmetic, (memory of the data sheet - weights) / KV
    refusal: str | None  # what the engine would say to these sizes, where it would not start

    @property
    def limit(self) -> str:
        """What keeps more requests from running: the memory of the last tier that there is, or of the devices, without
        which nothing runs."""
        last = next((tier for tier in self.tiers[::-1] if tier.pages), self.tiers[0])
        return {"device": "device memory", "host": "host memory", "disk": "room on disk"}[last.name]

    @property
    def tokens(self) -> int:
        """The longest context that one request can have."""
        return sum(tier.tokens for tier in self.tiers)


def find_fit(request: PlanRequest) -> Fit:
    """What of a request fits where."""
    config, ranks = _configs(request)
    specs = page_specs(ranks)
    memories = [_rank_memory(request, ranks.staging_pages, rank, spec) for rank, spec in enumerate(specs)]
    tokens = config.plan_page_size
    room = min(max(0, one.left) // one.page_bytes for one in memories)
    sizes, refusal = PoolSizes(), None
    try:
        free_disk = 2 * request.disk_kv_bytes if request.disk_kv_bytes else None  # the engine takes half
        sizes = pool_sizes(config, ranks, request.context, Capacity(room, 0), free_disk)
    except CapacityError as error:
        refusal = str(error)
    each, sizes_of_one = pages_for(request.context, tokens), page_bytes(ranks, specs)
    if request.device_kv_bytes is None and not refusal:  # the engine takes no more of it than its requests can fill
        others, most = sizes.host + sizes.disk, config.max_num_seqs * each
        room = pages_with_summaries(room, sizes_of_one[0], summary_bytes(ranks, specs), others, most)
    if sizes.device > room and not request.hardware.is_cpu:
        refusal = _too_much(request, sizes.device, room, memories)
    refusal = refusal or _too_much_on_a_node(request)
    device = 0 if refusal else room if request.device_kv_bytes is None else sizes.device
    pages = device, sizes.host, sizes.disk
    most = sum(pages) // each if device else 0  # a page that is being filled lies on the device
    running = min(request.concurrency, most, request.num_seqs)
    sharers = request.decode_context_parallel_size
    tiers, left = [], running * each
    for tier, count, size in zip(Tier, pages, sizes_of_one, strict=True):
        used = min(left, count)
        left -= used
        name = tier.name.lower()
        tiers.append(TierRoom(name, size, count * size, count, count * tokens, count // each, used))
    return Fit(
        ranks=memories,
        tiers=tiers,
        kv_bytes_per_token=sum(one.kv_bytes_per_token for one in memories) // sharers,
        cold_kv_bytes_per_token=sum(one.cold_kv_bytes_per_token for one in memories) // sharers,
        kv_bytes_per_request=each * sizes_of_one[0],
        pages_per_request=each,
        most_requests=most,
        running=running,
        usual_requests=_usual_requests(request, memories),
        refusal=refusal,
    )


def _configs(request: PlanRequest) -> tuple[EngineConfig, RankConfig]:
    """The options of the engine and of its ranks, for a folder that nobody reads."""
    cache_dir = "/" if request.disk_kv_bytes else None
    config = EngineConfig("/", **request.engine_options, cache_dir=cache_dir)
    device = "cpu" if request.hardware.is_cpu else "cuda"
    return config, make_rank_config(config, request.model.config, device)


def _rank_memory(request: PlanRequest, staging_pages: int, rank: int, spec: PageSpec) -> RankMemory:
    """What one rank's device holds."""
    layout, hardware = request.layout, request.hardware
    shard = find_shard(request.model.config, layout, rank)
    weights = request.model.rank_parameters(layout, rank).total * request.item_bytes
    staging = 0
    if request.host_kv_bytes:
        staging = ring_bytes(spec, staging_pages, CPU_BUFFERS if hardware.is_cpu else NUM_BUFFERS)
    if hardware.is_cpu:  # all is one memory, of which KV takes a share
        memory = host_kv_bytes(hardware.memory_bytes, pinned=False, ranks_on_node=request.ranks_per_node)
        workspace = context = 0
        left = memory - staging
    else:
        # KV of a given size may take what the share would leave free
        share = request.gpu_memory_utilization if request.device_kv_bytes is None else 1
        memory = int(hardware.memory_bytes * share)
        workspace = _workspace_bytes(request, shard)
        context = CONTEXT_BYTES + (GROUP_BYTES if layout.size > 1 else 0)
        left = memory - weights - workspace - context - staging
    return RankMemory(
        rank, shard.stage, spec.num_layers, spec.num_kv_heads, memory, weights, workspace, context, staging, left,
        spec.bytes_per_token, spec.bytes_per_token_in(Tier.HOST), spec.page_bytes_in(Tier.DEVICE),
    )  # fmt: skip


def _workspace_bytes(request: PlanRequest, shard: Shard) -> int:
    """An estimate of what the largest step needs beside the weights: the hidden states, what attention or the MLP makes
    of them, whichever is more, the logits, and what attention over streamed pages keeps between them."""
    config, item = request.model.config, request.item_bytes
    heads, columns = shard.num_query_heads, shard.mlp[1] - shard.mlp[0]
    attention = (2 * heads + 2 * shard.num_kv_heads) * config.head_dim
    step = request.max_num_batched_tokens * item * (3 * config.hidden_size + max(attention, 3 * columns))
    logits = request.num_seqs * config.vocab_size * 4 * LOGIT_COPIES if shard.rank == shard.stage == 0 else 0
    states = STATE_BYTES + request.max_num_batched_tokens * heads * (config.head_dim + 2) * 4
    return step + logits + states


def _too_much(request: PlanRequest, pages: int, room: int, ranks: list[RankMemory]) -> str:
    """Why pages that are given in bytes have no place on the GPUs."""
    size = sum(one.page_bytes for one in ranks)
    return (
        f"device_kv_bytes {request.device_kv_bytes} holds {pages} pages, and beside weights and workspace there is "
        f"room for {room}, {room * size} bytes over all ranks; lower it or leave it out"
    )


def _too_much_on_a_node(request: PlanRequest) -> str | None:
    """Why pages below the devices have no place on the nodes; None where they have. They lie evenly on all of them."""
    for tier, has in (("host", request.node.memory), ("disk", request.node.disk)):
        asked = -(-getattr(request, f"{tier}_kv_bytes") // request.nodes)
        if has is not None and asked > has:
            return (
                f"{tier}_kv_bytes {getattr(request, f'{tier}_kv_bytes')} is {asked} bytes a node, which has {has}; "
                f"lower it to {has * request.nodes}"
            )
    return None


def _usual_requests(request: PlanRequest, ranks: list[RankMemory]) -> int | None:
    """What is commonly published: all that the data sheet promises, less the weights, over the KV of exactly so many
    tokens, without workspace or pages."""
    nominal = request.hardware.nominal_bytes
    if nominal is None:
        return None
    share = request.decode_context_parallel_size
    return min(share * max(0, nominal - one.weights) // (one.kv_bytes_per_token * request.context) for one in ranks)
