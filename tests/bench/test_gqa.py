"""`distkv bench gqa`: bytes and requests by the formula, on a shape so small that its times mean nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distkv.bench import gqa
from distkv.bench.gqa import Decoded, Sizes
from distkv.commands.main import app
from distkv.errors import ConfigError

SIZES = "--quick", "--shape=tiny", "--context=128", "--new-tokens=8", "--page-size=32", "--mha-requests=2"


def test_fewer_kv_heads_make_room_for_more_requests(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["bench", "gqa", *SIZES, "--json", str(figures)])
    assert result.exit_code == 0, result.exception or result.output
    written = json.loads(figures.read_text())
    assert written["benchmark"] == "gqa" and written["wrong"] is None
    rows = written["rows"]
    assert [(row["kind"], row["query_heads"], row["kv_heads"]) for row in rows] == [
        ("MHA", 4, 4), ("GQA", 4, 2), ("MQA", 4, 1)
    ]  # fmt: skip
    assert [row["kv_bytes_per_token"] for row in rows] == [2 * 2 * heads * 64 * 2 for heads in (4, 2, 1)]
    assert [row["kv_bytes_per_request"] for row in rows] == [4 * 32 * row["kv_bytes_per_token"] for row in rows]
    assert [row["capacity"] for row in rows] == [row["capacity_by_formula"] for row in rows] == [2, 4, 8]
    assert [row["more_requests"] for row in rows] == [1, 2, 4]
    for row in rows:
        assert row["short_ms"]["median"] > 0 and row["long_ms"]["median"] > 0
        assert row["tokens_per_s"]["median"] == pytest.approx(1e3 * row["capacity"] / row["batch_ms"]["median"])
    assert rows[0]["weight_bytes"] > rows[1]["weight_bytes"] > rows[2]["weight_bytes"]
    assert "MQA beside MHA: KV bytes 1/4" in result.output and "4.00x the requests" in result.output


@pytest.mark.parametrize("field, what", [("allocated", "pool has"), ("held", "request holds"), ("capacity", "runs")])
def test_figures_that_are_not_the_formulas_are_wrong(field: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(sizes: Sizes, folder: Path, memory: int, expected: int) -> Decoded:
        page = memory // (2 * sizes.request_pages) * 2 // expected
        good = Decoded(1.0, 2.0, 3.0, expected, 7 * page, 7, sizes.request_pages * page)
        return replace(good, **{field: getattr(good, field) + (expected == 4)})  # with GQA

    monkeypatch.setattr(gqa, "_decode", decode)
    result = CliRunner().invoke(app, ["bench", "gqa", *SIZES])
    assert result.exit_code == 1 and f"WRONG: with GQA the {what}" in " ".join(result.output.split()).replace(
        "memory runs", "runs"
    )


@pytest.mark.parametrize(
    "option, why",
    [
        ("--shape=huge", "use one of tiny"),
        ("--context=100", "try 96"),
        ("--new-tokens=40", "lower it to 31"),
        ("--page-size=48", "power of two"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(option: str, why: str) -> None:
    result = CliRunner().invoke(app, ["bench", "gqa", *SIZES, option])
    assert isinstance(result.exception, ConfigError) and why in str(result.exception), result.output
