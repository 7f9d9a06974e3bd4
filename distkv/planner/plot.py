"""Plans as a picture: what the memory of a GPU is for, and what a step costs over the context."""

from dataclasses import replace
from pathlib import Path

from distkv.planner.fit import RankMemory
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest
from distkv.planner.units import shown_tokens
from distkv.reporting.out_file import writing

GIB = 2**30
POINTS_PER_DOUBLING = 4
LEAST_CONTEXT = 1024  # tokens, where the curves begin


def write_plot(path: Path, plans: list[Plan]) -> None:
    """A PNG for plans of one model: above the memory of the fullest rank for each kind and number of GPUs, below the
    time of a decode step over the context, with a mark where a curve leaves the devices. Raises StoreError."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(10, 8), layout="constrained")
    memory_axis, time_axis = figure.subplots(2, 1, height_ratios=(2, 3))
    setups = {_label(plan.request): plan for plan in plans}
    _draw_memory(memory_axis, setups)
    _draw_times(time_axis, plans)
    figure.suptitle(f"{plans[0].request.model.name}, KV in {plans[0].request.kv_shown}")
    with writing(path):
        figure.savefig(path, dpi=120, format="png")


def _draw_memory(axis, setups: dict[str, Plan]) -> None:  # type: ignore[no-untyped-def]
    fullest: list[RankMemory] = [
        min(plan.fit.ranks, key=lambda rank: rank.left // rank.page_bytes) for plan in setups.values()
    ]
    whole = [plan.request.hardware.memory_bytes for plan in setups.values()]
    parts = {
        "weights": [one.weights for one in fullest],
        "workspace": [one.workspace + one.context + one.staging for one in fullest],
        "left for KV": [max(0, one.left) for one in fullest],
    }
    done = [0] * len(fullest)
    for (name, sizes), color in zip(parts.items(), ("tab:gray", "tab:orange", "tab:green"), strict=True):
        axis.barh(
            list(setups), [size / GIB for size in sizes], left=[one / GIB for one in done], label=name, color=color
        )
        done = [before + size for before, size in zip(done, sizes, strict=True)]
    for row, size in enumerate(whole):
        axis.plot([size / GIB] * 2, [row - 0.4, row + 0.4], color="black", label="its memory" if row == 0 else None)
    axis.invert_yaxis()
    axis.set(xlabel="GiB on the fullest rank", xlim=(0, None))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_times(axis, plans: list[Plan]) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.ticker import LogLocator

    contexts = _contexts(max(plan.request.context for plan in plans))
    curves = {(_label(plan.request), plan.request.concurrency): plan.request for plan in plans}
    several = len({concurrency for _, concurrency in curves}) > 1
    for (label, concurrency), request in curves.items():
        found = [make_plan(replace(request, context=context)) for context in contexts]
        name = f"{label}, {concurrency} at a time" if several else label
        points = [(p.request.context, 1e3 * p.decode.seconds, p) for p in found if p.decode is not None and p.fits]
        if not points:
            continue
        [line] = axis.plot([context for context, _, _ in points], [ms for _, ms, _ in points], label=name)
        cold = next(((context, ms) for context, ms, p in points if any(t.used_pages for t in p.fit.tiers[1:])), None)
        if cold is not None:
            axis.plot(*cold, marker="v", color=line.get_color())
        if len(points) < len(found):
            axis.plot(*points[-1][:2], marker="x", color=line.get_color())
    axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="ms per step, at least")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    ticks = contexts[::POINTS_PER_DOUBLING]
    axis.set_xticks(ticks, [shown_tokens(tick) for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    loads = {concurrency for _, concurrency in curves}
    load = "" if several else f"{loads.pop()} at a time; "
    axis.set_title(f"{load}▼ KV begins to lie below the devices, x no longer fits", fontsize="medium")
    if axis.lines:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _contexts(largest: int) -> list[int]:
    """From LEAST_CONTEXT on to twice the largest that is planned for, evenly on a logarithmic scale."""
    found, context = [], float(LEAST_CONTEXT)
    while context <= max(2 * largest, 4 * LEAST_CONTEXT):
        found.append(round(context))
        context *= 2 ** (1 / POINTS_PER_DOUBLING)
    return found


def _label(request: PlanRequest) -> str:
    name = request.hardware.name.removeprefix("GeForce ")
    return f"{request.tensor_parallel_size} {'on' if request.hardware.is_cpu else 'x'} {name}"
