"""From figures to the page."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distkv.bench.cache_variants import CONCATENATED, NO_CACHE, PAGED
from distkv.bench.harness import Bench, Figure, Row
from distkv.bench.paging import ON_DEMAND, RESERVED
from distkv.learn.measure import HOST_BYTES, Measured
from distkv.learn.plots import bars_picture, cache_picture, memory_picture
from distkv.planner.units import shown_bytes, shown_rate, shown_seconds, shown_tokens
from distkv.reporting.out_file import writing

TEMPLATE = "report.html.jinja"
DRAWN = 6  # tokens of the drawings


def write_report(path: Path, measured: Measured) -> None:
    """One file that needs no other. Raises StoreError."""
    text = render(measured)
    with writing(path):
        path.write_text(text, encoding="utf-8")


def render(measured: Measured) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "bytes": shown_bytes, "seconds": shown_seconds, "tokens": shown_tokens, "spread": _spread, "num": format,
    }  # fmt: skip
    return environment.get_template(TEMPLATE).render(_figures(measured))


def _figures(measured: Measured) -> dict[str, Any]:
    """What the template speaks of."""
    facts, cache, gqa, offload = measured.cache.facts, measured.cache, measured.gqa, measured.offload
    longest = max(row["tokens"] for row in cache.rows)
    at_end = {row["cache"]: row for row in cache.rows if row["tokens"] == longest}
    policies = [row for row in measured.paging.rows if row["part"] == "policy"]
    by_policy = {row["policy"]: row for row in policies}
    token_bytes = offload.facts["bytes_per_token"]
    return {
        "facts": facts,
        "machine": offload.facts["machine"],
        "on_cpu": offload.facts["machine"] == measured.hardware.name,
        "drawn": range(1, DRAWN + 1),
        "cache": cache,
        "longest": longest,
        "uncached": at_end[NO_CACHE],
        "concatenated": at_end[CONCATENATED],
        "paged": at_end[PAGED],
        "cache_picture": cache_picture(facts),
        "token_bytes": token_bytes,
        "formula": offload.facts["formula"],
        "sizes": [(count, count * token_bytes) for count in (1, 1024, 32768, 2**20)],
        "paging": measured.paging,
        "reserved": by_policy[RESERVED],
        "on_demand": by_policy[ON_DEMAND],
        "policies": policies,
        "memory_picture": memory_picture(policies),
        "gqa": gqa,
        "gqa_picture": bars_picture(
            [f"{row['kind']}, {row['kv_heads']} KV heads" for row in gqa.rows],
            [row["long_ms"] for row in gqa.rows], "ms per token at the long context",
        ),
        "offload": offload,
        "coldest": offload.rows[-1],
        "from_host": _row(offload, "all on host"),
        "resident": offload.rows[0],
        "offload_picture": bars_picture(
            [row["cache"] for row in offload.rows], [row["decode_ms_per_token"] for row in offload.rows],
            "ms per token",
        ),
        "planned": measured.planned,
        "planned_request": measured.planned[0].on_device.request,
        "host_bytes": HOST_BYTES,
        "here": measured.here,
        "hardware": measured.hardware,
    }  # fmt: skip


def _spread(figure: Figure) -> str:
    """Three figures or so of each value."""
    median, low, high = map(shown_rate, (figure.median, figure.low, figure.high))
    return median if figure.low == figure.high else f"{median} ({low}–{high})"  # noqa: RUF001, as print has it


def _row(bench: Bench, name: str) -> Row:
    return next(row for row in bench.rows if row["cache"] == name)
