"""The picture of a comparison: each metric over contexts or streams, a line for each engine."""

from pathlib import Path

from distkv.bench.harness import Row
from distkv.bench.peers.report import METRICS, Metric
from distkv.reporting.out_file import writing

PANELS = (
    ("single", "prefill_tokens_per_s"), ("single", "decode_ms_per_token"), ("mixed", "output_tokens_per_s"),
    ("http", "output_tokens_per_s"), ("http", "first_token_p50_ms"), ("http", "between_tokens_p50_ms"),
)  # fmt: skip
AXES = {"single": "context, tokens", "mixed": "requests at once", "http": "streams over HTTP"}


def write_plot(path: Path, rows: list[Row], title: str) -> None:
    """A PNG of medians, with their least and greatest values. Raises StoreError."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    metrics = {(part, one.field): one for part, several in METRICS.items() for one in several}
    panels = [panel for panel in PANELS if any(row["part"] == panel[0] and panel[1] in row for row in rows)]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.5 * across, 0.6 + 3.4 * down), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for n, (part, field) in enumerate(panels):
        axis = figure.add_subplot(down, across, n + 1)
        shown = [row for row in rows if row["part"] == part and field in row]
        draw = _bars if len({row["size"] for row in shown}) == 1 else _lines
        draw(axis, metrics[part, field], shown, engines)
        axis.set(title=metrics[part, field].title, ylim=(0, None))
        axis.grid(alpha=0.3, axis="y")
        if draw is _lines:
            axis.set(xlabel=AXES[part])
            axis.legend(fontsize=8)
    with writing(path):
        figure.savefig(path, dpi=120, format="png")


def _bars(axis, metric: Metric, rows: list[Row], engines: list[str]) -> None:  # type: ignore[no-untyped-def]
    names = [row["engine"] for row in rows]
    heights, spread = _values(metric, rows)
    colors = [f"C{engines.index(name)}" for name in names]
    axis.bar(names, heights, yerr=spread, capsize=4, color=colors)
    axis.set(xlabel=rows[0]["work"])


def _lines(axis, metric: Metric, rows: list[Row], engines: list[str]) -> None:  # type: ignore[no-untyped-def]
    sizes = sorted({row["size"] for row in rows})
    for engine in engines:
        own = sorted((row for row in rows if row["engine"] == engine), key=lambda row: row["size"])
        if own:
            heights, spread = _values(metric, own)
            places = [row["size"] for row in own]
            color = f"C{engines.index(engine)}"
            axis.errorbar(places, heights, spread, marker="o", capsize=3, label=engine, color=color)
    axis.set(xscale="log", xticks=sizes)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()


def _values(metric: Metric, rows: list[Row]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far below and above them the other turns are."""
    figures = [row[metric.field] for row in rows]
    medians = [figure.median for figure in figures]
    return medians, [[one.median - one.low for one in figures], [one.high - one.median for one in figures]]
