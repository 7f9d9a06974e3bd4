"""The picture of `distkv bench quality`."""

from pathlib import Path
from typing import Any

from distkv.bench.harness import Row
from distkv.reporting.out_file import writing

COLORS = {"auto": "tab:blue", "fp8_e4m3": "tab:orange", "int8": "tab:green", "int4": "tab:red"}


def write_plot(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    """A PNG of what perplexity adds, and of the mean score of the tasks, over the bytes that a step brings from the
    host. Raises StoreError."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, field, label in (
        (left, "added", "added to perplexity, %"),
        (right, "score", "mean score of the tasks, %"),
    ):
        labelled: set[tuple[float, float]] = set()  # the references of all page sizes lie together
        for row in rows:
            at = 100 * row["read_share"], 100 * row[field]
            marker = "o" if row["attention_policy"] == "full" else "s"
            axis.plot(*at, marker, color=COLORS.get(row["kv_cache_dtype"], "tab:grey"))
            if at not in labelled:
                text = f"{row['name']}, pages of {row['page_size']}"
                axis.annotate(text, at, textcoords="offset points", xytext=(5, 4), fontsize=7)
            labelled.add(at)
        axis.set(xscale="log", xlabel="bytes that a step brings from the host, % of full", ylabel=label)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.margins(0.2, 0.1)
    left.set_yscale("symlog", linthresh=0.1)
    left.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(f"{facts['model']}, {facts['machine']}, {facts['date']}", fontsize=10)
    with writing(path):
        figure.savefig(path, dpi=120, format="png")
