"""`distkv bench cpu-attention`: equal answers, counted bytes, and ceilings that are made of the rates."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distkv import ConfigError
from distkv.bench.cpu_attention import Sizes
from distkv.commands.main import app


def test_what_crosses_and_what_the_cpu_has(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distkv.bench.decoder.PAUSE", 0.01)
    file = tmp_path / "figures.json"
    arguments = "--context 256 --page-size 16 --dtype float32 --link 1GB --share 0.5 --new-tokens 2 --repeats 1"
    result = CliRunner().invoke(
        app, ["bench", "cpu-attention", "--model", str(tiny_model), "--json", str(file), *arguments.split()],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0 and "the same tokens with the same logprobs" in result.output
    told = json.loads(file.read_text())
    off, half = told["rows"]
    page = Sizes(tiny_model, 256, 2, "float32", 16).spec.page_bytes
    assert off["streamed_bytes_per_step"] == told["cold_bytes"] == 13 * page and not off["attended_bytes_per_step"]
    assert half["attended_bytes_per_step"] == 8 * page and half["streamed_bytes_per_step"] < 8 * page
    for row in (off, half):
        both = (1e9 + row["cpu_bytes_per_s"]) / told["cold_bytes"]
        assert row["both_tokens_per_s"] == pytest.approx(both) and row["link_tokens_per_s"] == 1e9 / told["cold_bytes"]
        assert row["reached"] == pytest.approx(row["tokens_per_s"] / both)


def test_what_is_refused(tiny_model: Path) -> None:
    for arguments, message in (
        ("--context 100", "context 100 is not 4 windows of whole pages of 256 tokens, at least 2 each; use 2048"),
        ("--context 2048 --new-tokens 300", "must stay within one page of 256"),
    ):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(
                app, ["bench", "cpu-attention", "--model", str(tiny_model), *arguments.split()], catch_exceptions=False
            )
