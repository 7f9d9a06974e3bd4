"""Tables and picture of `distkv bench paging`, beside what the literature has measured."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from distkv.bench.decode_times import DecodeStep
from distkv.bench.harness import Bench, Row
from distkv.reporting.out_file import writing
from distkv.reporting.tables import Column

COLUMNS = [
    Column("KV memory", "policy"),
    Column("running", "running", form=".1f"),
    Column("most", "most_running"),
    Column("stalled", "stalled", form=".1f"),
    Column("tokens/s", "output_tokens_per_s", form=".1f"),
    Column("running vs reserved", "more_running", form=".2f", ending="x"),
    Column("tokens/s vs reserved", "speedup", form=".2f", ending="x"),
    Column("preempted", "preemptions"),
    Column("holds tokens, %", "held_share", 100, ".1f"),
    Column("to be filled, %", "coming_share", 100, ".1f"),
    Column("never filled, %", "unused_share", 100, ".1f"),
    Column("free, %", "free_share", 100, ".1f"),
]
STEP_COLUMNS = [
    Column("requests in a step", "batch"),
    Column("steps", "count"),
    Column("ms per step, median", "ms", form=".2f"),
    Column("tokens/s", "tokens_per_s", form=".0f"),
    Column("vs the smallest", "gain", form=".2f", ending="x"),
]
COLORS = "tab:orange", "tab:blue", "tab:green"
LEAST_STEPS = 5  # of a batch, for a median
CLAIM = (
    "In the literature (Kwon et al. 2023, OPT-13B on an A100, ShareGPT), reserving the most a request may need leaves "
    "20.4 % of the memory to tokens (13.3 % still to come, 57.3 % never used, 8.9 % between reservations) and batches "
    "7.00 requests; paging leaves 96.3 % to tokens and batches 30.42, 4.35x. Claimed there: 2-4x the throughput at the "
    "same latency."
)


def print_report(bench: Bench, rows: list[Row]) -> None:
    """The tables, the time of a step over its batch, and what bounds the throughput."""
    policies, steps = ([row for row in rows if row["part"] == part] for part in ("policy", "step"))
    for reservations in dict.fromkeys(row["reservations"] for row in policies):
        chosen = [row for row in policies if row["reservations"] == reservations]
        bench.line(f"KV memory of {reservations} x max_model_len, {chosen[0]['kv_bytes'] / 2**20:.1f} MiB:")
        bench.table(COLUMNS, chosen, across=True)
    bench.line(
        "running, stalled: requests that go on, and that have begun and wait for pages. holds tokens: share of the "
        "memory. to be filled: that its request fills later. never filled: reserved, or left over in a last page, for "
        "nothing. free: not taken; distkv keeps some so that those who run can end. All but most, tokens/s and "
        "preempted are means while requests wait for memory. All have the same pages, and none is lost between "
        "reservations, which flatters reserving."
    )
    bench.table(STEP_COLUMNS, steps)
    reserved: dict[int, Row] = {}
    for row in policies:
        first = reserved.setdefault(row["reservations"], row)
        if row is not first:
            bench.line(explanation(first, row, steps))
    bench.line(CLAIM)


def step_rows(steps: Iterable[DecodeStep]) -> list[Row]:
    """Median time of decode steps by batch: of 1, 2, 4 and so on requests, and of the most that came often enough."""
    times: dict[int, list[float]] = {}
    for step in steps:
        times.setdefault(step.batch, []).append(1e3 * step.seconds)
    often = {batch: taken for batch, taken in sorted(times.items()) if len(taken) >= LEAST_STEPS}
    rows: list[Row] = []
    for batch, taken in often.items():
        if batch & (batch - 1) == 0 or batch == max(often):
            ms = statistics.median(taken)
            rate = 1e3 * batch / ms
            gain = rate / (rows[0]["tokens_per_s"] if rows else rate)
            rows.append(
                {"part": "step", "batch": batch, "count": len(taken), "ms": ms, "tokens_per_s": rate, "gain": gain}
            )
    return rows


def explanation(reserved: Row, on_demand: Row, steps: list[Row]) -> str:
    """What more requests at a time can bring on this machine, by the measured times of steps."""
    few, many = reserved["running"].median, on_demand["running"].median
    growth = step_ms(steps, many) / step_ms(steps, few)
    return (
        f"{on_demand['policy']}, memory {reserved['reservations']} x: {many / few:.2f}x the requests run at a time "
        f"({many:.1f} instead of {few:.1f}), and a step of so many takes {growth:.2f}x as long here, by which the gain "
        f"would be {many / few / growth:.2f}x. Measured, with prompts read and the last requests running alone: "
        f"{on_demand['speedup']:.2f}x. Where a step is bound by reading the weights, it takes equally long for both."
    )


def step_ms(steps: list[Row], batch: float) -> float:
    """The time of a step of so many requests, between those that were measured; of the nearest beyond them."""
    below = max((one for one in steps if one["batch"] <= batch), key=lambda one: one["batch"], default=steps[0])
    above = min((one for one in steps if one["batch"] >= batch), key=lambda one: one["batch"], default=steps[-1])
    if above["batch"] == below["batch"]:
        return float(above["ms"])
    part = (batch - below["batch"]) / (above["batch"] - below["batch"])
    return float(below["ms"] + part * (above["ms"] - below["ms"]))


def write_plot(path: Path, rows: list[Row]) -> None:
    """A PNG: requests that run and memory that is taken over time, a column for each size of the memory. Raises
    StoreError."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    matplotlib.use("Agg")
    policies = [row for row in rows if row["part"] == "policy"]
    memories = list(dict.fromkeys(row["reservations"] for row in policies))
    canvas = Canvas(figsize=(5.5 * len(memories) + 1.5, 7), layout="constrained")
    axes = canvas.subplots(2, len(memories), squeeze=False, sharex="col")
    colors = dict(zip(dict.fromkeys(row["policy"] for row in policies), COLORS, strict=True))
    for column, reservations in enumerate(memories):
        running, memory = axes[:, column]
        chosen = [row for row in policies if row["reservations"] == reservations]
        title = f"KV memory of {reservations} x max_model_len, {chosen[0]['kv_bytes'] / 2**20:.1f} MiB"
        for row in chosen:
            moments, color, name = row["moments"], colors[row["policy"]], row["policy"]
            seconds = [at["seconds"] for at in moments]
            rate = f"{name}: {row['output_tokens_per_s'].median:.0f} tokens/s"
            running.plot(seconds, [at["running"] for at in moments], color=color, label=rate, drawstyle="steps-post")
            percent = {part: [100 * at[part] / row["slots"] for at in moments] for part in ("held", "taken")}
            memory.fill_between(seconds, percent["held"], color=color, alpha=0.25)
            memory.plot(seconds, percent["held"], color=color, label=f"{name}: tokens")
            memory.plot(seconds, percent["taken"], color=color, linestyle="--", linewidth=1, label=f"{name}: taken")
        running.set(title=title, ylabel="requests running", ylim=(0, None))
        memory.set(xlabel="seconds", ylabel="% of the KV memory", ylim=(0, 105), xlim=(0, None))
        for axis in (running, memory):
            axis.grid(alpha=0.3)
        running.legend(fontsize="small")
        memory.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    with writing(path):
        canvas.savefig(path, dpi=120, format="png")
