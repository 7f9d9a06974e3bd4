"""What the device was at, read off the events of a trace of torch's profiler; their times are in microseconds."""

from collections import defaultdict
from itertools import pairwise
from typing import Any

WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAST_TOKENS = 8


def busy(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds from the first work of the device to its last, prompts included."""
    work = _work(events)
    _, idle, _ = _gaps(work)
    whole = max(_end(event) for event in work) - work[0]["ts"]
    return {"kernels": len(work), "whole": whole / 1e3, "busy": (whole - idle) / 1e3, "idle": idle / 1e3}


def decode_by_kernel(events: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    """Microseconds of the last tokens of one answer, LAST_TOKENS at most, by kernel and grid: each launch, and all of a
    token. A token is what lies between the decode attention of its last layer and that of the next one's, so head and
    sampling are in it, and no prompt is. Raises ValueError for a trace of fewer than two tokens."""
    work = _work(events)
    of_last_layer = [index for index, event in enumerate(work) if "_decode_kernel" in event["name"]][::-layers]
    edges = of_last_layer[: LAST_TOKENS + 1][::-1]
    tokens = len(edges) - 1
    if tokens < 1:
        raise ValueError(f"the trace has decode attention of {len(edges)} tokens, and no whole one lies between them")
    window = work[edges[0] : edges[-1] + 1]  # the last of them only ends it
    taken: dict[str, list[float]] = defaultdict(list)
    for event in window[:-1]:
        taken[f"{event['name'][:90]} {event.get('args', {}).get('grid', '')}".strip()].append(event["dur"])
    count, idle, longest = _gaps(window)
    return {
        "tokens": tokens,
        "us a token": round((window[-1]["ts"] - window[0]["ts"]) / tokens, 2),
        "us a token of gaps": round(idle / tokens, 2),
        "gaps a token": round(count / tokens, 2),
        "longest gap": longest,
        "by kernel and grid": {
            name: {
                "launches a token": round(len(times) / tokens, 2),
                "us each": round(sum(times) / len(times), 2),
                "us a token": round(sum(times) / tokens, 2),
            }
            for name, times in sorted(taken.items(), key=lambda item: -sum(item[1]))
        },
    }


def _work(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the device did, in the order in which it began."""
    return sorted((event for event in events if event.get("cat") in WORK), key=lambda event: event["ts"])


def _gaps(work: list[dict[str, Any]]) -> tuple[int, float, dict[str, Any]]:
    """How many pauses there are in which nothing runs, how long they are together, and the longest of them."""
    count, idle, longest, end = 0, 0.0, {"us": 0.0, "before": ""}, _end(work[0])
    for _, event in pairwise(work):
        if (gap := event["ts"] - end) > 0:
            count, idle = count + 1, idle + gap
            if gap > longest["us"]:
                longest = {"us": round(gap, 2), "before": event["name"][:90]}
        end = max(end, _end(event))
    return count, idle, longest


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]
