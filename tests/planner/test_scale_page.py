"""docs/scale.md and the planner say the same: what the page shows of each command is what the command prints, and each
figure of its text stands in one of them."""

import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distkv.commands.main import app

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
CUT = "..."
GIVEN = ("1 TiB", "64 GB/s")  # what a node has, and a GPU's link by its data sheet
FIGURE = re.compile(r"\b[0-9][0-9.,]* (?:KiB|GiB|TiB|ms|s|min|%|GB/s)(?![a-z])|`[0-9]+x?[0-9]*(?:/[0-9]+)?`")


def shown() -> list[tuple[str, list[str]]]:
    """Each command of the page, and what stands below it."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        lines = block.splitlines()
        for number, line in enumerate(lines):
            if line.startswith("$ "):
                found.append((line[2:], list(takewhile(lambda one: not one.startswith("$ "), lines[number + 1 :]))))
    return found


@pytest.mark.parametrize("command, expected", [pytest.param(*one, id=str(n)) for n, one in enumerate(shown())])
def test_a_command_prints_what_the_page_shows(command: str, expected: list[str]) -> None:
    program, *arguments = shlex.split(command)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "80"})
    assert program == "distkv" and result.exit_code == 0 and expected
    printed = iter([line.rstrip() for line in result.output.splitlines()])
    missing = [line for line in expected if line != CUT and line not in printed]  # in their order
    assert not missing


def test_figures_in_the_text_stand_in_a_table() -> None:
    text = re.sub(r"^```\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    tables = "\n".join(line for command, lines in shown() for line in [command, *lines])
    cells = {cell.strip() for cell in re.split(r"[│\n]", tables)}
    unseen = [one for one in FIGURE.findall(text) if one.strip("`") not in cells and one not in GIVEN]
    assert shown() and not unseen
