"""`distkv plan`: from texts of the command line to plans, and these to tables and files."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from distkv.errors import ConfigError
from distkv.option_checks import check_whole
from distkv.planner.hardware import find_hardware, with_disk
from distkv.planner.model_shape import find_model
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest
from distkv.planner.tables import print_plans
from distkv.planner.units import parse_tokens
from distkv.reporting.out_file import check_out_file, writing

MOST_PLANS = 200  # that are shown


@dataclass(frozen=True)
class PlanOptions:
    """What `distkv plan` is given; see `distkv plan --help`."""

    model: str
    context: str  # lists with commas
    concurrency: str
    gpu: list[str]
    gpus: str
    request: dict[str, Any]  # further fields of `PlanRequest`
    disk_bandwidth: float | None
    json_file: Path | None


def run(console: Console, options: PlanOptions) -> None:
    """Plans for every mix of the lists, shows the tables and writes the files. Raises ConfigError or StoreError."""
    check_out_file(options.json_file)
    plans = make_plans(options)
    print_plans(console, plans)
    if options.json_file is not None:
        with writing(options.json_file):
            text = json.dumps({"plans": [plan.to_json() for plan in plans]}, indent=1)
            options.json_file.write_text(text + "\n", encoding="utf-8")


def make_plans(options: PlanOptions) -> list[Plan]:
    """A plan for every mix of GPU, context, number of GPUs and concurrency."""
    model = find_model(options.model)
    hardware = [with_disk(find_hardware(one), options.disk_bandwidth) for one in options.gpu]
    contexts = [parse_tokens("--context", one) for one in _listed("--context", options.context)]
    sizes, loads = (
        [_whole(name, one) for one in _listed(name, text)]
        for name, text in (("--gpus", options.gpus), ("--concurrency", options.concurrency))
    )
    mixes = list(itertools.product(hardware, contexts, sizes, loads))
    if len(mixes) > MOST_PLANS:
        raise ConfigError(f"these lists make {len(mixes)} plans; {MOST_PLANS} at most are shown: shorten one")
    return [
        make_plan(
            PlanRequest(model, one, tensor_parallel_size=size, context=context, concurrency=load, **options.request)
        )
        for one, context, size, load in mixes
    ]


def _listed(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{name} is {text!r}; give one or more values with commas between them")
    return list(dict.fromkeys(parts))


def _whole(name: str, text: str) -> int:
    return check_whole(name, int(text) if text.isascii() and text.isdecimal() else text)
