"""The picture of `distkv bench cache`."""

from pathlib import Path
from typing import IO, Any

from distkv.reporting.out_file import writing

COLORS = {"no cache": "tab:red", "torch.cat": "tab:orange", "paged": "tab:blue"}


def write_plot(path: Path, facts: dict[str, Any]) -> None:
    """A PNG of `draw`. Raises StoreError."""
    with writing(path):
        draw(path, facts, "png")


def draw(target: Path | IO[bytes], facts: dict[str, Any], form: str) -> None:
    """Milliseconds per token over its position, both on logarithmic scales; `form` is "png" or "svg"."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    matplotlib.use("Agg")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, times in facts["position_ms"].items():
        axis.plot(range(1, 1 + len(times)), times, color=COLORS[name], label=name, linewidth=1.5)
    axis.set(xscale="log", yscale="log", xlabel="position of the token", ylabel="ms for the token")
    axis.set_title(f"{facts['model']}, {facts['machine']}, {facts['date']}", fontsize=10)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.set_major_formatter("{x:g}")
        one.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(target, dpi=120, format=form)
