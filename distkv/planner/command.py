"""`distkv plan`: from its options to tables and files."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from distkv.option_checks import check_amount
from distkv.planner.attention_kinds import attention_kinds, guessed_kv
from distkv.planner.layouts import find_layouts
from distkv.planner.model_shape import UNPUBLISHED
from distkv.planner.options import SOLVE_SIZES, PlanOptions
from distkv.planner.plan import Plan, make_plan
from distkv.planner.plot import write_plot
from distkv.planner.solve import solve
from distkv.planner.special_tables import print_guess, print_kinds, print_layouts, print_solutions
from distkv.planner.tables import print_plans
from distkv.reporting.out_file import writing


@dataclass(frozen=True)
class Found:
    """What is to be shown and written."""

    show: Callable[[Console], None]
    values: dict[str, Any]  # for --json
    plans: list[Plan]  # for --plot


def run(console: Console, options: PlanOptions) -> None:
    """Prints the tables that are asked for, and writes the files. Raises ConfigError, before anything is printed, or
    StoreError."""
    options.check()
    find = _kinds if options.kinds else _solve if options.solve else _layouts if options.layouts else _plans
    found = find(options)
    try:
        found.show(console)
    finally:  # the files are wanted too where the reader of the tables has left, as head does
        if options.json_file is not None:
            _write_json(options.json_file, found.values)
        if options.plot_file is not None:
            write_plot(options.plot_file, found.plans)


def _plans(options: PlanOptions) -> Found:
    plans = [make_plan(request) for request in options.requests()]
    return Found(partial(print_plans, plans=plans), {"plans": [plan.to_json() for plan in plans]}, plans)


def _solve(options: PlanOptions) -> Found:
    seconds = None if options.ms_per_token is None else check_amount("--ms-per-token", options.ms_per_token) / 1e3
    target, sizes = options.only_request("--solve", of_one_setup=False), options.sizes(SOLVE_SIZES)
    solutions = solve(target, options.priced_hardware(), sizes, seconds, options.prices())
    values = [
        {
            "reached": one.reached,
            "price_per_hour": one.price_per_hour,
            "price_per_million_tokens": one.price_per_million_tokens,
            "plan": one.plan.to_json(),
        }
        for one in solutions
    ]
    show = partial(print_solutions, target=target, solutions=solutions, seconds=seconds)
    return Found(show, {"solutions": values}, [])


def _layouts(options: PlanOptions) -> Found:
    request, nodes = options.one_rank("--layouts")
    plans = find_layouts(request, nodes)
    return Found(partial(print_layouts, plans=plans), {"plans": [plan.to_json() for plan in plans]}, [])


def _kinds(options: PlanOptions) -> Found:
    guess, dtype = options.guesses(), str(options.request.get("dtype", "auto"))
    kv = None if guess is None else guessed_kv(guess, "float16" if dtype == "auto" else dtype)
    context = options.only_context("--kinds")
    is_unpublished = options.model.lower() == UNPUBLISHED
    kinds = [] if is_unpublished else attention_kinds(options.only_request("--kinds"))
    values = [
        {
            "kind": one.name,
            "kv_heads": one.kv_heads,
            "is_own": one.is_own,
            "saving": one.saving,
            "plan": one.plan.to_json(),
        }
        for one in kinds
    ]

    def show(console: Console) -> None:
        if kinds:
            print_kinds(console, kinds)
        print_guess(console, kv, context)

    guessed = {"published": False, "guess": None if kv is None else asdict(kv)}
    return Found(show, {"kinds": values, "gpt-4": guessed}, [])


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with writing(path):
        path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
