"""The pictures of the report, as texts that a page can hold."""

import base64
import io
from typing import Any

from distkv.bench import cache_plot
from distkv.bench.harness import Row

COLORS = {"held_share": "tab:blue", "coming_share": "#9ecae1", "unused_share": "tab:red", "free_share": "#dddddd"}
SHARES = {
    "held_share": "holds tokens",
    "coming_share": "to be filled",
    "unused_share": "never filled",
    "free_share": "free",
}


def cache_picture(facts: dict[str, Any]) -> str:
    """A `data:` address: milliseconds per token over its position."""
    target = io.BytesIO()
    cache_plot.draw(target, facts, "svg")
    return _address(target)


def memory_picture(rows: list[Row]) -> str:
    """A `data:` address: what the KV memory held, on average, by policy."""
    figure, axis = _canvas(2.6)
    names = [row["policy"] for row in rows]
    left = [0.0] * len(rows)
    for share, title in SHARES.items():
        widths = [100 * max(0.0, row[share].median) for row in rows]
        axis.barh(names, widths, left=left, color=COLORS[share], label=title, edgecolor="white")
        left = [one + width for one, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="% of the KV memory, while requests wait for some", xlim=(0, 100))
    axis.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False, fontsize=9)
    return _saved(figure)


def bars_picture(names: list[str], figures: list[Any], label: str) -> str:
    """A `data:` address: a bar for each `Figure`, with a line from its least to its greatest value."""
    figure, axis = _canvas(1 + 0.5 * len(names))
    medians = [one.median for one in figures]
    around = [[one.median - one.low for one in figures], [one.high - one.median for one in figures]]
    axis.barh(names, medians, xerr=around, color="tab:blue", capsize=3, ecolor="#555555")
    axis.invert_yaxis()
    axis.set(xlabel=label, xlim=(0, None))
    return _saved(figure)


def _canvas(height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(8, height), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.3, axis="x")
    axis.set_axisbelow(True)
    return figure, axis


def _saved(figure: Any) -> str:
    target = io.BytesIO()
    figure.savefig(target, format="svg")
    return _address(target)


def _address(target: io.BytesIO) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(target.getvalue()).decode()
