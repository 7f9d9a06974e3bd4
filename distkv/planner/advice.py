"""What to change, in whole sentences."""

from dataclasses import replace

from distkv.errors import ConfigError
from distkv.planner.fit import Fit, find_fit
from distkv.planner.request import PlanRequest
from distkv.planner.roofline import DISK, KV, LINK, PEERS, WEIGHTS, Cost
from distkv.planner.units import option_bytes, rounded_up, shown_bytes, shown_tokens

MOST_RANKS = 64  # that are tried


def advise(request: PlanRequest, fit: Fit, decode: Cost | None) -> list[str]:
    """The most pressing first; empty where nothing is to be said."""
    return [*_to_fit(request, fit), *_to_be_faster(request, fit, decode), *_to_know(request, fit)]


def _to_fit(request: PlanRequest, fit: Fit) -> list[str]:
    """What makes room for all requests."""
    if fit.refusal is not None:
        return [f"The engine would not start: {fit.refusal}."]
    if not fit.tiers[0].pages:
        ranks = fewest_ranks(request)
        cure = (
            "use a GPU with more memory" if ranks is None else f"use --gpus {ranks} or more, or GPUs with more memory"
        )
        return [f"Nothing fits: {_what_is_full(fit)}; {cure}."]
    if fit.running == request.concurrency:
        return []
    if request.num_seqs < min(fit.most_requests, request.concurrency):
        return [f"max_num_seqs lets {request.num_seqs} requests run at a time; raise it."]
    lacking = (request.concurrency - fit.most_requests) * fit.kv_bytes_per_request
    tier = "--disk-kv-bytes" if fit.tiers[2].pages else "--host-kv-bytes"
    now = fit.tiers[2 if fit.tiers[2].pages else 1].num_bytes
    spare = sum(tier.num_bytes for tier in fit.tiers) - fit.most_requests * fit.kv_bytes_per_request
    need = now + lacking - max(0, spare)
    if not fit.tiers[2].pages and not request.hardware.is_cpu:
        need += need // 15  # so that it is enough if a disk tier is added, which takes a sixteenth for reading ahead
    cures = [f"{tier} {option_bytes(rounded_up(need))} would hold the rest"]
    ranks = fewest_ranks(request, fit_all=True)
    if ranks is not None:
        cures.append(f"--gpus {ranks} would hold all on the GPUs")
    if fit.most_requests == 0 or request.concurrency > 1:
        each = fit.tokens // request.concurrency // request.page_size * request.page_size
        cures.append(f"or contexts of {shown_tokens(each)} tokens at most")
    run = (
        "No request fits" if not fit.most_requests else f"{fit.running} of {request.concurrency} requests run at a time"
    )
    return [f"{run}: {', '.join(cures)}."]


def _what_is_full(fit: Fit) -> str:
    one = min(fit.ranks, key=lambda rank: rank.left)
    rest = one.workspace + one.context + one.staging
    return (
        f"a rank's weights take {shown_bytes(one.weights)} and its workspace {shown_bytes(rest)} of "
        f"{shown_bytes(one.memory)}"
    )


def _to_be_faster(request: PlanRequest, fit: Fit, decode: Cost | None) -> list[str]:
    """What would lift the limit of a step."""
    if decode is None:
        return []
    if decode.limit == WEIGHTS:
        more = max(2, int(decode.parts[WEIGHTS] / max(decode.parts[KV] / fit.running, 1e-12)))
        return [
            f"A step is bound by the weights: more requests at a time are nearly free, up to about {more}."
            if more > fit.running
            else "A step is bound by the weights: more GPUs, or weights of fewer bits, would make it shorter."
        ]
    if decode.limit == KV:
        return ["A step is bound by reading KV: more GPUs, a shorter context or fewer bits of KV make it shorter."]
    if decode.limit == LINK:
        cold = sum(tier.used_pages for tier in fit.tiers[1:]) * fit.kv_bytes_per_request // fit.pages_per_request
        return [
            f"A step waits for {shown_bytes(cold)} of cold KV: more or larger GPUs help most, since what lies on them "
            "is not streamed and each has a link of its own."
        ]
    if decode.limit == DISK:
        on_disk = fit.tiers[2].used_pages * fit.kv_bytes_per_request // fit.pages_per_request
        return [
            f"A step waits for the disk: {shown_bytes(on_disk)} more of --host-kv-bytes would hold what lies there."
        ]
    if decode.limit == PEERS:
        return ["A step waits for the links between GPUs: fewer ranks, or GPUs with NVLink, make it shorter."]
    return []


def _to_know(request: PlanRequest, fit: Fit) -> list[str]:
    """What does not change the figures but whether they can be had."""
    config, found = request.model.config, []
    if request.context > config.max_position_embeddings:
        found.append(
            f"{request.model.name} was made for {config.max_position_embeddings} positions; the engine refuses more."
        )
    held = sum(one.num_kv_heads for one in fit.ranks)
    if held > config.num_key_value_heads:
        found.append(
            f"{request.tensor_parallel_size} ranks share {config.num_key_value_heads} KV heads, so that the KV lies "
            f"{held / config.num_key_value_heads:g} times on the GPUs."
        )
    if request.kv_dtype not in ("auto", request.run_dtype):
        found.append(f"distkv stores KV in {request.run_dtype}; {request.kv_dtype} shows what another would change.")
    return found


def fewest_ranks(request: PlanRequest, fit_all: bool = False) -> int | None:
    """The fewest ranks, more than those of the request, with which a page fits on the devices, or all requests there;
    None when none do."""
    size = request.tensor_parallel_size
    while size < MOST_RANKS:
        size *= 2
        try:
            fit = find_fit(replace(request, tensor_parallel_size=size, host_kv_bytes=0, disk_kv_bytes=0))
        except ConfigError:  # more ranks than heads
            return None
        if fit.running == request.concurrency if fit_all else fit.tiers[0].pages:
            return size
    return None
