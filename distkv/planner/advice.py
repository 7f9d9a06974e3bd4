"""What to change, in whole sentences."""

from dataclasses import replace

from distkv.errors import ConfigError
from distkv.planner.fit import Fit
from distkv.planner.request import PlanRequest
from distkv.planner.roofline import DISK, HOST, KV, LINK, NETWORK, PEERS, WEIGHTS, Cost
from distkv.planner.room import codec_that_fits, enough_below, fewest_ranks
from distkv.planner.sizing import STREAM_SECONDS
from distkv.planner.units import (
    option_bytes,
    shown_bandwidth,
    shown_bytes,
    shown_seconds,
    shown_share,
    shown_tokens,
)
from distkv.workers.attention.policies.registry import FULL

_LOSS = "at a loss that docs/quality.md has"


def advise(request: PlanRequest, fit: Fit, decode: Cost | None) -> list[str]:
    """The most pressing first; empty where nothing is to be said."""
    return [*_to_fit(request, fit), *_to_be_faster(request, fit, decode), *_to_know(request, fit, decode)]


def _to_fit(request: PlanRequest, fit: Fit) -> list[str]:
    """What makes room for all requests."""
    if fit.running == request.concurrency:
        return []
    if min(one.left - one.page_bytes for one in fit.ranks) < 0:
        ranks = None if request.hardware.is_cpu else fewest_ranks(request)
        cure = "GPUs with more memory" if ranks is None else f"--gpus {ranks} or more, or GPUs with more memory"
        cure += ", or a smaller --page-size" if min(one.left for one in fit.ranks) > 0 else ""
        if request.hardware.is_cpu:
            cure = "--device-kv-bytes to say how much KV may take"
        return [f"Nothing fits: {_what_is_full(fit)}; use {cure}."]
    if fit.refusal is not None:
        return [f"The engine would not start: {fit.refusal}."]
    if request.num_seqs < min(fit.most_requests, request.concurrency):
        return [f"max_num_seqs lets {request.num_seqs} requests run at a time; raise it."]
    cures = []
    enough = enough_below(request, "disk" if fit.tiers[2].pages else "host")
    if enough is not None:
        tier, size = ("disk", enough.disk_kv_bytes) if fit.tiers[2].pages else ("host", enough.host_kv_bytes)
        cures.append(f"--{tier}-kv-bytes {option_bytes(size)} would hold the rest")
    codec = codec_that_fits(request)
    if codec is not None:
        cures.append(f"--kv-cache-dtype {codec} would make room for all, {_LOSS}")
    ranks = None if request.hardware.is_cpu else fewest_ranks(request, fit_all=True)
    if ranks is not None:
        cures.append(f"--gpus {ranks} would hold all on the GPUs")
    each = fit.tokens // request.concurrency // request.page_size * request.page_size
    if each:
        cures.append(f"contexts of up to {shown_tokens(each)} tokens would all fit")
    if not cures:
        cures.append("lower --concurrency")
    some = f"{fit.running} of {request.concurrency} requests run at a time"
    return [f"{some if fit.most_requests else 'No request fits'} for want of {fit.limit}: {', or '.join(cures)}."]


def _what_is_full(fit: Fit) -> str:
    one = min(fit.ranks, key=lambda rank: rank.left)
    rest = one.workspace + one.context + one.staging
    return (
        f"a rank's weights take {shown_bytes(one.weights)} and its workspace {shown_bytes(rest)} of "
        f"{shown_bytes(one.memory)}, and a page of KV {shown_bytes(one.page_bytes)}"
    )


def _to_be_faster(request: PlanRequest, fit: Fit, decode: Cost | None) -> list[str]:
    """What would lift the limit of a step."""
    if decode is None:
        return []
    if decode.limit == WEIGHTS:
        reach = int(fit.running * decode.parts[WEIGHTS] / decode.parts[KV])
        if reach > fit.running:
            return [
                f"A step is bound by reading the weights, which all requests share: with about {reach} of them it "
                "would take no more than twice as long as with one."
            ]
        ranks = "" if request.hardware.is_cpu else ": more ranks share them out"
        return [f"A step is bound by reading the weights{ranks}."]
    if decode.limit == KV:
        cures = [] if request.hardware.is_cpu else ["more ranks"]
        cures += ["a shorter context"] + [f"an --attention-policy, {_LOSS}"] * _may_choose(request)
        return [f"A step is bound by reading KV: it is shorter with {' or '.join(cures)}."]
    if decode.limit == LINK:
        links = "" if request.hardware.is_cpu else ", and each GPU has a link of its own"
        return [
            f"A step waits for {shown_bytes(_streamed_bytes(request, fit))} of cold KV: more room on the devices helps "
            f"most, since what lies there is not streamed{links}{_fewer_bytes(request)}."
        ]
    if decode.limit == HOST:
        return [
            f"A step waits for host memory, {shown_bandwidth(request.node.memory_bandwidth)} for all GPUs of a node "
            f"together: more room on the devices helps most{_fewer_bytes(request)}."
        ]
    if decode.limit == NETWORK:
        most = max(decode.between_ranks, key=lambda name: decode.between_ranks[name])
        return [
            f"A step waits for the network between nodes, most for {most}: stages and context groups that lie on one "
            "node each, or a faster network, make it shorter, and messages of several requests go together."
        ]
    if decode.limit == DISK:
        enough = enough_below(replace(request, disk_kv_bytes=0), "host")
        size = "more" if enough is None else option_bytes(enough.host_kv_bytes)
        return [f"A step waits for the disk: --host-kv-bytes {size} would hold all without it{_fewer_bytes(request)}."]
    if decode.limit == PEERS:
        links = "" if request.hardware.is_cpu else ", or GPUs with NVLink,"
        return [f"A step waits for the links between ranks: fewer ranks{links} make it shorter."]
    return []


