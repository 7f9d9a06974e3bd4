"""What all benchmarks share: turns, figures, the file, the bar."""

import io
import json
import os
import pty
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from distkv.bench import harness
from distkv.bench.harness import Bench, Figure
from distkv.bench.options import BenchOptions
from distkv.commands.options import measuring, sized, spread
from distkv.errors import ConfigError, StoreError
from distkv.reporting.machine import machine_facts
from distkv.reporting.tables import Column, print_rows


def quiet(options: BenchOptions, **facts: Any) -> Bench:
    """A benchmark whose lines are in `console.file`."""
    return Bench("bake", options, console=Console(file=io.StringIO(), width=200, highlight=False), **facts)


def printed(bench: Bench) -> str:
    assert isinstance(bench.console.file, io.StringIO)
    return bench.console.file.getvalue()


def test_a_figure_has_its_spread() -> None:
    figure = Figure.of([0.2, 0.5, 0.1, 0.4])
    assert figure == Figure(pytest.approx(0.3), 0.1, 0.5)
    assert figure.scaled(1e3).show(".0f") == "300 (100-500)"
    assert figure.rate(2) == Figure(pytest.approx(2 / 0.3), 4, 20), "the longest time is the lowest rate"
    assert Figure.of([3]).show(".1f") == "3.0"
    with pytest.raises(ValueError):
        Figure.of([])


def test_works_take_turns_and_those_that_warm_up_do_not_count() -> None:
    done: list[str] = []

    def work(name: str) -> int:
        done.append(name)
        return len(done)

    with quiet(BenchOptions(repeats=2)) as bench:
        taken = bench.in_turns({"a": lambda: work("a"), "b": lambda: work("b")}, warm_up=1)
        assert "".join(done) == "ab" * 3 and taken == {"a": [3, 5], "b": [4, 6]}
        assert list(bench.turns("ab", warm_up=0)) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
        assert [turn for turn, _ in bench.turns("a", warm_up=2)] == [-2, -1, 0, 1]
    assert printed(bench).startswith("benchmark bake, repeats 2, quick False, machine")


def test_each_row_is_written_as_it_comes(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    with quiet(BenchOptions(json=figures), cake="plum") as bench:
        bench.add({"n": 1, "seconds": Figure(0.2, 0.1, 0.5)})
        written = json.loads(figures.read_text())
        assert written["rows"] == [{"n": 1, "seconds": {"median": 0.2, "min": 0.1, "max": 0.5}}]
        assert written.keys() >= {*machine_facts(), "load_average"} and (written["benchmark"], written["cake"]) == (
            "bake",
            "plum",
        )
        bench.table([Column("n", "n"), Column("ms", "seconds", 1e3, ".0f")])
        assert not bench.verdict("it is burnt", "It is done.")
    assert "200 (100-500)" in printed(bench) and "WRONG: it is burnt" in printed(bench)
    assert json.loads(figures.read_text())["wrong"] == "it is burnt"
    assert bench.verdict("", "It is done.") and json.loads(figures.read_text())["wrong"] is None


def test_tables_break_no_word_where_they_can_fit() -> None:
    columns = [Column(f"cold bytes {name}", name) for name in "abcd"] + [Column("ms per token", "ms", form=".2f")]
    row = dict.fromkeys("abcd", "transformers") | {"ms": Figure(312.4, 296.78, 334.27)}
    for width, breaks in ((200, False), (80, False), (70, False), (60, True)):
        console = Console(file=io.StringIO(), width=width)
        print_rows(console, columns, [row])
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        whole = sum(line.count("transformers") for line in lines) == 4 and any(
            "(296.78-334.27)" in one for one in lines
        )
        assert whole is not breaks
        assert any("312.40 (296" in line for line in lines) is (width == 200)


def test_a_file_that_fails_costs_no_figure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        quiet(BenchOptions(json=tmp_path))
    bench = quiet(BenchOptions(json=Path("/dev/full")))
    with pytest.raises(StoreError, match="/dev/full"), bench:
        bench.add({"n": 1})
        bench.add({"n": 2})
        bench.table([Column("n", "n")])
        bench.line("the end")
    assert len(bench.rows) == 2 and "the end" in printed(bench)
    with pytest.raises(KeyError), bench:  # which matters more than the file
        raise KeyError


def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And taken away before anything is printed, which may go to the same terminal."""
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        with quiet(BenchOptions(repeats=1)) as bench:
            bench.in_turns({"a": lambda: None}, "layer 3")
            bench.doing("cooling")
            assert bench._view._live is not None and bench._view._live.is_started
            bench.line("done")
            assert not bench._view._live.is_started
    shown = b""
    with suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 10000):
            shown += piece
    os.close(ours)
    assert all(text in shown.decode() for text in ("layer 3, a, warm-up", "layer 3, a, turn 1 of 1", "cooling"))
    assert b"done" not in shown
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with quiet(BenchOptions(repeats=1)) as bench:
        bench.in_turns({"a": lambda: None})
    assert harness.TurnView()._live is None


def test_quick_stands_for_sizes_that_are_not_given() -> None:
    got: list[Any] = []
    app = typer.Typer()

    @app.command()
    @spread
    def bake(
        *,
        layers: Annotated[list[int], typer.Option(help="Layers.")] = sized([8, 16], [2]),
        eggs: Annotated[int, typer.Option(help="Eggs.", min=1)] = sized(6, 1),
        measured: Annotated[BenchOptions, measuring(repeats=sized(5, 2))],
    ) -> None:
        got.append((layers, eggs, measured))

    def run(*arguments: str) -> Any:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
        return got.pop()

    assert run() == ([8, 16], 6, BenchOptions(5, False, None))
    assert run("--quick") == ([2], 1, BenchOptions(2, True, None))
    given = run("--quick", "--layers", "3", "--layers", "4", "--repeats", "9", "--json", "x.json")
    assert given == ([3, 4], 1, BenchOptions(9, True, Path("x.json").absolute()))
    text = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    assert "8, 16; 2 with --quick" in text and "5; 2 with --quick" in text and "--no-quick" not in text
    with pytest.raises(ConfigError, match="repeats is 0"):
        run("--repeats", "0")
