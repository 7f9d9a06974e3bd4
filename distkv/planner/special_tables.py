"""Tables of `--solve` and `--kinds`."""

from rich.console import Console

from distkv.planner.attention_kinds import AttentionKind, GuessedKv
from distkv.planner.request import PlanRequest
from distkv.planner.solve import Solution
from distkv.planner.tables import print_advice, print_caveat, right_table
from distkv.planner.units import option_bytes, shown_bytes, shown_seconds, shown_tokens


def print_solutions(console: Console, target: PlanRequest, solutions: list[Solution], seconds: float | None) -> None:
    """A line for each kind of hardware, the best first, and the command of the best."""
    limit = "" if seconds is None else f", {shown_seconds(seconds)} per token at most"
    console.print(
        f"[bold]{target.model.name}[/bold]: {target.concurrency} requests of {shown_tokens(target.context)} tokens at "
        f"a time{limit}",
        soft_wrap=True,
    )
    if not solutions:
        console.print("No number of GPUs that was tried can share this model; give others with --gpus.")
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
        console.print(f"The {how} is {size} x {name}: {best.plan.command}", soft_wrap=True)
    else:
        console.print(f"Nothing that was tried reaches it; {size} x {name} come nearest:", soft_wrap=True)
        print_advice(console, [best.plan])
    print_caveat(console, [one.plan.request.hardware for one in solutions])


def print_kinds(console: Console, kinds: list[AttentionKind]) -> None:
    """A line for each number of KV heads."""
    request = kinds[0].plan.request
    config = request.model.config
    console.print(
        f"[bold]{request.model.name}[/bold]: {config.num_hidden_layers} layers of {config.num_attention_heads} query "
        f"heads of {config.head_dim}, KV in {request.stored_dtype}, on {request.tensor_parallel_size} x "
        f"{request.hardware.name}",
        soft_wrap=True,
    )
    context = shown_tokens(request.context)
    columns = "kind", "KV heads", "a token", f"{context} tokens", "less", "fit", "per step", ""
    table = right_table("", columns, last_left=True)
    for one in kinds:
        plan = one.plan
        table.add_row(
            one.name, str(one.kv_heads), shown_bytes(plan.fit.kv_bytes_per_token),
            shown_bytes(plan.fit.kv_bytes_per_token * request.context), f"{one.saving:g}x", str(plan.fit.most_requests),
            "" if plan.decode is None else shown_seconds(plan.decode.seconds), "as published" if one.is_own else "",
        )  # fmt: skip
    console.print(table)
    console.print(
        "With fewer KV heads the weights are a little smaller as well; a model has to be trained so.", style="dim",
        soft_wrap=True,
    )  # fmt: skip


def print_guess(console: Console, kv: GuessedKv | None, context: int) -> None:
    """What can be said of GPT-4: nothing but what a guess makes of it."""
    if kv is None:
        console.print(
            "GPT-4: its configuration is not published. Guess: --guess layers=L,heads=H,head_dim=D,kv_heads=K",
            soft_wrap=True,
        )
        return
    console.print(
        f"GPT-4, a guess, since its configuration is not published: {kv.layers} layers, {kv.heads} query heads, "
        f"{kv.kv_heads} KV heads of {kv.head_dim}: {shown_bytes(kv.bytes_per_token)} a token, "
        f"{shown_bytes(kv.bytes_per_token * context)} for {shown_tokens(context)} tokens, "
        f"{kv.heads / kv.kv_heads:g}x less than with a KV head for each query head",
        soft_wrap=True,
    )


def _verdict(one: Solution) -> str:
    if one.reached:
        return "reached"
    return "too slow" if one.plan.fits else "no room"


def _price(amount: float | None) -> str:
    return "" if amount is None else f"{amount:,.2f}"
