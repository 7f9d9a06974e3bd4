"""Plans as tables for people, narrow enough for 80 columns."""

from collections.abc import Callable, Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distkv.planner.fit import RankMemory
from distkv.planner.hardware import Hardware
from distkv.planner.plan import Plan
from distkv.planner.request import PlanRequest
from distkv.planner.roofline import Cost
from distkv.planner.units import (
    shown_bandwidth,
    shown_bytes,
    shown_count,
    shown_rate,
    shown_seconds,
    shown_share,
    shown_tokens,
)
from distkv.storage.tier import Tier
from distkv.workers.attention.policies.registry import FULL
from distkv.workers.rank_config import model_page_spec

MOST_COLUMNS = 3  # plans whose times are shown by what they are spent on
MOST_ADVICE = 8  # sentences for a kind of hardware


def print_plans(console: Console, plans: list[Plan]) -> None:
    """All plans of one model: a group of tables for each kind of hardware."""
    _print_model(console, plans[0])
    for hardware in dict.fromkeys(plan.request.hardware for plan in plans):
        own = [plan for plan in plans if plan.request.hardware == hardware]
        console.print()
        _print_hardware(console, hardware)
        if own[0].request.nodes > 1:
            print_nodes(console, own[0].request)
        console.print(_memory_table(own))
        console.print(_capacity_table(own))
        console.print(_step_table(own))
        if any(plan.request.is_spread for plan in own) and len(own) <= MOST_COLUMNS:
            console.print(_time_table(own))
        print_advice(console, own)
    if len(plans) == 1 and plans[0].command is not None:
        print_line(console, f"\nTo serve it: {plans[0].command}")
    print_caveat(console, [plan.request.hardware for plan in plans])


def print_line(console: Console, text: str, name: str = "", style: str = "") -> None:
    """As it stands, after a bold name if there is one: names of folders may look like markup, and commands are copied,
    so that lines are left to the terminal to break."""
    console.print(Text.assemble((name, "bold"), text, style=style), soft_wrap=True)


def print_caveat(console: Console, hardware: list[Hardware]) -> None:
    """How far the times can be trusted."""
    rates = "Times are lower bounds, by rates that are the most the hardware can do"
    if all(one.is_measured for one in hardware):
        rates = "Times are estimates, by rates that were measured on this machine"
    how = f"{rates}, with every request at its full context. docs/planning.md has the formulas."
    print_line(console, f"\n{how}", style="dim")


def print_advice(console: Console, plans: list[Plan]) -> None:
    """What to change: all that there is to say of one plan, or the most pressing of each, once."""
    first: dict[str, Plan] = {}
    for plan in plans:
        for sentence in plan.advice if len(plans) == 1 else plan.advice[:1]:
            first.setdefault(sentence, plan)
    for sentence, plan in list(first.items())[:MOST_ADVICE]:
        where = f"{_context(plan)} on {_ranks(plan)}, {plan.request.concurrency} at a time: "
        print_line(console, f"- {where if len(plans) > 1 else ''}{sentence}")
    if len(first) > MOST_ADVICE:
        print_line(console, f"- and {len(first) - MOST_ADVICE} more, which --json has.")


def right_table(title: str, columns: Iterable[str], last_left: bool = False) -> Table:
    """An empty table whose columns are aligned to the right, but perhaps for the last one, which is words."""
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    names = list(columns)
    for name in names:
        table.add_column(name, justify="left" if last_left and name is names[-1] else "right", overflow="fold")
    return table


def _print_model(console: Console, plan: Plan) -> None:
    request, config = plan.request, plan.request.model.config
    spec = model_page_spec(config, request.page_size, request.run_dtype, request.kv_cache_dtype)
    print_line(
        console,
        f": {shown_count(request.model.num_parameters)} parameters in {request.run_dtype}, "
        f"{shown_bytes(request.model.num_parameters * request.item_bytes)}; at most "
        f"{shown_tokens(config.most_positions)} tokens of context",
        request.model.name,
    )
    print_line(
        console,
        f"KV of a token in {request.run_dtype}: 2 * {config.num_hidden_layers} layers * "
        f"{config.num_key_value_heads} KV heads * {config.head_dim} * {request.item_bytes} bytes = "
        f"{shown_bytes(spec.bytes_per_token)}",
    )
    if spec.format is not None:
        size, ratio = spec.bytes_per_token_in(Tier.HOST), spec.page_bytes / spec.page_bytes_in(Tier.HOST)
        print_line(
            console,
            f"Below the device, as {request.kv_cache_dtype} with its scales: {shown_bytes(size)}, {ratio:.2f} times "
            "less",
        )
    if request.attention_policy != FULL:
        print_line(
            console,
            f"By {request.attention_policy} a token of an answer reads {shown_share(request.share_read)} of its pages "
            f"at {shown_tokens(request.context)} tokens",
        )


def _print_hardware(console: Console, hardware: Hardware) -> None:
    kind = "CPU, measured" if hardware.is_cpu and hardware.is_measured else "measured" if hardware.is_measured else ""
    print_line(
        console,
        f"{f' ({kind})' if kind else ''}: {shown_bytes(hardware.memory_bytes)} at "
        f"{hardware.memory_bandwidth / 1e9:.4g} GB/s, {hardware.matrix_rate / 1e12:.4g} Tflop/s, "
        f"{hardware.host_link / 1e9:.3g} GB/s from the host, {hardware.disk_bandwidth / 1e9:.3g} GB/s from disk "
        f"({hardware.source})",
        hardware.name,
    )


