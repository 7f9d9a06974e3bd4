"""What a step costs at least: bytes over the rate of what they cross, operations over the rate of the matrix units
(the roofline model, https://doi.org/10.1145/1498765.1498785). The slowest rank counts, since all wait for it.

On CUDA cold pages stream while other work is computed, so the slowest of the parts is the time of a step. On a CPU they
are copied when their turn comes, by the processors that compute, so the parts add up. What ranks send each other
(`between_ranks.py`) always adds up, and so do the stages of a pipeline (`pipeline.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distkv.planner.between_ranks import Sent, decode_exchange, hidden_states, prefill_exchange, state_bytes, sums
from distkv.planner.fit import Fit, RankMemory
from distkv.planner.model_shape import find_shard
from distkv.planner.pipeline import StageCost, num_micro_batches, run_stages
from distkv.planner.reading import decode_reading
from distkv.planner.request import PlanRequest
from distkv.storage.paging import pages_for

FP32_SHARE = 0.5  # of the matrix rate, at best (TF32 where it is switched on)

WEIGHTS, KV, COMPUTE = "weights", "KV", "compute"
LINK, HOST, DISK, PEERS, NETWORK, FIXED = "host link", "host memory", "disk", "peer links", "network", "fixed work"
"""What time is spent on: reading weights, reading KV, the matrix units, cold KV over a GPU's own link, out of the host
memory and from the disk that the GPUs of a node share, what ranks send each other within nodes and between them, and
what every step takes."""
SUMS, EXCHANGE, HIDDEN = "sums", "context exchange", "hidden states"
"""What peer links and the network carry: sums over the ranks of a stage, what a context group exchanges, and what
stages hand on."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a piece of work, by what they are spent on, and in all."""

    parts: dict[str, float]
    seconds: float
    limit: str  # the part that binds
    micro_batches: int  # of a step, which follow each other through the stages of a pipeline
    idle: float  # share of the time that a stage waits for others; 0 without a pipeline
    between_ranks: dict[str, float]  # peer links and network once more: SUMS, EXCHANGE and HIDDEN


Work = Callable[[PlanRequest, Fit, RankMemory, int], dict[str, float]]
"""What one of so many micro-batches takes a rank."""


def decode_step(request: PlanRequest, fit: Fit) -> Cost | None:
    """One token for each of the requests that run, all at their full context; None when none can run."""
    if not fit.running:
        return None
    return _cost(request, fit, fit.running, 1, fit.running, _decode_of)


def first_token(request: PlanRequest, fit: Fit) -> Cost | None:
    """From a prompt of the whole context to its first token, of one request alone with nothing of it cached; None when
    it does not fit."""
    if not fit.most_requests:
        return None
    chunk = _chunk(request)
    return _cost(request, fit, chunk, _num_chunks(request), pages_for(chunk, request.page_tokens), _prefill_of)


def _cost(request: PlanRequest, fit: Fit, rows: int, steps: int, pieces: int, work: Work) -> Cost:
    """Of so many steps of so many tokens each, which can be cut into so many pieces."""
    ranks = {
        (one.stage, one.num_kv_heads, one.weights, one.workspace): one for one in fit.ranks
    }.values()  # unlike ones

    def stages_of(micro_batches: int) -> list[StageCost]:
        found = [(rank.stage, _combine(request, work(request, fit, rank, micro_batches))) for rank in ranks]
        numbers = range(request.pipeline_parallel_size)
        return [max((one for number, one in found if number == stage), key=_seconds) for stage in numbers]

    stages, micro_batches = stages_of(1), 1
    if min(len(stages), pieces) > 1:
        at_once, piece = (max(one.seconds for one in found) for found in (stages, stages_of(pieces)))
        variable = (at_once - piece) * pieces / (pieces - 1)
        micro_batches = num_micro_batches(len(stages), at_once - variable, variable, pieces)
        stages = stages_of(micro_batches)
    hops = [_sent({HIDDEN: one * steps}) for one in hidden_states(request, rows / micro_batches)]
    whole = run_stages(stages, [StageCost(hop, _over_links(hop)) for hop in hops], micro_batches)
    sent = {name: whole.parts.get(name, 0.0) for name in (SUMS, EXCHANGE, HIDDEN)}
    return Cost(
        parts={name: seconds for name, seconds in whole.parts.items() if name not in sent},
        seconds=whole.seconds,
        limit=max(whole.in_turn, key=lambda name: whole.in_turn[name]),
        micro_batches=micro_batches,
        idle=whole.idle,
        between_ranks=sent,
    )


