"""What a stress run leaves: a table, the facts as JSON, and a picture."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distkv.engine.protocol import EngineInfo
from distkv.reporting.out_file import writing
from distkv.storage.tier import Tier
from distkv.stress.stage import TIERS, Stage
from distkv.stress.verify import Verdict


def stage_facts(stage: Stage, info: EngineInfo) -> dict[str, Any]:
    """Figures of one stage; `expected_streamed_per_step` is the formula's, KV bytes per token below the device times
    the tokens of the cold pages; `share_chosen` and `mean_covered` are those of `PolicyStats`."""
    full = stage.full
    return {
        "context": stage.context,
        "new_tokens": len(stage.outputs),
        "fill_seconds": stage.fill_seconds,
        "fill_ms_per_token": 1e3 * stage.fill_seconds / stage.context,
        "decode_ms_per_token": {
            "median": statistics.median(stage.decode_ms),
            "min": min(stage.decode_ms),
            "max": max(stage.decode_ms),
            "all": stage.decode_ms,
        },
        "pages": {"in_use": full.pages_in_use, **full.pages},
        "bytes": {"in_use": full.pages_in_use * info.page_bytes}
        | {tier: pages * _page_bytes(info, tier) for tier, pages in full.pages.items()},
        "moved_bytes": stage.bytes_moved,
        "streamed_bytes_per_step": stage.streamed_per_step,
        "cold_tokens": stage.cold_pages * info.page_size,
        "expected_streamed_per_step": stage.cold_pages * info.cold_page_bytes,
        "share_chosen": stage.policy.share_chosen,
        "mean_covered": stage.policy.mean_covered,
        "token_ids": [output.token_id for output in stage.outputs],
        "samples": [asdict(sample) for sample in stage.samples],
    }


def write_json(
    path: Path, facts: dict[str, Any], info: EngineInfo, stages: list[Stage], verdict: Verdict | None
) -> None:
    """All that is known of a run. `facts`: of the machine, the options and the model. Raises StoreError."""
    report = {
        **facts,
        "engine": {name: getattr(info, name) for name in info.__struct_fields__},
        "stages": [stage_facts(stage, info) for stage in stages],
        "verification": verdict and asdict(verdict),
    }
    with writing(path):
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_table(console: Console, info: EngineInfo, stages: list[Stage], formula: str) -> None:
    """A column per stage. `formula`: of the KV bytes per token."""
    table = Table("", *(f"{stage.context} tokens" for stage in stages))
    facts = [stage_facts(stage, info) for stage in stages]

    def row(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    row("new tokens", (str(one["new_tokens"]) for one in facts))
    row("fill s", (f"{one['fill_seconds']:.2f}" for one in facts))
    row("fill ms/token", (f"{one['fill_ms_per_token']:.3g}" for one in facts))
    decode = [one["decode_ms_per_token"] for one in facts]
    row("decode ms/token", (f"{one['median']:.3g}" for one in decode))
    row("  min .. max", (f"{one['min']:.3g} .. {one['max']:.3g}" for one in decode))
    row("KV of context", (_size(one["bytes"]["in_use"]) for one in facts))
    for tier, pages in zip(TIERS, (info.num_pages, info.num_host_pages, info.num_disk_pages), strict=True):
        if pages:
            row(f"  on {tier}", (_size(one["bytes"][tier]) for one in facts))
    for route in sorted({route for one in facts for route in one["moved_bytes"]}):
        row(route, (_size(one["moved_bytes"].get(route, 0)) for one in facts))
    for name, field in (("pages chosen", "share_chosen"), ("attention to these", "mean_covered")):
        if facts[0][field] is not None:
            row(name, (f"{one[field]:.1%}" for one in facts))
    row("stream B/token", (str(one["streamed_bytes_per_step"]) for one in facts))
    row("  by formula", (str(one["expected_streamed_per_step"]) for one in facts))
    console.print(table)
    console.print(
        f"[dim]formula: {formula} * cold tokens, those of pages below the device alone, where attention is to all "
        "pages[/dim]",
        soft_wrap=True,
    )


def write_plot(path: Path, info: EngineInfo, stages: list[Stage], title: str) -> None:
    """A PNG: ms per token and bytes per tier over the context length. Raises StoreError."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(9, 7), layout="constrained")
    time_axis, bytes_axis = figure.subplots(2, 1, sharex=True)
    last = stages[-1]
    fill = [
        (later.tokens, 1e3 * (later.seconds - earlier.seconds) / (later.tokens - earlier.tokens))
        for earlier, later in pairwise([sample for sample in last.samples if not sample.new_tokens])
        if later.tokens > earlier.tokens
    ]
    time_axis.plot([tokens for tokens, _ in fill], [ms for _, ms in fill], color="tab:gray", label="fill")
    medians = [statistics.median(stage.decode_ms) for stage in stages]
    spread = [
        [middle - min(stage.decode_ms) for stage, middle in zip(stages, medians, strict=True)],
        [max(stage.decode_ms) - middle for stage, middle in zip(stages, medians, strict=True)],
    ]
    time_axis.errorbar(
        [stage.context for stage in stages], medians, spread, color="tab:red", marker="o", capsize=4,
        label="decode: median, min and max",
    )  # fmt: skip
    time_axis.set(yscale="log", ylabel="ms per token", title=title)
    held = [sample for sample in last.samples if sample.pages_in_use]
    tokens = [sample.tokens for sample in held]
    unit, scale = ("GiB", 2**30) if last.full.pages_in_use * info.page_bytes >= 2**30 else ("MiB", 2**20)
    for tier in TIERS:
        sizes = [sample.pages[tier] * _page_bytes(info, tier) / scale for sample in held]
        if any(sizes):
            bytes_axis.plot(tokens, sizes, label=tier)
    whole = [sample.pages_in_use * info.page_bytes / scale for sample in held]
    bytes_axis.plot(tokens, whole, color="black", linestyle="--", label="KV of the context")
    bytes_axis.set(xlabel="context, tokens", ylabel=f"bytes, {unit}", xlim=(0, None), ylim=(0, None))
    bytes_axis.xaxis.set_major_formatter("{x:,.0f}")
    for axis in (time_axis, bytes_axis):
        axis.grid(alpha=0.3)
        axis.legend()
    with writing(path):
        figure.savefig(path, dpi=120, format="png")


def _page_bytes(info: EngineInfo, tier: str) -> int:
    return info.page_bytes_in(Tier[tier.upper()])


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
