"""`distkv plan`: from its options to tables and files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from distkv.planner.attention_kinds import attention_kinds, guessed_kv
from distkv.planner.model_shape import UNPUBLISHED
from distkv.planner.options import SOLVE_SIZES, PlanOptions
from distkv.planner.plan import make_plan
from distkv.planner.solve import solve
from distkv.planner.special_tables import print_guess, print_kinds, print_solutions
from distkv.planner.tables import print_plans
from distkv.reporting.out_file import writing


def run(console: Console, options: PlanOptions) -> None:
    """Prints the tables that are asked for, and writes the files. Raises ConfigError, before anything is printed, or
    StoreError."""
    options.check()
    if options.kinds:
        found = _kinds(console, options)
    elif options.solve:
        found = _solve(console, options)
    else:
        found = _plans(console, options)
    if options.json_file is not None:
        _write_json(options.json_file, found)


def _plans(console: Console, options: PlanOptions) -> dict[str, Any]:
    plans = [make_plan(request) for request in options.requests()]
    print_plans(console, plans)
    if options.plot_file is not None:
        from distkv.planner.plot import write_plot

        write_plot(options.plot_file, plans)
    return {"plans": [plan.to_json() for plan in plans]}


def _solve(console: Console, options: PlanOptions) -> dict[str, Any]:
    seconds = None if options.ms_per_token is None else options.ms_per_token / 1e3
    target, sizes = options.only_request("--solve", of_one_setup=False), options.sizes(SOLVE_SIZES)
    solutions = solve(target, options.priced_hardware(), sizes, seconds, options.prices())
    print_solutions(console, target, solutions, seconds)
    return {
        "solutions": [
            {
                "reached": one.reached,
                "price_per_hour": one.price_per_hour,
                "price_per_million_tokens": one.price_per_million_tokens,
                "plan": one.plan.to_json(),
            }
            for one in solutions
        ]
    }


def _kinds(console: Console, options: PlanOptions) -> dict[str, Any]:
    found: dict[str, Any] = {"kinds": []}
    guess, dtype = options.guesses(), str(options.request.get("kv_dtype", "auto"))
    kv = None if guess is None else guessed_kv(guess, "float16" if dtype == "auto" else dtype)
    context = options.only_context("--kinds")
    if options.model.lower() != UNPUBLISHED:
        kinds = attention_kinds(options.only_request("--kinds"))
        print_kinds(console, kinds)
        found["kinds"] = [
            {
                "kind": one.name,
                "kv_heads": one.kv_heads,
                "is_own": one.is_own,
                "saving": one.saving,
                "plan": one.plan.to_json(),
            }
            for one in kinds
        ]
    print_guess(console, kv, context)
    found["gpt-4"] = {"published": False, "guess": None if kv is None else asdict(kv)}
    return found


def _write_json(path: Path, found: dict[str, Any]) -> None:
    with writing(path):
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