def _decode_of(request: PlanRequest, fit: Fit, rank: RankMemory, micro_batches: int) -> dict[str, float]:
    hardware, config = request.hardware, request.model.config
    shard = find_shard(config, request.layout, rank.rank)
    parameters = request.model.rank_parameters(request.layout, rank.rank)
    rows, group = fit.running / micro_batches, request.decode_context_parallel_size
    reading = decode_reading(request, fit) * (1 / micro_batches)
    tokens = request.share_read * rows * request.context
    # of a context group a rank has the query heads of all, for its part of the tokens
    operations = 2 * rows * (parameters.layers + parameters.head_products)
    operations += 4 * (tokens - reading.on_cpu) * shard.num_query_heads * config.head_dim * shard.num_layers
    states = state_bytes(request, shard, reading.on_cpu / request.page_size)
    return {
        WEIGHTS: parameters.read_per_step * request.item_bytes / hardware.memory_bandwidth,
        KV: _read_seconds(request, rank, reading.resident / group, reading.streamed / group),
        COMPUTE: operations / _matrix_rate(request),
        LINK: _link_seconds(request, rank, reading.host / group, reading.disk / group) + states / hardware.host_link,
        HOST: _host_seconds(request, fit, rank, reading.host + reading.on_cpu, reading.disk, micro_batches),
        DISK: _disk_seconds(request, fit, rank, reading.disk, micro_batches),
        **_sent(
            {
                SUMS: sums(request, shard, rows),
                EXCHANGE: decode_exchange(request, shard, rows, tokens / request.page_size),
            }
        ),
        FIXED: hardware.step_seconds,
    }


def _prefill_of(request: PlanRequest, fit: Fit, rank: RankMemory, micro_batches: int) -> dict[str, float]:
    """Over all chunks of a prompt, of each of which a micro-batch is an equal part that reads all tokens before it."""
    hardware, config = request.hardware, request.model.config
    shard = find_shard(config, request.layout, rank.rank)
    parameters = request.model.rank_parameters(request.layout, rank.rank)
    tokens, chunk, steps = request.context, _chunk(request), _num_chunks(request)
    group = request.decode_context_parallel_size
    # a token attends to half of the tokens on average, by a product with K and one with V
    operations = 2 * tokens * parameters.layers + 2 * parameters.head_products
    operations += 2 * tokens * tokens * shard.num_query_heads * config.head_dim * shard.num_layers
    device, host = (fit.tiers[index].tokens for index in (0, 1))
    all_of_it, cold, disk = (_read_beyond(tokens, chunk, room) for room in (0, device, device + host))
    # the head is read once, for the only logits that are wanted
    weights = steps * (parameters.read_per_step - parameters.head_products) + parameters.head_products / micro_batches
    read = (all_of_it - cold) * rank.kv_bytes_per_token, cold * rank.cold_kv_bytes_per_token
    of_others = 1 - 1 / group  # which pass through memory as streamed pages do
    return {
        WEIGHTS: weights * request.item_bytes / hardware.memory_bandwidth,
        KV: _read_seconds(request, rank, (1 + of_others) * (all_of_it - cold), cold),
        COMPUTE: operations / micro_batches / _matrix_rate(request),
        LINK: _link_seconds(request, rank, (cold - disk) / group, disk / group),
        HOST: _host_seconds(request, fit, rank, cold - disk, disk, micro_batches),
        DISK: _disk_seconds(request, fit, rank, disk, micro_batches),
        **_sent(
            {
                SUMS: sums(request, shard, tokens / micro_batches, steps),
                EXCHANGE: prefill_exchange(request, shard, sum(read), steps),
            }
        ),
        FIXED: steps * hardware.step_seconds,
    }


