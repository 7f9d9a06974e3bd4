"""Tables of figures: which field of a row a column shows, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column as TableColumn
from rich.table import Table

from distkv.reporting.figure import Figure

FRAMED: dict[str, Any] = {}  # three characters for each column beside its texts, and one more
UNFRAMED: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "padding": 0}  # one between columns


@dataclass(frozen=True)
class Column:
    """One figure of each row; a field that is missing or None stays empty, and a `Figure` is shown with its spread."""

    title: str
    field: str
    unit: float = 1.0  # what the field is multiplied by
    form: str = ""  # of `format`
    ending: str = ""

    def show(self, row: dict[str, Any]) -> str:
        value = row.get(self.field)
        if value is None:
            return ""
        if isinstance(value, Figure):
            return value.scaled(self.unit).show(self.form) + self.ending
        return format(value * self.unit if self.form else value, self.form) + self.ending


def print_rows(console: Console, columns: list[Column], rows: list[dict[str, Any]], across: bool = False) -> None:
    """A line per row; or, `across` where there are more columns than rows, a line per column."""
    lines = [[column.title for column in columns], *([column.show(row) for column in columns] for row in rows)]
    titles, *others = zip(*lines, strict=True) if across else lines
    columns_of_texts = list(zip(titles, *others, strict=True))
    widths, frame = column_widths(columns_of_texts, console.width - 1 - 3 * len(titles)), FRAMED
    if widths is None:
        widths, frame = column_widths(columns_of_texts, console.width - (len(titles) - 1)), UNFRAMED
    fixed: Sequence[int | None] = widths or [None] * len(titles)
    headings = (TableColumn(title, overflow="fold", width=one) for title, one in zip(titles, fixed, strict=True))
    table = Table(*headings, **frame)
    for line in others:
        table.add_row(*line)
    console.print(table)


def column_widths(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """How wide to make columns of texts so that together they take `room` characters at most and no word is broken:
    where not all texts fit on one line, the first column, by which lines are read, keeps its own before others, and of
    these as many as possible. None where words are too long for that."""
    widths = [max(len(word) for text in texts for word in text.split() or [""]) for texts in columns]
    spare = room - sum(widths)
    if spare < 0:
        return None
    missing = [max(map(len, texts)) - width for texts, width in zip(columns, widths, strict=True)]
    for n in sorted(range(len(columns)), key=lambda n: (n > 0, missing[n])):
        widths[n] += min(spare, missing[n])
        spare -= min(spare, missing[n])
    return widths


def target(what: str, figure: str, is_met: bool) -> str:
    """The line that says whether a target was met."""
    return f"target, {what}: {figure}, {'met' if is_met else 'MISSED'}"
