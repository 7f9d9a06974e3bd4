"""`distkv bench book` on a model so small that its times mean nothing: bytes are counted, and answers compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distkv.bench import book
from distkv.commands.main import app
from distkv.errors import ConfigError

SIZES = ("--book-tokens", "192", "--answer-tokens", "5", "--questions", "1", "--questions", "6", "--repeats", "2")


def test_bench_book_counts_one_sweep_a_step_however_many_ask(tiny_model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["bench", "book", "--model", str(tiny_model), "--cache-dir", str(tmp_path), *SIZES]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "float32", "--json", str(figures)])
    assert result.exit_code == 0, result.output
    written = json.loads(figures.read_text())
    assert written["book_bytes"] == 192 * 2 * 2 * 2 * 16 * 4  # 2 layers, 2 KV heads of 16, fp32
    assert [(row["tier"], row["questions"]) for row in written["rows"]] == [
        ("host", 1), ("host", 6), ("disk", 1), ("disk", 6)
    ]  # fmt: skip
    for row in written["rows"]:
        assert row["steps"] == [5, 5], "questions are read in one step, and answers written together"
        assert row["sweeps_per_step"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert row["verdict"] == (None if row["questions"] == 1 else "met")
    for row in written["rows"][:2]:
        assert row["bytes_per_answer"]["median"] == 5 * written["book_bytes"] / row["questions"]
    assert any(moved["disk_streamed"] > 4 * written["book_bytes"] for moved in written["rows"][-1]["bytes_moved"])
    assert "asked alone, with all KV on the device" in result.output
    assert list(tmp_path.iterdir()) == [figures], "the folder of the disk tier is gone"


def test_bench_book_notices_another_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = book._ask

    def tampered(engine: Any, prompts: list[list[int]], sizes: book.Sizes) -> book.Asked:
        asked = ask(engine, prompts, sizes)
        if len(prompts) > 1:
            asked.answers[-1][-1] += 1
        return asked

    monkeypatch.setattr(book, "_ask", tampered)
    result = CliRunner().invoke(app, ["bench", "book", "--model", str(tiny_model), *SIZES])
    assert result.exit_code == 1 and "host, 6: an answer of turn 1 is not the one to its question" in result.output


def test_bench_book_refuses_a_text_beyond_the_models_positions(tiny_model: Path) -> None:
    arguments = ["bench", "book", "--model", str(tiny_model), "--book-tokens", "250"]
    with pytest.raises(ConfigError, match=r"positions of the model; use at most \d+ book-tokens"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
