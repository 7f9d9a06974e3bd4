"""What a step costs at least: bytes over the rate of what they cross, operations over the rate of the matrix units
(the roofline model, https://doi.org/10.1145/1498765.1498785). The slowest rank counts, since all wait for it.

On CUDA cold pages stream while other work is computed, so the slowest of the parts is the time of a step. On a CPU they
are copied when their turn comes, by the processors that compute, so the parts add up.
"""

from dataclasses import dataclass

from distkv.planner.fit import Fit, RankMemory
from distkv.planner.request import PlanRequest
from distkv.workers.model.layout import Layout
from distkv.workers.model.shard import Shard

FP32_SHARE = 0.5  # of the matrix rate, at best (TF32 where it is switched on)

WEIGHTS, KV, COMPUTE = "weights", "KV", "compute"
LINK, DISK, PEERS, FIXED = "host link", "disk", "peer links", "fixed work"
"""What time is spent on: reading weights, reading KV, the matrix units, cold KV from the host and from the disk, sums
over the ranks, and what every step takes."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a piece of work, by what they are spent on, and in all."""

    parts: dict[str, float]
    seconds: float
    limit: str  # the part that binds


def decode_step(request: PlanRequest, fit: Fit) -> Cost | None:
    """One token for each of the requests that run, all at their full context; None when none can run."""
    if not fit.running:
        return None
    return max((_decode_of(request, fit, one) for one in fit.ranks), key=lambda cost: cost.seconds)


def first_token(request: PlanRequest, fit: Fit) -> Cost | None:
    """From a prompt of the whole context to its first token, of one request alone with nothing of it cached; None when
    it does not fit."""
    if not fit.most_requests:
        return None
    return max((_prefill_of(request, fit, one) for one in fit.ranks), key=lambda cost: cost.seconds)


def _decode_of(request: PlanRequest, fit: Fit, rank: RankMemory) -> Cost:
    hardware, config = request.hardware, request.model.config
    shard = Shard.of(config, Layout(request.tensor_parallel_size), rank.rank)
    parameters = request.model.rank_parameters(rank.rank, request.tensor_parallel_size)
    tokens = fit.running * request.context
    resident, host, disk = _tokens_by_tier(request, fit, tokens)
    operations = 2.0 * fit.running * (parameters.layers + parameters.head_products)
    operations += 4 * request.share_read * tokens * shard.num_query_heads * config.head_dim * config.num_hidden_layers
    resident += request.summary_tokens * fit.running
    return _combine(
        request,
        {
            WEIGHTS: parameters.read_per_step * request.item_bytes / hardware.memory_bandwidth,
            KV: _read_seconds(request, rank, resident, host + disk),
            COMPUTE: operations / _matrix_rate(request),
            LINK: _link_seconds(request, rank, host, disk),
            DISK: disk * fit.cold_kv_bytes_per_token / hardware.disk_bandwidth,
            PEERS: _all_reduce_seconds(request, fit.running),
            FIXED: hardware.step_seconds,
        },
    )


