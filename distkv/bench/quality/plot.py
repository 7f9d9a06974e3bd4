"""The picture of `distkv bench quality`."""

from pathlib import Path
from typing import Any

from distkv.bench.harness import Row
from distkv.reporting.out_file import writing

COLORS = [f"C{number}" for number in range(10)]
MARKERS = "osD^v"


def write_plot(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    """A PNG of what perplexity adds, and of the mean score of the tasks, over the bytes that a step brings from the
    host. Raises StoreError."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, field, label in (
        (left, "added", "added to perplexity, %"),
        (right, "score", "mean score of the tasks, %"),
    ):
        for number, row in enumerate(rows):
            axis.plot(
                100 * row["read_share"], 100 * row[field], MARKERS[number // len(COLORS) % len(MARKERS)],
                color=COLORS[number % len(COLORS)], label=f"{row['name']}, pages of {row['page_size']}",
            )  # fmt: skip
        axis.set(xscale="log", xlabel="bytes that a step brings from the host, % of full", ylabel=label)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.margins(0.1, 0.1)
    left.set_yscale("symlog", linthresh=0.1)
    left.yaxis.set_major_formatter("{x:g}")
    # points lie close together, or on each other as those of the exact cache do, so names stand beside
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{facts['model']}, {facts['machine']}, {facts['date']}", fontsize=10)
    with writing(path):
        figure.savefig(path, dpi=120, format="png")
