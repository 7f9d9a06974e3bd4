"""The benchmarks of prefixes, serving and scheduling, on models so small that their figures mean nothing: what they
print and write, and that they end with exit code 1 when what must be equal is not. Of those that need a GPU, what can
be seen without one: a clock that stands still takes its place (`test_triton_bench.py` calls the kernels)."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.checkpoints import save_llama
from support.meters import FakeMeter, fake_turns
from typer.testing import CliRunner, Result

from distkv.bench import (
    decoder,
    device,
    engine_rows,
    gpu,
    kernels,
    parts,
    prefix,
    prefix_answers,
    scheduler,
    serve_offline,
)  # fmt: skip
from distkv.bench.device import LinkCeiling, MatmulCeiling, MemoryCeiling, Turns
from distkv.bench.engine_rows import Shape, model_rows, residency_rows, streaming_rows, weight_bytes
from distkv.bench.harness import Figure
from distkv.bench.kernel_work import AttentionShape, norm_bytes, rope_bytes, swiglu_bytes
from distkv.bench.options import BenchOptions
from distkv.bench.parts import Measurement
from distkv.commands.main import app
from distkv.errors import CapacityError, ConfigError, DistKVError, StoreError
from distkv.models.shapes import shape_folder
from distkv.reporting.machine import machine_facts, percentile
from distkv.storage.pools.disk_pool import DiskPool
from distkv.stress.stage import Stage
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.model.model_config import ModelConfig

PREFIX = ("--prefix-tokens", "128", "--page-size", "64", "--repeats", "1", "--dtype", "float32", "--answer-tokens", "4")
SERVE = ("--num-requests", "5", "--longest-prompt", "100", "--longest-answer", "20", "--page-size", "16")
SCHEDULER = ("--num-seqs", "4", "--context", "200", "--page-size", "16", "--steps", "5", "--repeats", "1")


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


@pytest.mark.parametrize(
    "file, why",
    [("FOLDER", "Is a directory"), ("FOLDER/no/x.json", "No such file"), ("/proc/x.json", "No such file")],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(
    file: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_measure", lambda *_: pytest.fail("measured"))
    file = file.replace("FOLDER", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{file}' cannot be written: {why}"):
        scheduler.run(4, 200, 5, 16, BenchOptions(json=Path(file)))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        scheduler.run(4, 200, 5, 16, BenchOptions(json=tmp_path / "new.json"))
    assert not (tmp_path / "new.json").exists()
    link = tmp_path / "link.json"
    link.symlink_to("later.json")
    with pytest.raises(pytest.fail.Exception, match="measured"):
        scheduler.run(4, 200, 5, 16, BenchOptions(json=link))
    assert link.is_symlink() and not (tmp_path / "later.json").exists(), "nothing of the user's is taken away"


def test_a_folder_that_cannot_be_made_is_refused(tiny_model: Path) -> None:
    for command, sizes in (("offload", "--context=128 --page-size=32 --new-tokens=2"), ("prefix", " ".join(PREFIX))):
        arguments = ["bench", command, "--model", str(tiny_model), "--cache-dir=/dev/null/x", *sizes.split()]
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, ConfigError) and "/dev/null/x" in str(result.exception)


def test_figures_are_printed_whatever_becomes_of_the_file() -> None:
    result = CliRunner().invoke(app, ["bench", "scheduler", *SCHEDULER, "--json", "/dev/full"])
    assert isinstance(result.exception, StoreError) and "/dev/full" in str(result.exception)
    assert "target, planning a step" in result.output
    figures = "--context", "300", "--new-tokens", "2", "--device-kv-bytes", "1MiB", "--json", "/dev/full"
    result = CliRunner().invoke(app, ["stress", "--shape", "tiny", *figures])
    assert isinstance(result.exception, StoreError) and "decode ms/token" in result.output


def test_percentiles() -> None:
    assert percentile([3], 0.5) == 3
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([4, 1, 3, 2], 0.5) == 2
    assert percentile([4, 1, 3, 2], 1) == 4


# --- offload ---


def test_bench_offload_drops_the_page_cache_while_no_step_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that has begun reads from the page cache what the one before has left there."""
    running, dropped = [], []
    execute = RankExecutor.run

    def slow(*arguments: Any) -> Any:
        running.append(1)
        time.sleep(0.005)
        result = execute(*arguments)
        running.pop()
        return result

    def drop(files: list[Path]) -> None:
        assert not running
        dropped.append(len(files))

    monkeypatch.setattr(RankExecutor, "run", slow)
    monkeypatch.setattr(decoder, "drop_page_cache", drop)
    monkeypatch.setattr(decoder, "PAUSE", 0.01)
    result, written = bench(
        tmp_path, "offload", "--model", str(tiny_model), "--context", "128", "--page-size", "32", "--new-tokens", "3",
        "--repeats", "1", "--dtype", "float32", "--cache-dir", str(tmp_path / "kv"),
    )  # fmt: skip
    assert result.exit_code == 0 and len(check_written(written, "offload", 4)) == 4
    assert [count for count in dropped if count] == [4 * 2] * 2 * 5, "4 pages of 2 heads; two turns of 1 + 3 + 1 steps"


