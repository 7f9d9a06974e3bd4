"""What of `.ci/gpu` can be seen without a GPU: that it keeps what it has found, and how it reads a trace."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import probing
import profile_engine
import sweep
from device_trace import busy, decode_by_kernel
from probing import Probes

from distkv.bench.engine_rows import Shape
from distkv.kernels.cuda import decode
from distkv.models.shapes import shape_folder
from distkv.workers.attention.decode_plan import split_pages_for
from distkv.workers.runners.cpu_runner import CpuRunner

ROOT = Path(__file__).resolve().parents[2]


def test_stages_are_listed_in_their_order_and_no_others_are_known() -> None:
    stages = subprocess.run([".ci/gpu", "list"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in stages.splitlines()]
    names = {part: [name for name, of, *_ in rows if of == part] for part in ("first", "second")}
    assert names["second"][0] == "sweep" and names["second"][-1] == "linear"
    assert len({name for name, *_ in rows}) == len(rows)
    refused = subprocess.run([".ci/gpu", "only", "rest"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "there is no stage rest" in refused.stderr


def test_an_answer_is_there_before_the_next_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.json"
    probes = Probes(path)

    def first() -> int:
        return 1

    def broken() -> None:
        assert json.loads(path.read_text()) == {"first": 1}
        raise ValueError("no\nfigure")

    def interrupted() -> None:
        raise KeyboardInterrupt

    probes.ask(first)
    probes.ask(broken, "the second")
    expected = {"first": 1, "the second": "FAILED ValueError: no\nfigure"}
    assert json.loads(path.read_text()) == expected
    with pytest.raises(KeyboardInterrupt):
        probes.ask(interrupted)
    assert json.loads(path.read_text()) == expected and list(tmp_path.iterdir()) == [path]
    assert "first (0.0 s): 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1 of 2 failed; the second: FAILED ValueError: no figure"):
        probes.end()


class Endless:
    """In the place of a process that compiles for ever."""

    killed = 0

    def wait(self, timeout: float) -> None:
        raise subprocess.TimeoutExpired("compile", timeout)

    def kill(self) -> None:
        Endless.killed += 1


def test_a_sweep_that_is_interrupted_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def row(meter: object, *size: int) -> dict[str, int]:
        asked.append(size)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {"row": len(asked)}

    for name in ("decode_row", "decode_parts", "prefill_row"):
        monkeypatch.setattr(sweep, name, row)
    monkeypatch.setattr(sweep, "DeviceMeter", object)
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command: Endless())
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(tmp_path / "sweep.json")])
    with pytest.raises(KeyboardInterrupt):
        sweep.main()
    assert Endless.killed > 0
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "decode 8 x 8192, GB/s": {"row": 1},
        "parts of decode 8 x 8192, us": {"row": 2},
        "decode 1 x 131072, GB/s": {"row": 3},
    }


def test_a_variant_launches_with_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for variants in (sweep.DECODE_VARIANTS, sweep.PREFILL_VARIANTS):
        assert len({variant.name for variant in variants}) == len(variants)
    launched: list[Any] = []

    class Kernel:
        n_regs, n_spills = 96, 8
        metadata = type("Metadata", (), {"shared": 1024})

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> "Kernel":
                launched.append((grid, arguments, options))
                return self

            return launch

    kernel = Kernel()
    monkeypatch.setattr(decode, "_decode_kernel", kernel)
    with sweep.launched_as(sweep.Variant(512, 3, {"num_warps": 8})) as (splits, walk):
        assert split_pages_for(256) == 2
        decode._decode_kernel[(1, 2, 3)]("q", num_warps=4, BLOCK_N=64)
    assert launched == [((1, 2, 3), ("q",), {"num_warps": 8, "BLOCK_N": 64})]
    assert splits.resources == {"registers": 96, "spills": 8, "shared": 1024} and walk.resources == {}
    assert decode._decode_kernel is kernel and split_pages_for(256) == 1


def work(name: str, ts: float, dur: float, grid: list[int] | None = None) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {} if grid is None else {"grid": grid}}


def decoded(start: float, layers: int) -> list[dict[str, Any]]:
    """A token: each layer has attention of 4 us and two products of 2, a microsecond apart; then a copy of 3, after
    5 us in which nothing runs."""
    events = []
    for layer in range(layers):
        at = start + 11 * layer
        events += [work("_decode_kernel", at, 4, [8, 2, 1]), work("product", at + 5, 2, [7, 1, 1])]
        events += [work("product", at + 8, 2, [9, 1, 1])]
    at = start + 11 * layers
    return [*events, {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": at + 4, "dur": 3, "args": {"bytes": 4}}]


def test_tokens_are_told_apart_from_their_prompt() -> None:
    prompt = [work("_prefill_kernel", 0, 900, [64, 8, 1]), work("product", 950, 10, [7, 1, 1])]
    tokens = [event for token in range(12) for event in decoded(1000 + 50 * token, layers=3)]
    others = [{"cat": "cpu_op", "name": "_decode_kernel", "ts": 0, "dur": 5000}, {"name": "process_name", "ph": "M"}]
    events = [*others, *reversed(tokens), *prompt]
    found = decode_by_kernel(events, layers=3)
    assert (found["tokens"], found["us a token"]) == (8, 50)
    # 3 * (4 + 2 + 2) + 3 of the 50 us; in a layer two gaps, one behind it, and one behind the copy
    assert found["us a token of gaps"] == 23 and found["gaps a token"] == 10
    assert found["longest gap"] == {"us": 10, "before": "_decode_kernel"}
    assert found["by kernel and grid"] == {
        "_decode_kernel [8, 2, 1]": {"launches a token": 3, "us each": 4, "us a token": 12},
        "product [7, 1, 1]": {"launches a token": 3, "us each": 2, "us a token": 6},
        "product [9, 1, 1]": {"launches a token": 3, "us each": 2, "us a token": 6},
        "Memcpy DtoH": {"launches a token": 1, "us each": 3, "us a token": 3},
    }
    assert decode_by_kernel([*prompt, *decoded(1000, 3), *decoded(1050, 3)], layers=3)["tokens"] == 1
    with pytest.raises(ValueError, match="decode attention of 1 tokens"):
        decode_by_kernel([*prompt, *decoded(1000, 3)], layers=3)


def test_work_at_the_same_time_counts_once() -> None:
    events = [work("a", 0, 1000), work("b", 200, 100), work("c", 900, 300), work("d", 2000, 500)]
    assert busy(events) == {"kernels": 4, "whole": 2.5, "busy": 1.7, "idle": 0.8}


def test_the_device_sleeps_while_the_host_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    assert probing.seconds(lambda: done.append("work"), repeats=2, warm_up=1) == 2e-3
    assert done == ["work", *["sleep", "event", "work", "event"] * 2]


def test_an_engine_leads_to_its_runner() -> None:
    with (
        shape_folder("tiny", vocab_size=64) as folder,
        closing(Shape(folder, 16, 64, "cpu", "float32").start(128, 12)) as engine,
    ):
        assert isinstance(profile_engine.runner_of(engine), CpuRunner)
