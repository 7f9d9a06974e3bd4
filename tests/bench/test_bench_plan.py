"""What the planner says of decode steps beside what they take."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.cpu_plans import CPU
from typer.testing import CliRunner

from distkv import ConfigError
from distkv.bench import decoder
from distkv.bench.calibration import MOST_RATE, calibrated
from distkv.commands.main import app
from distkv.planner.hardware import Hardware
from distkv.planner.model_shape import find_model
from distkv.planner.plan import make_plan
from distkv.planner.request import PlanRequest

MIB = 2**20
PAGES = {"device": (600, 0, 0), "host": (2, 600, 0), "disk": (2, 1, 600)}
TRUTH = replace(
    CPU, memory_bandwidth=5e9, attention_bandwidth=8e9, host_link=20e9, disk_bandwidth=3e9, step_seconds=0.002
)


def request(tier: str, context: int, hardware: Hardware) -> PlanRequest:
    device, host, disk = (count * MIB for count in PAGES[tier])  # of 256 tokens of 4 KiB
    return PlanRequest(
        find_model("small"), hardware, context=context, max_num_batched_tokens=256, max_num_seqs=1,
        device_kv_bytes=device, host_kv_bytes=host, disk_kv_bytes=disk,
    )  # fmt: skip


def seconds(tier: str, context: int, hardware: Hardware) -> float:
    decode = make_plan(request(tier, context, hardware)).decode
    assert decode is not None
    return decode.seconds


def probed(hardware: Hardware) -> dict[tuple[str, int], float]:
    return {(tier, context): seconds(tier, context, hardware) for tier in PAGES for context in (2048, 32768)}


def test_calibration_finds_the_rates_that_times_came_from() -> None:
    found = calibrated(replace(CPU, memory_bandwidth=TRUTH.memory_bandwidth), request, probed(TRUTH))
    for tier in PAGES:
        for context in (512, 8192, 100_000):
            assert seconds(tier, context, found) == pytest.approx(seconds(tier, context, TRUTH))
    for name in ("memory_bandwidth", "attention_bandwidth", "host_link", "disk_bandwidth", "step_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name)), name


def test_what_cannot_be_told_apart_is_taken_for_free() -> None:
    """Where the host is as fast as the device, and where a busy machine took longer for the shorter context."""
    times = probed(replace(TRUTH, host_link=1e30))
    assert calibrated(CPU, request, times).host_link == MOST_RATE
    times["device", 32768] = times["device", 2048] / 2
    assert calibrated(CPU, request, times).attention_bandwidth == MOST_RATE


SIZES = ["--shape", "tiny", "--context", "768", "--probe", "512", "--probe", "1280", "--new-tokens", "2"]


def test_every_tier_and_context_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PAUSE", 0.01)
    file = tmp_path / "plan.json"
    result = CliRunner().invoke(
        app, ["bench", "plan", *SIZES, "--quick", "--repeats", "1", "--json", str(file)], catch_exceptions=False
    )
    assert result.exit_code == 0 and "target, plans within 25% of what was measured: " in result.output
    content = json.loads(file.read_text())
    assert content["probes"] == [512, 1280] and content["hardware"]["is_measured"]
    rows = content["rows"]
    assert [(row["tier"], row["context"], row["kv_bytes"]) for row in rows] == [
        (tier, 768, 768 * 512) for tier in ("device", "host", "disk")
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["planned_ms"] / row["measured_ms"]["median"])
        assert row["fastest_ratio"] == pytest.approx(row["planned_fastest_ms"] / row["measured_fastest_ms"])
        assert 0 < row["measured_fastest_ms"] <= row["measured_ms"]["min"]
        assert (row["parts"]["host link"] > 0) == (row["tier"] != "device")  # below the device is a page of the host
        assert (row["parts"]["disk"] > 0) == (row["tier"] == "disk")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--context", "700"], "not a whole number of pages of 256 tokens, at least 2; use 768"),
        (["--context", "512"], "context 512 is a probe too"),
        (["--probe", "768"], "--probe names 3 contexts; give it twice"),
        (["--new-tokens", "255"], "new-tokens 255 .* use 250 at most"),
        (["--shape", "huge"], "shape 'huge' is not known"),
    ],
)
def test_contexts_that_would_tell_nothing_are_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["bench", "plan", *SIZES, *more], catch_exceptions=False)
