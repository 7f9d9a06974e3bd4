"""What all benchmarks share: turns that alternate, medians with their spread, the facts of the machine, the file of
the figures, and a bar that says how far they are.

    with Bench("decode", options, num_threads, model=model.name) as bench:
        for context in contexts:
            taken = bench.in_turns({"distkv": one, "peer": other}, f"context {context}")
            for name, seconds in taken.items():
                bench.add({"engine": name, "context": context, "seconds": Figure.of(seconds)})
        bench.table(COLUMNS)
        return bench.verdict(wrong, "All answers are the same.")
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Self, TypeVar

from rich.console import Console, Group
from rich.progress_bar import ProgressBar

from distkv.bench.options import BenchOptions
from distkv.errors import StoreError
from distkv.reporting.figure import Figure as Figure
from distkv.reporting.live_view import LiveView
from distkv.reporting.machine import machine_facts, write_json
from distkv.reporting.out_file import check_out_file
from distkv.reporting.tables import Column, print_rows
from distkv.workers.threads import use_threads

Row = dict[str, Any]
"""Figures that belong together: numbers, texts, `Figure`s."""
Result = TypeVar("Result")


class Bench:
    """A run of one benchmark. As a context manager it prints the facts when it begins and, where the file of the
    figures could not be written, raises StoreError when all is measured and printed."""

    def __init__(
        self, name: str, options: BenchOptions, num_threads: int | None = None, console: Console | None = None,
        **facts: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            name: of the command behind `distkv bench`.
            num_threads: that torch computes with in this process from now on, see `use_threads`.
            console: where tables and lines go; None for stdout.
            facts: what was measured: the model, sizes and the like. More of them may be put into `facts` later.

        Raises ConfigError when the file of the figures cannot be written, or for too many threads.
        """
        check_out_file(options.json)
        use_threads(num_threads)
        self.options = options
        self.console = Console(highlight=False) if console is None else console
        self.facts: dict[str, Any] = {
            "benchmark": name, **facts, "repeats": options.repeats, "quick": options.quick, **machine_facts(),
            "load_average": round(os.getloadavg()[0], 2),  # of the minute before: what else the machine was doing
        }  # fmt: skip
        self.rows: list[Row] = []
        self._view = TurnView()
        self._failure: StoreError | None = None

    def __enter__(self) -> Self:
        self.line(", ".join(f"{name} {_short(value)}" for name, value in self.facts.items()))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._view.hide()
        if kind is None and self._failure is not None:
            raise self._failure

    def turns(self, names: Iterable[str], title: str = "", warm_up: int = 1) -> Iterator[tuple[int, str]]:
        """The number of a turn and whose it is, in the order A B A B: what else happens on the machine meets all of
        them. Turns to warm up come first and have negative numbers; what they give is not to be counted, since the
        first products of a size take longer."""
        whose = list(names)
        repeats = self.options.repeats
        total = len(whose) * (warm_up + repeats)
        for number in range(total):
            turn, name = number // len(whose) - warm_up, whose[number % len(whose)]
            when = f"turn {turn + 1} of {repeats}" if turn >= 0 else "warm-up"
            self._view.show(", ".join(filter(None, (title, name, when))), number, total)
            yield turn, name

    def in_turns(
        self, works: Mapping[str, Callable[[], Result]], title: str = "", warm_up: int = 1
    ) -> dict[str, list[Result]]:
        """What each work has returned in its `repeats` turns, see `turns`."""
        taken: dict[str, list[Result]] = {name: [] for name in works}
        for turn, name in self.turns(works, title, warm_up):
            result = works[name]()
            if turn >= 0:
                taken[name].append(result)
        return taken

    def doing(self, what: str) -> None:
        """Says on a terminal what takes time outside of turns, until the next turn or line."""
        self._view.show(what, 0, 0)

    def add(self, row: Row) -> None:
        """Takes a row in, and writes it to the file with all that came before."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Writes facts and rows to the file, if there is one. The first failure is raised at the end, and the file
        left alone from then on: what is still to be measured is wanted all the same."""
        if self._failure is None:
            try:
                write_json(self.options.json, self.facts, self.rows)
            except StoreError as error:
                self._failure = error

    def line(self, text: str) -> None:
        """Prints a line."""
        self._view.hide()
        self.console.print(text, soft_wrap=True, markup=False)

    def table(self, columns: list[Column], rows: list[Row] | None = None, across: bool = False) -> None:
        """Prints the rows, or without them all that were added; see `print_rows`."""
        self._view.hide()
        print_rows(self.console, columns, self.rows if rows is None else rows, across)

    def verdict(self, wrong: str, right: str) -> bool:
        """Prints what is wrong, or what is right where `wrong` is empty, and has the file say it; returns whether all
        is right."""
        self.facts["wrong"] = wrong or None
        self.write()
        self.line(f"WRONG: {wrong}" if wrong else right)
        return not wrong


class TurnView(LiveView):
    """A bar on stderr while something is measured, if that is a terminal. It is drawn between turns alone: a thread
    that draws it would be measured too."""

    def __init__(self) -> None:
        super().__init__(Console(stderr=True, highlight=False), transient=True)

    def show(self, what: str, done: int, total: int) -> None:
        """One line, and a bar below it where there is a total."""
        if self._live is None:
            return
        self.__enter__()
        bar = [ProgressBar(total=total, completed=done, width=40)] if total else []
        with suppress(OSError):  # a terminal that is gone
            self._live.update(Group(what, *bar), refresh=True)

    def hide(self) -> None:
        """Until the next `show`; what goes to the same terminal meanwhile is not drawn over."""
        self.__exit__()


def _short(value: object) -> str:
    """A fact for the eye; the file has the whole of it."""
    return f"{len(value)} values" if isinstance(value, list | dict) else str(value)
