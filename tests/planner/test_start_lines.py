"""What is said of an engine at its start."""

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs
from support.cpu_plans import CPU, plan_on_cpu

from distkv.config import EngineConfig
from distkv.launch import start_lines as start
from distkv.launch.launch import launch
from distkv.launch.this_machine import engine_hardware

KIB = 2**10


def test_the_lines_say_what_the_engine_has_and_what_the_plan_says(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with 256 positions and 512 bytes of KV a token, on a CPU of given rates."""
    slow = replace(CPU, memory_bandwidth=1e6, name="a slow CPU")
    monkeypatch.setattr("distkv.launch.this_machine.measured_cpu", lambda: slow)
    sizes = {"device_kv_bytes": 200 * KIB, "host_kv_bytes": 400 * KIB, "disk_kv_bytes": 800 * KIB}
    options = {"page_size": 16, "max_num_batched_tokens": 64, **sizes}
    config = EngineConfig(tiny_model, cache_dir=tmp_path, max_cold_bytes_per_step=2**20, **options)
    with closing(launch(config)) as engine:
        lines = start.start_lines(config, engine.info, engine_hardware(config, engine.info))
    weights = plan_on_cpu(tiny_model).fit.ranks[0].weights
    assert lines[0] == f"plan: {tiny_model.name} in float32: weights {weights / KIB:.0f} KiB; KV 512 B a token"
    assert lines[1] == (
        "plan: KV on device 200 KiB for 400 tokens, host 400 KiB for 800 tokens, disk 800 KiB for 1,600 tokens: 10 "
        "requests of 256 tokens, max_model_len"
    )
    expected = plan_on_cpu(tiny_model, context=256, **options).request
    plan = start.make_plan(replace(expected, hardware=slow))
    assert plan.decode is not None and len(lines) == 3
    found = re.match(r"plan: a token takes about ([\d.]+) ms at 256 tokens, bound by weights \(a slow CPU,", lines[2])
    assert found is not None and float(found[1]) == pytest.approx(1e3 * plan.decode.seconds, rel=0.01)
    chosen = start.start_lines(replace(config, attention_policy="top_pages(pages=4)"), engine.info, slow)
    assert chosen[0] == f"{lines[0]}, attended to by top_pages(pages=4)" and chosen[1] == lines[1]
    assert " at 256 tokens and reads 25.0 % of them, bound by weights" in chosen[2]
    summarised = start.start_lines(config, structs.replace(engine.info, summary_bytes=440 * KIB))
    assert summarised[1] == f"{lines[1]}; summaries of pages up to 440 KiB in memory"


def test_of_engines_elsewhere_the_sizes_of_the_model_are_said(tiny_model: Path) -> None:
    config = EngineConfig(tiny_model, tensor_parallel_size=2)
    [line] = start.start_lines(config)
    assert re.search(r"weights \d+ KiB, at most \d+ KiB on one of 2 ranks; KV 512 B a token$", line)
    [staged] = start.start_lines(replace(config, pipeline_parallel_size=2))
    assert re.search(r"weights \d+ KiB, at most [\d.]+ KiB on one of 4 ranks; KV 512 B a token$", staged)
    sizes = {"device_kv_bytes": 400 * KIB, "host_kv_bytes": 0}
    assert start.start_lines(replace(config, **sizes, page_size=16))[1] == (
        "plan: KV on device 400 KiB for 800 tokens: 3 requests of 256 tokens, max_model_len"
    )
    sizes = {"device_kv_bytes": 200 * KIB, "host_kv_bytes": 200 * KIB, "kv_cache_dtype": "int4"}
    coded = start.start_lines(replace(config, **sizes, page_size=16))
    assert coded[0] == f"{line}, 128 B below the device as int4", "half a byte a number, two scales for 16 of them"
    assert "device 200 KiB for 400 tokens, host 200 KiB for 1,600 tokens" in coded[1]
