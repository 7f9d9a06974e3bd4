"""Tables of `--solve` and `--kinds`."""

from rich.console import Console

from distkv.planner.attention_kinds import AttentionKind, GuessedKv
from distkv.planner.plan import Plan
from distkv.planner.request import PlanRequest
from distkv.planner.solve import Solution
from distkv.planner.tables import layout_shown, print_advice, print_caveat, print_line, print_nodes, right_table
from distkv.planner.units import option_bytes, shown_bytes, shown_rate, shown_seconds, shown_tokens

MOST_LAYOUTS = 12  # that are shown


def print_solutions(console: Console, target: PlanRequest, solutions: list[Solution], seconds: float | None) -> None:
    """A line for each kind of hardware, the best first, and the command of the best."""
    limit = "" if seconds is None else f", {shown_seconds(seconds)} per token at most"
    print_line(
        console,
        f": {target.concurrency} request{'s' * (target.concurrency > 1)} of {shown_tokens(target.context)} tokens at a "
        f"time{limit}",
        target.model.name,
    )
    if not solutions:
        print_line(console, "No number of GPUs that was tried can share this model; give others with --gpus.")
        return
    requests = [one.plan.request for one in solutions]
    below = [name for name in ("host", "disk") if any(getattr(one, f"{name}_kv_bytes") for one in requests)]
    priced = any(one.price_per_hour is not None for one in solutions)
    prices = ["per hour", "per Mtoken"] if priced else []
    table = right_table("Smallest setups", ["GPUs", *below, "running", "per step", *prices, "target"], last_left=True)
    for one in solutions:
        request, plan = one.plan.request, one.plan
        sizes = {"host": request.host_kv_bytes, "disk": request.disk_kv_bytes}
        table.add_row(
            f"{request.tensor_parallel_size} x {request.hardware.name.removeprefix('GeForce ')}",
            *(option_bytes(sizes[name]) if sizes[name] else "" for name in below),
            f"{plan.fit.running} of {request.concurrency}" if not plan.fits else str(plan.fit.running),
            "" if plan.decode is None else shown_seconds(plan.decode.seconds),
            *([_price(one.price_per_hour), _price(one.price_per_million_tokens)] if priced else []),
            _verdict(one),
        )
    console.print(table)
    best = solutions[0]
    size, name = best.plan.request.tensor_parallel_size, best.plan.request.hardware.name
    if best.reached:
        how = "cheapest" if priced else "smallest"
        command = "" if best.plan.command is None else f": {best.plan.command}"
        print_line(console, f"The {how} is {size} x {name}{command}")
    else:
        print_line(console, f"Nothing that was tried reaches it; {size} x {name} comes nearest:")
    if not best.reached or best.plan.command is None:
        print_advice(console, [best.plan])
    print_caveat(console, [one.plan.request.hardware for one in solutions])


def print_layouts(console: Console, plans: list[Plan]) -> None:
    """A line for each of the fastest, and what is to be said of the first."""
    if not plans:
        print_line(console, "This model cannot be cut into as many ranks as these nodes have GPUs; give others.")
        return
    request = plans[0].request
    print_line(
        console,
        f": {request.concurrency} request{'s' * (request.concurrency > 1)} of {shown_tokens(request.context)} tokens "
        f"at a time on {request.layout.size} x {request.hardware.name}",
        request.model.name,
    )
    print_nodes(console, request)
    columns = "layout", "KV", "running", "per step", "tokens/s", "wait", "first token", "bound by"
    table = right_table("Layouts, tensor ranks x stages / context group, the fastest first", columns, last_left=True)
    for plan in plans[:MOST_LAYOUTS]:
        one, decode, first = plan.request, plan.decode, plan.first_token
        table.add_row(
            layout_shown(one), f"{one.copies_of_kv:.3g}x",
            str(plan.fit.running) if plan.fits else f"{plan.fit.running} of {one.concurrency}",
            "" if decode is None else shown_seconds(decode.seconds),
            "" if plan.tokens_per_second is None else shown_rate(plan.tokens_per_second),
            "" if decode is None else f"{decode.idle:.0%}",
            "" if first is None else shown_seconds(first.seconds),
            "no room" if decode is None else decode.limit,
        )  # fmt: skip
    console.print(table)
    if len(plans) > MOST_LAYOUTS:
        print_line(console, f"and {len(plans) - MOST_LAYOUTS} more, which --json has")
    print_advice(console, plans[:1])
    print_caveat(console, [request.hardware])


def print_kinds(console: Console, kinds: list[AttentionKind]) -> None:
    """A line for each number of KV heads."""
    request = kinds[0].plan.request
    config = request.model.config
    print_line(
        console,
        f": {config.num_hidden_layers} layers of {config.num_attention_heads} query heads of {config.head_dim}, KV in "
        f"{request.kv_shown}, on {request.tensor_parallel_size} x {request.hardware.name}",
        request.model.name,
    )
    context = shown_tokens(request.context)
    columns = "kind", "KV heads", "a token", f"{context} tokens", "less", "fit", "per step", ""
    table = right_table("", columns, last_left=True)
    for one in kinds:
        plan = one.plan
        table.add_row(
            one.name, str(one.kv_heads), shown_bytes(plan.fit.kv_bytes_per_token),
            shown_bytes(plan.fit.kv_bytes_per_token * request.context), f"{one.saving:g}x", str(plan.fit.most_requests),
            "" if plan.decode is None else shown_seconds(plan.decode.seconds), "its own" if one.is_own else "",
        )  # fmt: skip
    console.print(table)
    fewer = "With fewer KV heads the weights are a little smaller as well; a model has to be trained so."
    print_line(console, fewer, style="dim")


def print_guess(console: Console, kv: GuessedKv | None, context: int) -> None:
    """What can be said of GPT-4: nothing but what a guess makes of it."""
    if kv is None:
        print_line(
            console, "GPT-4: its configuration is not published. Guess: --guess layers=L,heads=H,head_dim=D,kv_heads=K"
        )
        return
    print_line(
        console,
        f"GPT-4, a guess, since its configuration is not published: {kv.layers} layers, {kv.heads} query heads, "
        f"{kv.kv_heads} KV heads of {kv.head_dim}: {shown_bytes(kv.bytes_per_token)} a token, "
        f"{shown_bytes(kv.bytes_per_token * context)} for {shown_tokens(context)} tokens, "
        f"{kv.heads / kv.kv_heads:g}x less than with a KV head for each query head",
    )


def _verdict(one: Solution) -> str:
    if one.reached:
        return "reached"
    return "too slow" if one.plan.fits else "no room"


def _price(amount: float | None) -> str:
    if amount is None:
        return ""
    return f"{amount:,.2f}" if amount >= 1 else shown_rate(amount)
