"""A measurement of a GPU in parts: each has its rows and its table, and what fails costs no other row."""

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distkv.bench.device import DeviceMeter, Turns, check_parts, device_facts, require_cuda
from distkv.errors import ConfigError, DistKVError
from distkv.reporting.machine import write_json
from distkv.reporting.out_file import check_out_file
from distkv.reporting.tables import Column, print_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """Rows that are measured together: where one fails, those behind it are missing."""

    name: str  # "batch 1, context 8192"
    measure: Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Measured:
    """What came of a measurement."""

    console: Console  # for more lines
    rows: list[Row]
    failures: list[str]

    def raise_failures(self) -> None:
        """To be called when all is printed; raises DistKVError when anything has failed."""
        if self.failures:
            raise DistKVError("\n".join([f"{len(self.failures)} of the measurements failed:", *self.failures]))


def measure_parts(
    facts: dict[str, Any],
    parts: tuple[str, ...],
    columns: dict[str, list[Column]],
    only: list[str],
    json_file: Path | None,
    figures_of: Callable[[str, Turns], Iterator[Figure]],
) -> Measured:
    """Prints facts and tables, and writes each row to the file as it comes.

    Args:
        facts: "benchmark", the name of the command, and "repeats" among them.
        columns: of the table of each part.
        only: the parts to measure; none for all.
        figures_of: what there is to measure in a part.

    Raises ConfigError without a CUDA device or for a part that there is not.
    """
    require_cuda(facts["benchmark"])
    chosen = check_parts(only, parts)
    check_out_file(json_file)
    measured = Measured(Console(highlight=False), [], [])
    facts |= device_facts()
    measured.console.print(", ".join(f"{name} {value}" for name, value in facts.items()), soft_wrap=True)
    facts["failures"] = measured.failures
    turns = Turns(DeviceMeter(), torch.device("cuda"), facts["repeats"])
    for part in chosen:
        first = len(measured.rows)
        try:
            for row in _rows(part, figures_of(part, turns), measured.failures):
                measured.rows.append(row)
                write_json(json_file, facts, measured.rows)
        finally:  # what there is, also when it is interrupted
            print_rows(measured.console, columns[part], measured.rows[first:])
        write_json(json_file, facts, measured.rows)  # with what has failed
        for line in measured.failures:
            if line.startswith(f"{part}: "):
                measured.console.print(f"FAILED {line}", soft_wrap=True, markup=False)
    return measured


def check_effect(options: dict[str, tuple[object, str]], only: list[str]) -> None:
    """Raises ConfigError for an option that is given for a part that is left out.

    Args:
        options: by name the value, None or empty when it is not given, and the part that it is for.
    """
    for name, (value, part) in options.items():
        if value and only and part not in only:
            raise ConfigError(f"--{name} is for the part {part!r}, which --only leaves out; leave one of them out")


def _rows(part: str, figures: Iterator[Figure], failures: list[str]) -> Iterator[Row]:
    """The rows of a part; what fails is taken down, with its traceback on stderr, since all else is still wanted."""
    name = "at its start"
    try:
        for figure in figures:
            name = figure.name
            try:
                yield from figure.measure()
            except Exception as error:
                failures.append(_failure(part, name, error))
            _free()
    except Exception as error:
        failures.append(_failure(part, name, error))
    _free()


def _failure(part: str, name: str, error: Exception) -> str:
    traceback.print_exception(error)
    return f"{part}: {name}: {type(error).__name__}: {error}"


def _free() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    with suppress(RuntimeError):  # after an error that the device does not recover from
        torch.cuda.empty_cache()