def _chunk(request: PlanRequest) -> int:
    """Tokens of a step that reads a prompt."""
    return min(request.context, request.max_num_batched_tokens)


def _num_chunks(request: PlanRequest) -> int:
    return -(-request.context // _chunk(request))


def _combine(request: PlanRequest, parts: dict[str, float]) -> StageCost:
    """Reading and computing overlap everywhere, and streaming as well on CUDA. What ranks send each other waits for
    what is computed, and what comes next for that."""
    memory = parts[WEIGHTS] + parts[KV]
    at_a_time = {max(WEIGHTS, KV, key=lambda name: parts[name]): memory, COMPUTE: parts[COMPUTE]}
    in_turn = _over_links(parts) | {FIXED: parts[FIXED]}
    streaming = {name: parts[name] for name in (LINK, HOST, DISK)}
    if request.hardware.is_cpu:
        in_turn |= streaming
    else:
        at_a_time |= streaming
    slowest = max(at_a_time, key=lambda name: at_a_time[name])
    in_turn[slowest] = at_a_time[slowest]
    return StageCost(parts, in_turn)


def _seconds(stage: StageCost) -> float:
    return stage.seconds


def _sent(what: Mapping[str, Sent]) -> dict[str, float]:
    """Seconds by what is sent, and once more by what it crosses."""
    crossed = {PEERS: sum(one.peers for one in what.values()), NETWORK: sum(one.network for one in what.values())}
    return {name: one.seconds for name, one in what.items()} | crossed


def _over_links(parts: Mapping[str, float]) -> dict[str, float]:
    return {PEERS: parts[PEERS], NETWORK: parts[NETWORK]}


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


def _host_seconds(
    request: PlanRequest, fit: Fit, rank: RankMemory, host: float, disk: float, micro_batches: int
) -> float:
    """Of what the GPUs of a node stream out of its memory and its CPU attends to there; what comes from disk is written
    to it first. A CPU's host memory is its device's."""
    if request.hardware.is_cpu:
        return 0.0
    return _node_bytes(request, fit, rank, host + 2 * disk, micro_batches) / request.node.memory_bandwidth


def _disk_seconds(request: PlanRequest, fit: Fit, rank: RankMemory, disk: float, micro_batches: int) -> float:
    """Of what all GPUs of a node read from its disk."""
    return _node_bytes(request, fit, rank, disk, micro_batches) / request.hardware.disk_bandwidth


def _node_bytes(request: PlanRequest, fit: Fit, rank: RankMemory, tokens: float, micro_batches: int) -> float:
    """Of the cold KV of so many tokens, what the ranks of a node share: those of the rank's stage there, and as much
    for each other stage there that works on another micro-batch."""
    of_stage = sum(one.cold_kv_bytes_per_token for one in fit.ranks if one.stage == rank.stage)
    at_a_time = min(max(1, request.ranks_per_node // request.tensor_parallel_size), micro_batches)
    share = at_a_time / request.nodes_per_stage / request.decode_context_parallel_size
    return tokens * of_stage * share


def _read_beyond(tokens: int, chunk: int, room: int) -> int:
    """Tokens that the chunks of a prompt read of those before them, as far as these lie beyond the first `room`."""
    first = room // chunk + 1  # chunk whose earlier tokens do not all fit
    last = -(-tokens // chunk) - 1
    if last < first:
        return 0
    count = last - first + 1
    return chunk * (first + last) * count // 2 - count * room


def _matrix_rate(request: PlanRequest) -> float:
    return request.hardware.matrix_rate * (FP32_SHARE if request.run_dtype == "float32" else 1)
