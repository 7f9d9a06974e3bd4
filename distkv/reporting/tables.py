"""Tables of figures: which field of a row a column shows, and how."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column as TableColumn
from rich.table import Table

from distkv.reporting.figure import Figure


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
    table = Table(*(TableColumn(title, overflow="fold") for title in titles))
    for line in others:
        table.add_row(*line)
    console.print(table)


def target(what: str, figure: str, is_met: bool) -> str:
    """The line that says whether a target was met."""
    return f"target, {what}: {figure}, {'met' if is_met else 'MISSED'}"
