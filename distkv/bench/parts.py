"""A measurement of a GPU in parts: each has its rows and its table, and what fails costs no other row."""

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from distkv.bench.device import DeviceMeter, Turns, check_parts, device_facts, require_cuda
from distkv.bench.harness import Bench, Row
from distkv.bench.options import BenchOptions
from distkv.errors import ConfigError, DistKVError
from distkv.reporting.tables import Column


@dataclass(frozen=True)
class Measurement:
    """Rows that are measured together: where one fails, those behind it are missing."""

    name: str  # "batch 1, context 8192"
    measure: Callable[[], Iterable[Row]]


@contextmanager
def measured_parts(
    name: str,
    parts: tuple[str, ...],
    columns: dict[str, list[Column]],
    only: list[str],
    options: BenchOptions,
    figures_of: Callable[[str, Turns], Iterator[Measurement]],
    **facts: Any,
) -> Iterator[Bench]:
    """Prints facts and tables, writes each row to the file as it comes, and yields the benchmark for more lines.

    Args:
        name: of the command.
        columns: of the table of each part.
        only: the parts to measure; none for all.
        figures_of: what there is to measure in a part.
        facts: of what is measured.

    Raises ConfigError without a CUDA device or for a part that there is not, and DistKVError at the end when anything
    has failed.
    """
    require_cuda(name)
    chosen = check_parts(only, parts)
    bench = Bench(name, options, **facts)
    bench.facts |= device_facts()
    failures: list[str] = []
    with bench:
        bench.facts["failures"] = failures
        turns = Turns(DeviceMeter(), torch.device("cuda"), bench)
        for part in chosen:
            first = len(bench.rows)
            try:
                for row in _rows(part, figures_of(part, turns), failures):
                    bench.add(row)
            finally:  # what there is, also when it is interrupted
                bench.table(columns[part], bench.rows[first:])
            bench.write()  # with what has failed
            for line in failures:
                if line.startswith(f"{part}: "):
                    bench.line(f"FAILED {line}")
        yield bench
    if failures:
        raise DistKVError("\n".join([f"{len(failures)} of the measurements failed:", *failures]))


def check_effect(options: dict[str, tuple[object, str]], only: list[str]) -> None:
    """Raises ConfigError for an option that is given for a part that is left out.

    Args:
        options: by name the value, None or empty when it is not given, and the part that it is for.
    """
    for name, (value, part) in options.items():
        if value and only and part not in only:
            raise ConfigError(f"--{name} is for the part {part!r}, which --only leaves out; leave one of them out")


def _rows(part: str, figures: Iterator[Measurement], failures: list[str]) -> Iterator[Row]:
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