def _to_know(request: PlanRequest, fit: Fit, decode: Cost | None) -> list[str]:
    """What does not change the figures but whether they can be had."""
    config, found = request.model.config, []
    nominal, usual = request.hardware.nominal_bytes, fit.usual_requests
    by_share = request.device_kv_bytes is None
    if nominal is not None and usual is not None and by_share and fit.running < min(usual, request.concurrency):
        found.append(
            f"Commonly {usual} are said to fit: {shown_bytes(nominal)} less the weights, over the KV of one request; "
            f"distkv takes {request.gpu_memory_utilization:g} of what CUDA reports, less the workspace, in whole pages."
        )
    if request.is_too_long:
        found.append(
            f"{request.model.name} was made for {config.most_positions} positions and the engine refuses more, so that "
            "this shows what it would take and cannot be served."
        )
    if request.copies_of_kv > 1:
        groups = _context_groups(request)
        cure = f"; --decode-context-parallel-size {groups} has it once" if groups else ""
        found.append(
            f"{request.tensor_parallel_size} ranks share {config.num_key_value_heads} KV heads, so KV lies "
            f"{request.copies_of_kv:.3g} times on the devices{cure}."
        )
    if decode is not None and decode.idle:
        found.append(_stages_wait(request, fit, decode))
    if decode is not None and fit.running > 1 and max(decode.parts[LINK], decode.parts[DISK]) > STREAM_SECONDS:
        found.append(
            f"Unless max_cold_bytes_per_step says more, a step streams for {shown_seconds(STREAM_SECONDS)} or so and "
            "the requests take turns; the time shown is then that between two tokens of each, on average."
        )
    if request.ranks_per_node > request.node.gpus:
        found.append(
            f"More than {request.node.gpus} GPUs are seldom in one machine; links between machines are slower than the "
            f"{request.hardware.peer_link / 1e9:.3g} GB/s that are reckoned with: --nodes and --node say how fast."
        )
    summaries = request.summary_tokens * fit.running * fit.kv_bytes_per_token
    if summaries:
        found.append(
            f"The engine keeps summaries of the running requests' pages in memory, {shown_bytes(summaries)}, "
            + ("for which there is room left." if by_share else "which device_kv_bytes does not count.")
        )
    for option in request.unknown_options:
        found.append(
            f"The engine refuses {option} on GPUs, whose kernels do not know it yet, so that this shows what it would "
            "take and cannot be served."
        )
    return found


def _context_groups(request: PlanRequest) -> int | None:
    """The smallest groups in which no token's KV lies twice; None where there are none."""
    for size in range(2, request.tensor_parallel_size + 1):
        try:
            if replace(request, decode_context_parallel_size=size).copies_of_kv == 1:
                return size
        except ConfigError:  # the model or the ranks cannot be cut so
            continue
    return None


def _stages_wait(request: PlanRequest, fit: Fit, decode: Cost) -> str:
    """What a pipeline leaves idle, and what would fill it."""
    stages, count = request.pipeline_parallel_size, decode.micro_batches
    more = f"; with {stages} requests or more it would be less" if fit.running < stages else ""
    return (
        f"A step is {count} micro-batch{'es' * (count > 1)} through {stages} stages, of which each waits "
        f"{shown_share(decode.idle)} of the time{more}."
    )


def _streamed_bytes(request: PlanRequest, fit: Fit) -> int:
    """Of the running requests, what a step reads from below the devices, over all ranks."""
    cold_pages = sum(tier.used_pages for tier in fit.tiers[1:])
    return int(cold_pages * request.share_read * request.page_tokens * fit.cold_kv_bytes_per_token)


def _may_choose(request: PlanRequest) -> bool:
    """Whether a policy of attention could be set."""
    return request.attention_policy == FULL and request.kind.follows_policies


def _fewer_bytes(request: PlanRequest) -> str:
    """What would have a step stream less, as the end of a sentence; nothing where that is done or cannot be."""
    options = ["--kv-cache-dtype"] * (request.kv_cache_dtype == "auto")
    options += ["--attention-policy"] * _may_choose(request)
    return f"; {' or '.join(options)} streams fewer bytes, {_LOSS}" if options else ""