def print_nodes(console: Console, request: PlanRequest) -> None:
    """What the GPUs of a node share."""
    node = request.node
    sizes = (("memory", node.memory), ("disk", node.disk))
    below = "".join(f", {shown_bytes(size)} of {name} for KV" for name, size in sizes if size is not None)
    disk = shown_bandwidth(request.hardware.disk_bandwidth)
    print_line(
        console,
        f"{request.nodes} nodes, of which each uses {request.ranks_per_node} GPUs{below}: "
        f"{shown_bandwidth(node.memory_bandwidth)} from host memory, {disk} from disk, "
        f"{shown_bandwidth(node.network)} to other nodes, {shown_seconds(node.latency)} a message (assumed)",
    )


def _time_table(plans: list[Plan]) -> Table:
    """What a step and a first token take by what it is spent on, a column each; what others hide is in it too."""
    about = [(_context(plan), layout_shown(plan.request), f"{plan.fit.running} running") for plan in plans]
    varies = [len(set(kind)) > 1 for kind in zip(*about, strict=True)]
    setups = [", ".join(one for one, shown in zip(name, varies[:2], strict=False) if shown) for name in about]
    loads = [f"{name[2]}" if varies[2] else "a step" for name in about]
    columns = {", ".join(filter(None, names)): plan.decode for *names, plan in zip(setups, loads, plans, strict=True)}
    for name, plan in zip(setups, plans, strict=True):
        columns[", ".join(filter(None, (name, "first token")))] = plan.first_token
    table = right_table("What a step's time goes to, and a first token's", ("", *columns))
    table.columns[0].justify = "left"
    found = [one for one in columns.values() if one is not None]

    def add(label: str, show: Callable[[Cost], str]) -> None:
        table.add_row(label, *("" if one is None else show(one) for one in columns.values()))

    def add_parts(indent: str, parts: Callable[[Cost], Mapping[str, float]]) -> None:
        for name in dict.fromkeys(name for one in found for name, value in parts(one).items() if value):
            add(indent + name, lambda one: shown_seconds(parts(one)[name]))  # noqa: B023  (called at once)

    add_parts("", lambda one: one.parts)
    add_parts("  ", lambda one: one.between_ranks)
    table.add_section()
    add("in all", lambda one: shown_seconds(one.seconds))
    if any(one.idle for one in found):
        add("stages wait", lambda one: shown_share(one.idle))
    return table


def layout_shown(request: PlanRequest) -> str:
    """Ranks of a stage, stages, and ranks of a context group, where there are any."""
    stages, group = request.pipeline_parallel_size, request.decode_context_parallel_size
    return f"{request.tensor_parallel_size}{f'x{stages}' * (stages > 1)}{f'/{group}' * (group > 1)}"


def _memory_table(plans: list[Plan]) -> Table:
    """The rank with the least room, once for each number of ranks."""
    table = right_table(
        "Memory of the fullest rank", (_unit(plans), "usable", "weights", "workspace", "ring", "left for KV")
    )
    rows = []
    for plan in plans:
        one: RankMemory = min(plan.fit.ranks, key=lambda rank: rank.left // rank.page_bytes)
        row = (
            layout_shown(plan.request), shown_bytes(one.memory), shown_bytes(one.weights),
            shown_bytes(one.workspace + one.context), shown_bytes(one.staging), shown_bytes(one.left),
        )  # fmt: skip
        rows.append(row)
    return _with_each_once(table, rows)


def _capacity_table(plans: list[Plan]) -> Table:
    """Requests of a length that each tier holds, all of each in one tier."""
    tiers = [
        name for index, name in enumerate(("device", "host", "disk")) if any(p.fit.tiers[index].pages for p in plans)
    ]
    table = right_table(
        "Requests that fit",
        ("context", _unit(plans), "KV of one", *(tiers or ["device"]), "all", "tokens in all"),
    )
    rows = []
    for plan in plans:
        fit = plan.fit
        row = (
            _context(plan), layout_shown(plan.request), shown_bytes(fit.kv_bytes_per_request),
            *(str(tier.requests) for tier in fit.tiers if tier.name in (tiers or ["device"])),
            str(fit.most_requests), f"{fit.tokens:,}",
        )  # fmt: skip
        rows.append(row)
    return _with_each_once(table, rows)


def _step_table(plans: list[Plan]) -> Table:
    columns = "context", _unit(plans), "running", "per step", "tokens/s", "first token", "bound by"
    table = right_table("What a step costs", columns, last_left=True)
    for plan in plans:
        asked, running = plan.request.concurrency, plan.fit.running
        table.add_row(
            _context(plan),
            layout_shown(plan.request),
            str(running) if running == asked else f"{running} of {asked}",
            "" if plan.decode is None else shown_seconds(plan.decode.seconds),
            "" if plan.tokens_per_second is None else shown_rate(plan.tokens_per_second),
            "" if plan.first_token is None else shown_seconds(plan.first_token.seconds),
            "no room" if plan.decode is None else plan.decode.limit,
        )
    return table


def _with_each_once(table: Table, rows: Iterable[tuple[str, ...]]) -> Table:
    for row in dict.fromkeys(rows):
        table.add_row(*row)
    return table


def _unit(plans: list[Plan]) -> str:
    return "ranks" if plans[0].request.hardware.is_cpu else "GPUs"


def _context(plan: Plan) -> str:
    return shown_tokens(plan.request.context)


def _ranks(plan: Plan) -> str:
    size = plan.request.layout.size
    kind = "rank" if plan.request.hardware.is_cpu else "GPU"
    return f"{size} {kind}{'s' * (size > 1)}"
