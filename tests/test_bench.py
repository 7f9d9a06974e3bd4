"""The benchmarks of prefixes, serving and scheduling, on models so small that their figures mean nothing: what they
print and write, and that they end with exit code 1 when what must be equal is not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import save_llama
from typer.testing import CliRunner, Result

from distkv.bench import prefix, scheduler, serve_offline
from distkv.bench.machine import machine_facts, percentile
from distkv.cli import app
from distkv.errors import ConfigError

PREFIX = ("--prefix-tokens", "128", "--page-size", "64", "--repeats", "1", "--dtype", "float32", "--answer-tokens", "4")
SERVE = ("--num-requests", "5", "--longest-prompt", "100", "--longest-answer", "20", "--page-size", "16")
SCHEDULER = ("--num-seqs", "4", "--context", "200", "--page-size", "16", "--steps", "5")


def bench(tmp_path: Path, command: str, *arguments: str) -> tuple[Result, dict[str, Any]]:
    """The result of a command that came to its end, and what it wrote."""
    figures = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["bench", command, *arguments, "--json", str(figures)])
    assert result.exit_code in (0, 1) and (result.exception is None or isinstance(result.exception, SystemExit)), result
    return result, json.loads(figures.read_text())


def check_written(written: dict[str, Any], name: str, rows: int) -> list[dict[str, Any]]:
    """The rows, of a file that says where its figures come from."""
    assert written["benchmark"] == name and written.keys() >= machine_facts().keys()
    assert len(written["rows"]) == rows
    return written["rows"]


def test_percentiles() -> None:
    assert percentile([3], 0.5) == 3
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([4, 1, 3, 2], 0.5) == 2
    assert percentile([4, 1, 3, 2], 1) == 4


# --- prefix ---


def test_bench_prefix_finds_the_prefix_in_each_tier(tiny_model: Path, tmp_path: Path) -> None:
    result, written = bench(tmp_path, "prefix", "--model", str(tiny_model), "--cache-dir", str(tmp_path), *PREFIX)
    assert result.exit_code == 0, result.output
    rows = {row["variant"]: row for row in check_written(written, "prefix", 5)}
    assert [rows[name]["cached"] for name in prefix.VARIANTS] == [
        {"device": 0, "host": 0, "disk": 0},
        {"device": 128, "host": 0, "disk": 0},
        {"device": 0, "host": 0, "disk": 0},
        {"device": 0, "host": 128, "disk": 0},
        {"device": 0, "host": 0, "disk": 128},
    ]
    for name, row in rows.items():
        assert name.split(",")[0].split()[0] in result.output
        assert len(row["turns_ms"]) == 1 and row["first_token_ms"] > 0
        assert row["answers"] == rows["cold"]["answers"] and len(row["answers"][0]) == 4
    assert written["prefix_bytes"] == 128 * 2 * 2 * 2 * 16 * 4  # 2 layers, 2 KV heads of 16, fp32
    assert set(written["ceiling_seconds"]) == {"memcpy", "preadv file by file", "preadv layer by layer"}
    assert "random tokens" in written["text"] and "token for token" in result.output
    assert list(tmp_path.iterdir()) == [tmp_path / "figures.json"], "the folder of the disk tier is gone"


@pytest.mark.parametrize(
    "change, words",
    [({"tokens": [1, 2, 3, 4]}, "from token"), ({"cached": (64, 64, 0)}, "not (0, 0, 128)")],
    ids=["another answer", "another tier"],
)
def test_bench_prefix_notices(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    turn = prefix._turn

    class HereAndNow:
        """Takes the place of a new process, which would take seconds."""

        def __init__(self, *arguments: object) -> None: ...
        def __enter__(self) -> "HereAndNow":
            return self

        def __exit__(self, *arguments: object) -> None: ...
        def submit(self, function: Any, *arguments: Any) -> "HereAndNow":
            self.value = function(*arguments)
            return self

        def result(self) -> Any:
            return self.value

    def tampered(*arguments: Any) -> dict[str, prefix.Answered]:
        answered = turn(*arguments)
        return answered | {"disk hit after restart": replace(answered["disk hit after restart"], **change)}

    monkeypatch.setattr(prefix, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setattr(prefix, "_turn", tampered)
    result, written = bench(tmp_path, "prefix", "--model", str(tiny_model), *PREFIX)
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    assert "WRONG: disk hit after restart" in output and words in output
    check_written(written, "prefix", 5)


def test_bench_prefix_reads_a_question_in_a_step_of_its_own() -> None:
    """Or it would be rounded in another way where the prefix is cached."""
    assert prefix.Sizes(4096, 256, 16).step_tokens == 2048
    assert prefix.Sizes(3072, 256, 16).step_tokens == 1536
    assert prefix.Sizes(11 * 256, 256, 16).step_tokens == 256
    assert prefix.Sizes(8192, 4096, 16).step_tokens == 4096


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--prefix-tokens", "100"), "use 128"),
        (("--prefix-tokens", "256"), "at most 192"),
        (("--prefix-tokens", "128", "--answer-tokens", "41"), "lower answer-tokens"),
    ],
)
def test_bench_prefix_refuses(tiny_model: Path, arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "prefix", "--model", str(tiny_model), "--page-size", "64", *arguments])
    assert isinstance(result.exception, ConfigError) and words in str(result.exception)


# --- serve-offline ---


def test_bench_serve_offline_compares_windows(tiny_model: Path, tmp_path: Path) -> None:
    result, written = bench(tmp_path, "serve-offline", "--model", str(tiny_model), "--repeats", "1", *SERVE)
    assert result.exit_code == 0, result.output
    rows = check_written(written, "serve-offline", 3)
    shapes = list(zip(written["prompt_tokens"], written["output_tokens"], strict=True))
    assert len(shapes) == 5 and all(64 <= prompt <= 100 and 16 <= output <= 20 for prompt, output in shapes)
    assert written["kv_pages"] == sum(-(-(prompt + output - 1) // 16) for prompt, output in shapes)
    assert written["kv_bytes"] == written["kv_pages"] * 16 * 2 * 2 * 2 * 16 * 4
    for row, percent in zip(rows, (100, 50, 25), strict=True):
        assert row["window_percent"] == percent and f"{percent} %" in result.output
        assert row["device_pages"] == -(-written["kv_pages"] * percent // 100)
        assert row["device_pages"] + row["host_pages"] == written["kv_pages"]
        assert row["output_tokens_per_s"] > 0 and row["first_token_p99_s"] >= row["first_token_p50_s"] > 0
        assert row["most_running"] == 5 or percent < 100
    assert sum(rows[0]["bytes_per_output_token"].values()) == 0
    assert rows[1]["bytes_per_output_token"]["host_streamed"] > 0
    assert "All windows gave the same answers" in result.output


def test_bench_serve_offline_notices_another_answer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, calls = serve_offline.serve, []

    def tampered(engine: Any, requests: Any) -> serve_offline.Served:
        served = serve(engine, requests)
        calls.append(served)
        if len(calls) == 4:  # each window warms up first
            served.answers["3"][7] += 1
        return served

    monkeypatch.setattr(serve_offline, "serve", tampered)
    result, _ = bench(tmp_path, "serve-offline", "--model", str(tiny_model), "--repeats", "1", *SERVE)
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    assert "WRONG: 50 %, turn 0 and 100 %, turn 0 differ in request 3 from token 7 of the answer on" in output


def test_bench_serve_offline_refuses(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path)
    with pytest.raises(ConfigError, match="positions of the model"):
        serve_offline.run(folder, 2, 250, 20, 0, 1, 16, None, None)
    with pytest.raises(ConfigError, match="raise longest-prompt"):
        serve_offline.run(folder, 2, 10, 20, 0, 1, 16, None, None)


# --- scheduler ---


def test_bench_scheduler_times_the_parts_of_a_step(tmp_path: Path) -> None:
    result, written = bench(tmp_path, "scheduler", *SCHEDULER)
    assert result.exit_code == 0, result.output
    rows = check_written(written, "scheduler", 4)
    assert [row["variant"].split(", ")[-1] for row in rows] == [
        "all on device", "host for the rest", "host for all", "cold budget",
    ]  # fmt: skip
    for row in rows:
        assert set(row["ms"]) == {*scheduler.PARTS, "sum"}
        assert all(0 < row["ms"][part] <= row["p99_ms"][part] for part in row["ms"])
        assert all(len(steps) == 5 for steps in row["steps_ms"].values())
        assert row["plan_bytes"] > 0
    assert all(row["tokens_per_step"] == 4 for row in rows[:3])
    assert "a token for each sequence" in result.output and "target" in result.output


def test_bench_scheduler_notices_a_missing_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = scheduler._measure

    def tampered(*arguments: Any) -> scheduler.Steps:
        measured = measure(*arguments)
        measured.num_drawn[0] -= 1
        return measured

    monkeypatch.setattr(scheduler, "_measure", tampered)
    result, _ = bench(tmp_path, "scheduler", *SCHEDULER)
    assert result.exit_code == 1 and "WRONG: all on device: step 0 drew 3 tokens for 4 sequences" in result.output


def test_bench_scheduler_refuses() -> None:
    with pytest.raises(ConfigError, match="use 128 at least"):
        scheduler.run(4, 100, 5, 16, None)
    with pytest.raises(ConfigError, match="num-seqs 2000"):
        scheduler.run(2000, 100, 5, 16, None)
