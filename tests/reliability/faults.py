"""The faults that are tried, by name. A module of faults registers its own when it is imported."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reliability.trial import Trial


@dataclass(frozen=True)
class Fault:
    """What `run` does to an engine under load, and how often that is tried unless told otherwise."""

    name: str
    text: str  # for the table
    times: int
    run: "Callable[[Trial], None]"


FAULTS: dict[str, Fault] = {}


def fault(name: str, text: str, times: int) -> "Callable[[Callable[[Trial], None]], Callable[[Trial], None]]":
    """Registers a function as a fault. It is given a `Trial`, starts what it needs by that or finds it still there from
    the try before, injects the fault at a moment that the trial's random numbers choose, and has the trial compare."""

    def register(run: "Callable[[Trial], None]") -> "Callable[[Trial], None]":
        assert name not in FAULTS
        FAULTS[name] = Fault(name, text, times, run)
        return run

    return register


def kind_of(fault: Fault) -> str:
    """The module that a fault is in, as in `rank` for `rank_faults.py`."""
    return fault.run.__module__.rpartition(".")[2].removesuffix("_faults")


def load_all() -> None:
    """Imports all modules of this folder that are named `*_faults.py`."""
    for path in sorted(Path(__file__).parent.glob("*_faults.py")):
        importlib.import_module(f"reliability.{path.stem}")
