"""A measurement of a GPU in parts: each has its rows and its table, which are kept if a later one fails."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distkv.bench.device import DeviceMeter, Turns, check_parts, device_facts, require_cuda
from distkv.reporting.machine import write_json
from distkv.reporting.out_file import check_out_file
from distkv.reporting.tables import Column, print_rows


def measure_parts(
    facts: dict[str, Any],
    parts: tuple[str, ...],
    columns: dict[str, list[Column]],
    only: list[str],
    json_file: Path | None,
    rows_of: Callable[[str, Turns], Iterator[dict[str, Any]]],
) -> tuple[Console, list[dict[str, Any]]]:
    """Prints facts and tables, and writes the rows; returns the console, for more lines, and the rows.

    Args:
        facts: "benchmark", the name of the command, and "repeats" among them.
        columns: of the table of each part.
        only: the parts to measure; none for all.
        rows_of: measures a part.

    Raises ConfigError without a CUDA device or for a part that there is not.
    """
    require_cuda(facts["benchmark"])
    chosen = check_parts(only, parts)
    check_out_file(json_file)
    console = Console(highlight=False)
    facts |= device_facts()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), soft_wrap=True)
    rows: list[dict[str, Any]] = []
    turns = Turns(DeviceMeter(), torch.device("cuda"), facts["repeats"])
    for part in chosen:
        measured = list(rows_of(part, turns))
        print_rows(console, columns[part], measured)
        rows += measured
        write_json(json_file, facts, rows)  # now, since a later part may fail
        gc.collect()
        torch.cuda.empty_cache()
    return console, rows