def _prefill_of(request: PlanRequest, fit: Fit, rank: RankMemory) -> Cost:
    hardware, config = request.hardware, request.model.config
    shard = Shard.of(config, Layout(request.tensor_parallel_size), rank.rank)
    parameters = request.model.rank_parameters(rank.rank, request.tensor_parallel_size)
    tokens, chunk = request.context, min(request.context, request.max_num_batched_tokens)
    steps = -(-tokens // chunk)
    # a token attends to half of the tokens on average, by a product with K and one with V
    operations = 2 * tokens * parameters.layers + 2 * parameters.head_products
    operations += 2 * tokens * tokens * shard.num_query_heads * config.head_dim * config.num_hidden_layers
    device, host = (fit.tiers[index].tokens for index in (0, 1))
    all_of_it, cold, disk = (_read_beyond(tokens, chunk, room) for room in (0, device, device + host))
    # the head is read once, for the only logits that are wanted
    weights = steps * (parameters.read_per_step - parameters.head_products) + parameters.head_products
    return _combine(
        request,
        {
            WEIGHTS: weights * request.item_bytes / hardware.memory_bandwidth,
            KV: _read_seconds(request, rank, all_of_it - cold, cold),
            COMPUTE: operations / _matrix_rate(request),
            LINK: _link_seconds(request, rank, cold - disk, disk),
            DISK: disk * fit.cold_kv_bytes_per_token / hardware.disk_bandwidth,
            PEERS: _all_reduce_seconds(request, tokens),
            FIXED: steps * hardware.step_seconds,
        },
    )


def _combine(request: PlanRequest, parts: dict[str, float]) -> Cost:
    """Reading and computing overlap everywhere, and streaming as well on CUDA. Sums over the ranks wait for what is
    computed, and what comes next for them."""
    memory = parts[WEIGHTS] + parts[KV]
    at_a_time = {max(WEIGHTS, KV, key=lambda name: parts[name]): memory, COMPUTE: parts[COMPUTE]}
    in_turn = {PEERS: parts[PEERS], FIXED: parts[FIXED]}
    streaming = {LINK: parts[LINK], DISK: parts[DISK]}
    if request.hardware.is_cpu:
        in_turn |= streaming
    else:
        at_a_time |= streaming
    slowest = max(at_a_time, key=lambda name: at_a_time[name])
    in_turn[slowest] = at_a_time[slowest]
    return Cost(parts, sum(in_turn.values()), max(in_turn, key=lambda name: in_turn[name]))


def _tokens_by_tier(request: PlanRequest, fit: Fit, tokens: int) -> tuple[float, float, float]:
    """Tokens that are read on the device, on the host and on disk: whole pages from below, the rest where pages are
    filled. A policy of attention is taken to choose from all tiers alike, as the engine expects."""
    host, disk = (min(tier.used_pages * request.page_size, tokens) for tier in fit.tiers[1:])
    share = request.share_read
    return share * max(0, tokens - host - disk), share * host, share * disk


def _read_seconds(request: PlanRequest, rank: RankMemory, resident: float, cold: float) -> float:
    """Of tokens on the device and of streamed ones, which cross its memory twice on CUDA: they are written to the ring
    and read from there."""
    times = 1 if request.hardware.is_cpu else 2
    num_bytes = resident * rank.kv_bytes_per_token + times * cold * rank.cold_kv_bytes_per_token
    return num_bytes / request.hardware.kv_bandwidth


def _link_seconds(request: PlanRequest, rank: RankMemory, host: float, disk: float) -> float:
    """On CUDA pages from disk cross the link as well; on a CPU they are read into place."""
    tokens = host if request.hardware.is_cpu else host + disk
    return tokens * rank.cold_kv_bytes_per_token / request.hardware.host_link


def _read_beyond(tokens: int, chunk: int, room: int) -> int:
    """Tokens that the chunks of a prompt read of those before them, as far as these lie beyond the first `room`."""
    first = room // chunk + 1  # chunk whose earlier tokens do not all fit
    last = -(-tokens // chunk) - 1
    if last < first:
        return 0
    count = last - first + 1
    return chunk * (first + last) * count // 2 - count * room


def _all_reduce_seconds(request: PlanRequest, tokens: int) -> float:
    """Two sums of the hidden states over the ranks in each layer and one of the embeddings, by a ring: each rank sends
    2 (n - 1) / n of them."""
    size, config = request.tensor_parallel_size, request.model.config
    num_bytes = (2 * config.num_hidden_layers + 1) * tokens * config.hidden_size * request.item_bytes
    return 2 * (size - 1) / size * num_bytes / request.hardware.peer_link


def _matrix_rate(request: PlanRequest) -> float:
    return request.hardware.matrix_rate * (FP32_SHARE if request.run_dtype == "float32" else 1)