def offload(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """The rows of a run in bf16, all that was written of it, and what it printed."""
    monkeypatch.setattr(decoder, "PAUSE", 0.01)
    result, written = bench(
        folder, "offload", "--model", str(model), "--context", "128", "--page-size", "32", "--new-tokens", "3",
        "--repeats", "1", "--dtype", "bfloat16", "--cache-dir", str(folder / "kv"), *options,
    )  # fmt: skip
    assert result.exit_code == 0, result.exception or result.output
    return check_written(written, "offload", 4), written, result.output


def test_bench_offload_counts_coded_bytes(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a step streams are compared in the benchmark itself, and answers of all places."""
    rows, written, output = offload(tmp_path, tiny_model, monkeypatch, "--kv-cache-dtype", "int4")
    assert written["bytes_per_token"] == 2 * 2 * 2 * (16 // 2 + 2 * 2), "2 layers, 2 KV heads; codes and two scales"
    assert "2 * 2 layers * 2 KV heads * (16 head_dim * 0.5 bytes + 4 of scales) * cold tokens" in output
    streamed = [row["host_bytes_per_step"] + row["disk_bytes_per_step"] for row in rows]
    assert streamed == [row["cold_tokens"] * written["bytes_per_token"] for row in rows]
    assert [row["cold_tokens"] for row in rows] == [0, 64, 96, 96]


def test_bench_offload_of_compressed_files(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KV is counted as it is used, and what the files give for it beside it."""
    [*_, row], written, _output = offload(tmp_path, tiny_model, monkeypatch, "--disk-kv-codec", "lossless")
    assert row["disk_bytes_per_step"] == 3 * 32 * written["bytes_per_token"]
    assert 0.7 < row["stored_bytes_per_step"] / row["disk_bytes_per_step"] < 1.1
    assert row["stored_bytes_per_step"] != row["disk_bytes_per_step"]


# --- disk-codec ---


def test_bench_disk_codec(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are those of the files, and what does not come back ends it."""
    given = ("--model", str(tiny_model), "--context", "128", "--page-size", "64", "--repeats", "2", "--cache-dir")
    result, written = bench(tmp_path, "disk-codec", *given, str(tmp_path))
    assert result.exit_code == 0, result.output
    plain, packed = check_written(written, "disk-codec", 2)
    assert (plain["codec"], packed["codec"]) == ("none", "lossless")
    assert plain["file_bytes"] == written["kv_bytes"] == 128 * 2 * 2 * 2 * 16 * 2, "2 layers, 2 KV heads of 16, bf16"
    assert plain["share"] == 1 and 0.5 < packed["share"] < 1.1
    assert all(row[f"{name}_gb_per_s"]["min"] > 0 for row in (plain, packed) for name in ("encode", "cached", "disk"))
    assert "brings KV" in result.output
    others = itertools.count()
    monkeypatch.setattr(DiskPool, "load", lambda pool, slot, page: page.fill_(next(others)))
    with pytest.raises(DistKVError, match="is not what it was when it was stored as none"):
        CliRunner().invoke(app, ["bench", "disk-codec", *given, str(tmp_path)], catch_exceptions=False)


@pytest.mark.parametrize(
    "context, words",
    [
        (100, "not a whole number of pages of 64 tokens; use 128"),
        (4096, "--text is given and the model has no tokenizer"),
    ],
)
def test_bench_disk_codec_refuses(tiny_model: Path, tmp_path: Path, context: int, words: str) -> None:
    given = ["--text", str(tmp_path / "none")] if "text" in words else []
    sizes = ["--context", str(context), "--page-size", "64", *given]
    with pytest.raises(ConfigError, match=words):
        CliRunner().invoke(app, ["bench", "disk-codec", "--model", str(tiny_model), *sizes], catch_exceptions=False)


# --- prefix ---


def test_bench_prefix_finds_the_prefix_in_each_tier(tiny_model: Path, tmp_path: Path) -> None:
    kept, arguments = str(tmp_path), (*PREFIX, "--prefix-tokens", "192")
    result, written = bench(tmp_path, "prefix", "--model", str(tiny_model), "--cache-dir", kept, *arguments)
    assert result.exit_code == 0, result.output
    all_rows = check_written(written, "prefix", 10)
    assert [row["prefix_tokens"] for row in all_rows] == [128] * 5 + [192] * 5 and written["prefix_tokens"] == [
        128,
        192,
    ]
    rows = {row["variant"]: row for row in all_rows[:5]}
    assert [rows[name]["cached"] for name in prefix.VARIANTS] == [
        {"device": 0, "host": 0, "disk": 0},
        {"device": 128, "host": 0, "disk": 0},
        {"device": 0, "host": 0, "disk": 0},
        {"device": 0, "host": 128, "disk": 0},
        {"device": 0, "host": 0, "disk": 128},
    ]
    for name, row in rows.items():
        assert name.split(",")[0].split()[0] in result.output
        assert len(row["turns_ms"]) == 1 and row["first_token_ms"]["min"] > 0
        assert row["answers"] == rows["cold"]["answers"] and len(row["answers"][0]) == 4
        assert row["prefix_bytes"] == 128 * 2 * 2 * 2 * 16 * 4  # 2 layers, 2 KV heads of 16, fp32
        assert row["of_cold"] == row["first_token_ms"]["median"] / rows["cold"]["first_token_ms"]["median"]
    slowest = max((row for row in all_rows if "hit" in row["variant"]), key=lambda row: row["of_cold"])
    verdict = f"{slowest['of_cold']:.3f} at most ({slowest['variant']}, {slowest['prefix_tokens']} tokens)"
    assert f"{verdict}, {'met' if slowest['of_cold'] < 1 else 'MISSED'}" in " ".join(result.output.split())
    assert set(all_rows[5]["ceiling_seconds"]) == {"memcpy", "preadv file by file", "preadv layer by layer"}
    assert "random tokens" in written["text"] and "token for token" in result.output
    assert list(tmp_path.iterdir()) == [tmp_path / "figures.json"], "the folder of the disk tier is gone"


class HereAndNow:
    """Takes the place of a new process, which would take seconds."""

    def __init__(self, *arguments: object, initializer: object) -> None: ...
    def __enter__(self) -> "HereAndNow":
        return self

    def __exit__(self, *arguments: object) -> None: ...
    def submit(self, function: Any, *arguments: Any) -> "HereAndNow":
        self.value = function(*arguments)
        return self

    def result(self) -> Any:
        return self.value


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": [1, 2, 3, 4]}, "from token"),
        ({"cached": (64, 64, 0)}, "not (0, 0, 128)"),
        ({"cached": (0, 0, 64), "recomputed": 64}, ""),
    ],
    ids=["another answer", "another tier", "a part is computed again"],
)
def test_bench_prefix_notices(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    answered = prefix._answered

    def tampered(variant: str, *arguments: Any) -> prefix.Answered:
        one = answered(variant, *arguments)
        return replace(one, **change) if variant == "disk hit after restart" else one

    monkeypatch.setattr(prefix_answers, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setattr(prefix, "_answered", tampered)
    result, written = bench(tmp_path, "prefix", "--model", str(tiny_model), *PREFIX)
    output = " ".join(result.output.split())
    assert result.exit_code == bool(words)
    assert ("WRONG: disk hit after restart" in output) == bool(words) and words in output
    assert (written["rows"][-1]["recomputed"] == [64]) == ("recomputed" in change)
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
        assert row["output_tokens_per_s"]["min"] > 0 and row["first_token_p99_s"] >= row["first_token_p50_s"] > 0
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
        if len(calls) == 6:  # each window warms up first, and all of it once
            served.answers["3"][7] += 1
        return served

    monkeypatch.setattr(serve_offline, "serve", tampered)
    result, _ = bench(tmp_path, "serve-offline", "--model", str(tiny_model), "--repeats", "1", *SERVE)
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    assert "WRONG: 50 %, turn 0 and 100 %, turn 0 differ in request 3 from token 7 of the answer on" in output


def test_bench_serve_offline_notices_a_prompt_that_is_cached(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = serve_offline.launch
    monkeypatch.setattr(serve_offline, "launch", lambda config: launch(replace(config, enable_prefix_caching=True)))
    monkeypatch.setattr(serve_offline.Prompts, "text", lambda self, count: [7] * count)
    result, _ = bench(tmp_path, "serve-offline", "--model", str(tiny_model), "--repeats", "1", *SERVE)
    assert result.exit_code == 1
    assert "WRONG: 100 %, turn 0 found" in " ".join(result.output.split())


def test_bench_serve_offline_refuses(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path)
    with pytest.raises(ConfigError, match="positions of the model"):
        serve_offline.run(folder, 2, 250, 20, 0, 16, None, BenchOptions())
    with pytest.raises(ConfigError, match="raise longest-prompt"):
        serve_offline.run(folder, 2, 10, 20, 0, 16, None, BenchOptions())


# --- scheduler ---


def test_bench_scheduler_times_the_parts_of_a_step(tmp_path: Path) -> None:
    result, written = bench(tmp_path, "scheduler", *SCHEDULER, "--repeats", "2")
    assert result.exit_code == 0, result.output
    rows = check_written(written, "scheduler", 4)
    assert [row["variant"].split(", ")[-1] for row in rows] == [
        "all on device", "host for the rest", "host for all", "cold budget",
    ]  # fmt: skip
    for row in rows:
        assert set(row["ms"]) == {*scheduler.PARTS, "sum"}
        assert all(0 < row["ms"][part]["median"] <= row["p99_ms"][part]["median"] for part in row["ms"])
        assert all([len(steps) for steps in turns] == [5, 5] for turns in row["steps_ms"].values())
        assert row["plan_bytes"] > 0
    assert all(row["tokens_per_step"] == 4 for row in rows[:3])
    assert "a token for each sequence" in result.output and "target" in result.output


def test_bench_scheduler_notices_a_missing_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = scheduler._measure

    def tampered(*arguments: Any) -> scheduler.Steps:
        measured = measure(*arguments)
        measured.num_sampled[0] -= 1
        return measured

    monkeypatch.setattr(scheduler, "_measure", tampered)
    result, _ = bench(tmp_path, "scheduler", *SCHEDULER)
    assert result.exit_code == 1 and "WRONG: all on device: step 0 drew 3 tokens for 4 sequences" in result.output


def test_bench_scheduler_refuses() -> None:
    with pytest.raises(ConfigError, match="use 128 at least"):
        scheduler.run(4, 100, 5, 16, BenchOptions())
    with pytest.raises(ConfigError, match="num-seqs 2000"):
        scheduler.run(2000, 100, 5, 16, BenchOptions())


# --- kernels and gpu ---

CPU = torch.device("cpu")
TINY_KV = 2 * 2 * 64 * 4  # KV bytes of a token of the tiny shape in fp32: 2 layers, one KV head of 64


@pytest.mark.parametrize("command", ["kernels", "gpu"])
def test_benches_of_a_gpu_refuse_without_one(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    figures = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["bench", command, "--json", str(figures)])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == (
        f"distkv bench {command} measures a CUDA device and torch sees none; run it on a machine with an NVIDIA GPU "
        "and a CUDA build of torch"
    )
    assert not figures.exists() and not result.output


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has both commands believe that there is a GPU; what they measure must be replaced too."""
    monkeypatch.setenv("COLUMNS", "200")  # of the tables
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    monkeypatch.setattr(parts.gc, "collect", lambda: 0)  # of all that the tests hold
    monkeypatch.setattr(parts, "require_cuda", lambda command: None)
    monkeypatch.setattr(parts, "DeviceMeter", FakeMeter)


KERNEL_ROWS: dict[str, list[dict[str, Any]]] = {
    "ceilings": [{"name": "device copy", "bytes_per_s": 2.5e12}, {"name": "product", "flops_per_s": 7e14}],
    "decode": [
        {"batch": 1, "context": 8192, "ms": 0.0325, "kv_bytes": 2**25, "bytes_per_s": 1e12, "read_bytes_per_s": 2.5e12,
         "share": 0.4, "torch_bytes_per_s": None},
        {"batch": 8, "context": 8192, "ms": 0.0125, "kv_bytes": 2**28, "bytes_per_s": 2.1e12,
         "read_bytes_per_s": 2.5e12, "share": 0.84, "own_read_bytes_per_s": 2.333e12, "own_share": 0.9,
         "torch_bytes_per_s": None},
        {"batch": 32, "context": 131072, "note": "does not fit"},
    ],
    "prefill": [
        {"tokens": 8192, "ms": 1.5, "flops_per_s": 3e14, "torch_flops_per_s": 4e14, "matmul_flops_per_s": 6e14,
         "share": 0.5},
    ],
    "products": [
        {"weight": "qkv 6144 x 4096", "rows": 1, "ms": 0.03, "bytes_per_s": 1.7e12, "flops_per_s": 1.7e12,
         "cublas_ms": 0.026, "share": 0.88},
    ],
    "elementwise": [
        {"kernel": "swiglu", "tokens": 8192, "ms": 0.1, "bytes_per_s": 2e12, "copy_bytes_per_s": 2.5e12, "share": 0.8}
    ],
    "pages": [
        {"direction": "host to device", "slice_bytes": 65536, "kernel_bytes_per_s": 5e10, "engine_bytes_per_s": 2e10,
         "link_bytes_per_s": 5.5e10, "faster": "kernel"}
    ],
}  # fmt: skip
GPU_ROWS: dict[str, list[dict[str, Any]]] = {
    "streaming": [
        {"context": 10, "layers": 4, "ms_per_token": 1.0, "cold_bytes_per_step": 0, "cold_bytes_per_s": None,
         "link_bytes_per_s": 5e10, "share": None, "kv_bytes": 2**30, "peak_device_bytes": 2**30},
        {"context": 160, "layers": 4, "ms_per_token": 300.0, "cold_bytes_per_step": 15 * 10**9,
         "cold_bytes_per_s": 4.6e10, "link_bytes_per_s": 5e10, "share": 0.92, "kv_bytes": 2**34,
         "peak_device_bytes": 2**30 + 2**28},
    ],
    "model": [
        {"engine": "distkv", "context": 1024, "cache": "on the device", "ms_per_token": 6.0, "weights_ms": 5.0,
         "cold_bytes_per_step": 0, "cold_ms": 0.0, "ratio": 1.2},
    ],
    "residency": [{"cache": "on the host", "context": 6000, "streamed_bytes": 10**8, "same": "yes"}],
}  # fmt: skip


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize(
    "module, rows, shown",
    [
        (
            kernels,
            KERNEL_ROWS,
            (
                "2500.0", "700", "0.013", "2100", "84 %", "2333", "90 %", "does not fit", "50 %", "88 %", "64",
                "decode, of 256 MiB and more, at 80% of a large read: 84% at the least, met",
                "prefill at 55% of the matrix product's rate: 50% at the least, MISSED",
            ),
        ),
        (
            gpu,
            GPU_ROWS,
            (
                "300.00", "15.00", "92 %", "1280.0", "1.20x", "that copy: 92%, met",
                "256.0 MiB more for 15360 MiB of KV, MISSED", "weights: 1.20x, met", "the same in every bit",
            ),
        ),
    ],
)  # fmt: skip
def test_benches_of_a_gpu_print_and_write(
    module: ModuleType, rows: dict[str, list[dict[str, Any]]], shown: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    measured = []

    def canned(*arguments: Any) -> Iterator[Measurement]:
        part = arguments[-2]
        measured.append(part)
        for row in rows[part]:
            yield Measurement("one", lambda row=row: [{"part": part, **row}])

    monkeypatch.setattr(module, "_figures", canned)
    name = module.__name__.rpartition(".")[2]
    result, written = bench(tmp_path, name)
    assert result.exit_code == 0 and tuple(measured) == module.PARTS == tuple(rows)
    check_written(written, name, sum(len(part) for part in rows.values()))
    assert written.keys() >= {"machine", "processor", "device_bytes", "cuda", "triton", "torch", "python", "command"}
    output = " ".join(result.output.split())
    for text in shown:
        assert text in output, text

    *_, last = module.PARTS
    result, written = bench(tmp_path, name, "--only", last)
    assert {row["part"] for row in written["rows"]} == {last} and "target" not in result.output
    result = CliRunner().invoke(app, ["bench", name, "--only", "x"])
    assert isinstance(result.exception, ConfigError) and f"use {', '.join(module.PARTS)}" in str(result.exception)
    result = CliRunner().invoke(app, ["bench", name, "--only", last, "--context", "100"])
    assert isinstance(result.exception, ConfigError) and "--context is for the part" in str(result.exception)


@pytest.mark.usefixtures("pretend_gpu")
def test_what_fails_on_a_gpu_costs_no_other_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = tmp_path / "figures.json"

    def broken(reason: str) -> Iterator[dict[str, Any]]:
        yield {"part": "decode", "batch": 7, "context": 1}
        [row] = json.loads(figures.read_text())["rows"][-1:]
        assert row["batch"] == 7, "each row is written as it comes"
        raise DistKVError(reason)

    def some(batches: Any, contexts: Any, prompts: Any, part: str, turns: Turns) -> Iterator[Measurement]:
        if part == "prefill":
            raise CapacityError("no [memory]")
        if part == "decode":
            assert (batches, contexts, turns.bench.options.repeats) == ([2], [9, 8], 5)
            yield Measurement("batch 7", lambda: broken("it differs"))
        yield Measurement("the rest", lambda: [{"part": part, "name": "rest"}])

    monkeypatch.setattr(kernels, "_figures", some)
    options = ["--batch", "2", "--context", "9", "--context", "8", "--repeats", "5", "--json", str(figures)]
    result = CliRunner().invoke(app, ["bench", "kernels", *options])
    assert isinstance(result.exception, DistKVError) and not isinstance(result.exception, ConfigError)
    lines = ["decode: batch 7: DistKVError: it differs", "prefill: at its start: CapacityError: no [memory]"]
    assert str(result.exception) == "\n".join(["2 of the measurements failed:", *lines])
    assert all(f"FAILED {line}" in result.output for line in lines)
    written = json.loads(figures.read_text())
    assert [row["part"] for row in written["rows"]] == [
        "ceilings",
        "decode",
        "decode",
        "products",
        "elementwise",
        "pages",
    ]
    assert written["failures"] == lines


def test_sizes_of_a_gpu_bench() -> None:
    sizes = gpu.Sizes(window=1024, contexts=(2048, 1024), layers=1, new_tokens=2)
    assert sizes.stream_step == 512 and replace(sizes, window=2**16).stream_step == 2048
    with pytest.raises(ConfigError, match="window of 511 tokens is less than two pages of 256; use 512"):
        replace(sizes, window=511)


def test_bytes_and_operations_of_llama_3_8b() -> None:
    """Against figures that were worked out by hand."""
    shape = AttentionShape()
    assert shape.kv_bytes(1) == 4096
    assert shape.kv_bytes(32 * 131072) == 17_179_869_184
    assert shape.prefill_flops(8192) == 549_755_813_888
    assert norm_bytes(8192, 4096, 2, residual=False) == 134_225_920
    assert norm_bytes(8192, 4096, 2, residual=True) == 268_443_648
    assert swiglu_bytes(8192, 14336, 2) == 704_643_072
    assert rope_bytes(1, shape) == 48 * 256 + 40 * 256 + 16 * 256 + 2 * 64 * 4 + 2 * 8
    with shape_folder("llama-3-8b") as folder:
        model = ModelConfig.load(folder)
    # 8,030,261,248 parameters, of which the embedding has 128256 * 4096
    assert weight_bytes(model, 2) == 2 * (8_030_261_248 - 525_336_576)


def test_works_take_turns() -> None:
    turns = fake_turns(3)
    done: list[str] = []
    works = {name: (lambda name=name: done.append(name)) for name in "ab"}
    assert turns.seconds(works) == {"a": Figure(1e-3, 1e-3, 1e-3), "b": Figure(1e-3, 1e-3, 1e-3)}
    assert "".join(done) == "ab" * (device.WARM_UP + 3)
    assert [figure.median for figure in turns.seconds_each((works["a"], works["b"]))] == [1e-3, 2e-3]


def test_ceilings_are_counted_as_their_names_say() -> None:
    with closing(LinkCeiling(CPU, 3000)) as link:
        rows = kernels.ceiling_rows(fake_turns(), MemoryCeiling(CPU, 4000), MatmulCeiling(CPU, torch.float32, 16), link)
        assert not link._host.data[0].eq(0).any() and torch.equal(link._host.data[0], link._device[0])
    *bandwidths, product = rows
    assert [round(row["bytes_per_s"] / 1e3) for row in bandwidths] == [8000, 4000, 4000, 3000, 3000, 3000, 1500, 3000]
    assert product["name"] == "float32 16^3 product" and product["flops_per_s"] == pytest.approx(1e3 * 2 * 16**3)


def test_layers_of_the_longest_context_fit_into_the_host() -> None:
    one = 2**32  # a million tokens of the 8B shape
    assert gpu.fitting_layers(128 * 2**30, one) == gpu.MOST_LAYERS
    assert gpu.fitting_layers(17 * 2**30, one) == 2
    with pytest.raises(CapacityError, match="leave the part out with --only"):
        gpu.fitting_layers(7 * 2**30, one)


def test_figures_of_a_gpu_are_measured_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, whose streaming is the same; of the kernels, what is too large to be run."""
    monkeypatch.setattr(gpu, "MODEL", "tiny")
    for module in (gpu, kernels):
        monkeypatch.setattr(module, "LinkCeiling", lambda device, *size: LinkCeiling(device, 4096))
        monkeypatch.setattr(module, "MemoryCeiling", lambda device: MemoryCeiling(device, 4096))
    sizes = gpu.Sizes(window=1024, contexts=(4096, 1024), layers=2, new_tokens=3)
    [figure] = gpu._figures(sizes, "streaming", fake_turns())
    assert figure.name == "contexts 1024, 4096 over a window of 1024"
    # the link and the folder of the model are there while the figure is measured
    figures = gpu._figures(sizes, "streaming", fake_turns())
    rows = [row for figure in figures for row in figure.measure()]
    assert [(row["context"], row["layers"], row["new_tokens"]) for row in rows] == [(1024, 2, 3), (4096, 2, 3)]
    full = fake_turns(free_bytes=0)
    decode = list(kernels._figures([2], [300, 40], [7], "decode", full))
    assert [figure.name for figure in decode] == ["batch 2, context 300", "batch 2, context 40"]
    assert [row["note"] for figure in decode for row in figure.measure()] == ["does not fit"] * 2


@pytest.fixture(scope="module")
def tiny_shape() -> Iterator[Shape]:
    with shape_folder("tiny", vocab_size=64) as folder:
        yield Shape(folder, page_size=16, step_tokens=64, device="cpu", dtype="float32")


def test_rows_of_an_engine_are_not_of_something_easier(tiny_shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, spec = engine_rows.launch, tiny_shape.spec
    monkeypatch.setattr(engine_rows, "launch", lambda config: launch(replace(config, enable_prefix_caching=True)))
    with closing(tiny_shape.engine(200, spec.pages_for(200) + 4)) as engine:
        engine_rows._run(tiny_shape, engine, 100, 4)
        with pytest.raises(DistKVError, match="96 tokens of the prompt were found in the cache"):
            stage = engine_rows._run(tiny_shape, engine, 100, 4)
    monkeypatch.setattr(Stage, "cold_pages", 1)
    with closing(tiny_shape.engine(200, spec.pages_for(200))) as engine:
        stage = engine_rows._run(tiny_shape, engine, 100, 4)
        with pytest.raises(DistKVError, match=f"streamed 0 bytes and its cold pages take {spec.page_bytes}"):
            engine_rows._streamed(tiny_shape, stage)


def test_streaming_rows_count_cold_bytes(tiny_shape: Shape) -> None:
    with closing(LinkCeiling(CPU, 4096)) as link:
        rows = list(streaming_rows(fake_turns(2), link, tiny_shape, 128, (128, 512, 1024), new_tokens=4))
    # the device holds 9 pages, of which one is being written
    assert [row["cold_bytes_per_step"] for row in rows] == [0, 24 * 16 * TINY_KV, 56 * 16 * TINY_KV]
    assert [row["share"] is None for row in rows] == [True, False, False]
    for row in rows[1:]:
        rate = row["cold_bytes_per_step"] / row["ms_per_token"].median * 1e3
        assert row["cold_bytes_per_s"] == pytest.approx(rate) and row["share"] == pytest.approx(rate / 4096e3)
    assert [row["peak_device_bytes"] for row in rows] == [1000, 2000, 3000], "without the buffers to measure with"
    assert rows[2]["kv_bytes"] == 1024 * TINY_KV


def test_model_rows_stand_beside_what_bounds_them(tiny_shape: Shape) -> None:
    turns, memory = fake_turns(), MemoryCeiling(CPU, 4000)
    with closing(LinkCeiling(CPU, 1000)) as link:
        rows = model_rows(turns, memory, link, tiny_shape, resident=40, cold=300, new_tokens=4)
    assert [(row["engine"], row["context"]) for row in rows] == [
        ("distkv", 40), ("transformers", 40), ("distkv", 300), ("transformers", 300),
    ]  # fmt: skip
    # of 19 pages the device holds 5, one of which is being written
    assert [row["cold_bytes_per_step"] for row in rows] == [0, 0, 14 * 16 * TINY_KV, 300 * TINY_KV]
    for row in rows:
        assert row["weights_ms"] == pytest.approx(row["weight_bytes"] / 4000)
        assert row["cold_ms"] == pytest.approx(row["cold_bytes_per_step"] / 1000)
        assert row["ratio"] == pytest.approx(row["ms_per_token"].median / max(row["weights_ms"], row["cold_ms"]))


def test_residency_rows_compare_every_bit(tiny_shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = residency_rows(tiny_shape, 200, 4)
    assert [row["streamed_bytes"] > 0 for row in rows] == [False, True, True]
    assert rows[2]["streamed_bytes"] > rows[1]["streamed_bytes"]
    assert all(row["num_logprobs"] == 4 * 64 and row["same"] == "yes" for row in rows)
    run, calls = engine_rows._run, []

    def tampered(*arguments: Any, **options: Any) -> Any:
        stage = run(*arguments, **options)
        calls.append(stage)
        if len(calls) == 2:
            logprobs = stage.outputs[3].logprobs
            token, value = logprobs.top[63]
            logprobs.top[63] = token, value * (1 + 2**-23)
        return stage

    monkeypatch.setattr(engine_rows, "_run", tampered)
    with pytest.raises(DistKVError, match="half on the host and on the device differ from token"):
        residency_rows(tiny_shape, 200, 4)
    monkeypatch.setattr(Stage, "bytes_moved", {})
    with pytest.raises(DistKVError, match="with the context half on the host, 0 bytes were streamed"):
        residency_rows(tiny_shape, 200, 4)
