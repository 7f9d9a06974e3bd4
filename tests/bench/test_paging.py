"""`distkv bench paging`: lengths, counts of pages, answers, and what it says of a memory that is too large."""

import json
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distkv.bench import paging
from distkv.bench.decode_times import DecodeStep
from distkv.bench.paging_report import explanation, step_ms, step_rows
from distkv.bench.paging_workload import draw_lengths
from distkv.commands.main import app
from distkv.errors import ConfigError
from distkv.reporting.figure import Figure

SIZES = "--num-requests=24", "--max-model-len=256", "--reservations=2", "--quick", "--dtype=float32"


def test_lengths_have_the_published_means_and_fit_the_limit() -> None:
    pairs = draw_lengths(20000, 2048, seed=3)
    prompts, answers = zip(*pairs, strict=True)
    assert pairs == draw_lengths(20000, 2048, seed=3) != draw_lengths(20000, 2048, seed=4)
    assert max(map(sum, pairs)) <= 2048 and min(prompts) >= 4
    assert statistics.mean(prompts) == pytest.approx(161.31, rel=0.03), "the longest are left out"
    assert statistics.mean(answers) == pytest.approx(337.99, rel=0.03)
    percentiles = statistics.quantiles(prompts, n=10)
    assert percentiles[8] / percentiles[4] == pytest.approx(5696 / 1730, rel=0.05)
    short = draw_lengths(20000, 512, seed=3)
    assert statistics.mean(map(sum, short)) == pytest.approx(statistics.mean(map(sum, pairs)) / 4, rel=0.02)


def test_memory_on_demand_holds_more_requests(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    arguments = ["bench", "paging", "--model", str(tiny_model), *SIZES, "--json", str(figures), "--plot", str(plot)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(figures.read_text())
    assert written["benchmark"] == "paging" and written["wrong"] is None
    reserved, on_demand, unlimited = (row for row in written["rows"] if row["part"] == "policy")
    assert reserved["most_running"] == 2
    for row in (on_demand, unlimited):
        assert 2 < row["most_running"] <= 24
        assert row["running"]["median"] > 1.5 * reserved["running"]["median"]
        assert row["held_share"]["median"] > 1.5 * reserved["held_share"]["median"]
    for row in (reserved, on_demand, unlimited):
        parts = ("held", "coming", "unused", "free")
        assert all(0 <= row[f"{part}_share"]["median"] <= 1 for part in parts)
        assert sum(row[f"{part}_share"]["median"] for part in parts) == pytest.approx(1)
        assert row["slots"] == 2 * 256 and row["kv_bytes"] == 2 * 256 * 2 * 2 * 2 * 16 * 4
        assert all(at["held"] <= at["taken"] <= row["slots"] for at in row["moments"])
        assert row["output_tokens_per_s"]["median"] == pytest.approx(
            sum(written["answer_tokens"]) / row["seconds"]["median"]
        )
    assert reserved["free_share"]["median"] < 0.1, "as many run as there is memory for"
    assert on_demand["unused_share"]["median"] < 0.1 < reserved["unused_share"]["median"]
    assert [row["batch"] for row in written["rows"] if row["part"] == "step"][:2] == [1, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "Claimed there: 2-4x" in result.output and "token for token" in result.output

    monkeypatch.setattr(paging, "first_difference", lambda answers: f"{len(answers)} runs differ")
    result = CliRunner().invoke(app, ["bench", "paging", "--model", str(tiny_model), *SIZES])
    assert result.exit_code == 1 and "WRONG: 3 runs differ" in result.output


@pytest.mark.parametrize(
    "options, why",
    [
        (["--num-requests=3"], "raise num_requests to about"),
        (["--max-model-len=1000"], "more than the 256 positions"),
        (["--page-size=48"], "page_size 48"),
        (["--plot=x.jpg"], "not a .png"),
        (["--dtype=int3"], "dtype"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(tiny_model: Path, options: list[str], why: str) -> None:
    result = CliRunner().invoke(app, ["bench", "paging", "--model", str(tiny_model), *SIZES, *options])
    assert isinstance(result.exception, ConfigError) and why in str(result.exception), result.output


def test_what_bounds_the_gain_is_the_time_of_a_step() -> None:
    steps = step_rows([DecodeStep(batch, 0.01 * (1 + batch)) for batch in (1, 2, 4, 6) for _ in range(5)])
    assert [(row["batch"], row["ms"]) for row in steps] == [
        (1, pytest.approx(20)), (2, pytest.approx(30)), (4, pytest.approx(50)), (6, pytest.approx(70))
    ]  # fmt: skip
    assert step_ms(steps, 3) == pytest.approx(40) and step_ms(steps, 9) == pytest.approx(70)
    row = {"policy": "on demand", "reservations": 2, "running": Figure(2, 2, 2), "speedup": 1.1}
    text = explanation(row, row | {"running": Figure(4, 4, 4)}, steps)
    assert "2.00x the requests" in text and "takes 1.67x as long" in text and "gain would be 1.20x" in text
    assert step_rows([DecodeStep(1, 0.1)]) == [], "one is no median"
