"""A trace is JSON at any moment, its events nest, and cold pages are seen to be fetched while a step computes."""

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.llms import PAGE_BYTES, tiered, tiered_options
from support.processes import kill, read_line, start_python
from support.prompts import random_prompt

from distkv import LLM, ConfigError, SamplingParams
from distkv.commands.main import main
from distkv.metrics.trace_file import TraceFile

PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)

Event = dict[str, Any]


def read(path: Path) -> list[Event]:
    return json.loads(path.read_text())


def tracks(events: list[Event]) -> dict[tuple[str, str], list[Event]]:
    """Spans in order, those that hold others first, by the names of process and track."""
    names = {(one["name"], one["pid"], one["tid"]): one["args"].get("name") for one in events if one["ph"] == "M"}
    found = defaultdict(list)
    for one in events:
        if one["ph"] == "X":
            process = names["process_name", one["pid"], 0]
            found[process, names["thread_name", one["pid"], one["tid"]]].append(one)
    for spans in found.values():
        spans.sort(key=lambda one: (one["ts"], -one["dur"]))
    return found


def end(event: Event) -> float:
    return round(event["ts"] + event["dur"], 3)


def check_nesting(spans: list[Event]) -> None:
    around: list[Event] = []
    for one in spans:
        while around and end(around[-1]) <= one["ts"]:
            around.pop()
        assert not around or end(one) <= end(around[-1]), f"{one} crosses {around[-1]}"
        around.append(one)


@pytest.fixture(scope="module")
def streamed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], dict[str, int]]:
    """The trace of two requests that stream from host and disk, and the bytes that have moved."""
    folder = tmp_path_factory.mktemp("trace")
    with tiered(tiny_model, (10, 7, 60), folder / "cache", trace=folder / "steps.json") as llm:
        llm.generate([random_prompt(200, 2), random_prompt(180, 3)], PARAMS, use_tqdm=False)
        moved = llm.stats().bytes_moved
    return read(folder / "steps.json"), moved


def test_events_nest_on_every_track(streamed: tuple[list[Event], dict[str, int]]) -> None:
    found = tracks(streamed[0])
    assert {("leader", "engine"), ("rank 0", "step"), ("rank 0", "kv-copy_0")} <= found.keys()
    for spans in found.values():
        check_nesting(spans)


def test_fetches_appear_beside_compute(streamed: tuple[list[Event], dict[str, int]]) -> None:
    """On a CPU they are within it: the thread that computes fetches what it needs next."""
    events, moved = streamed
    step = tracks(events)["rank 0", "step"]
    computes = [one for one in step if one["name"] == "compute"]
    fetches = [one for one in step if one["name"].startswith("fetch slices")]
    reads = [one for one in step if one["name"] == "disk read"]
    assert computes and fetches and reads
    assert all(end(one) <= other["ts"] for one, other in pairwise(computes))
    for inner, outer in ((fetches, computes), (reads, fetches)):
        for one in inner:
            assert any(two["ts"] <= one["ts"] and end(one) <= end(two) for two in outer), one
    pages = Counter()
    for one in fetches:
        pages[one["name"]] += one["args"]["pages"]
    slice_bytes = PAGE_BYTES // 2  # the tiny model has two layers
    assert pages["fetch slices from disk"] == moved["disk_streamed"] / slice_bytes == len(reads)
    assert pages["fetch slices from host"] == moved["host_streamed"] / slice_bytes
    decodes = [one for one in computes if one["args"]["tokens"] == one["args"]["sequences"]]
    assert len(decodes) >= 28


def test_each_stage_of_a_step_is_there(streamed: tuple[list[Event], dict[str, int]]) -> None:
    counts = Counter(one["name"] for one in tracks(streamed[0])["leader", "engine"])
    computes = sum(one["name"] == "compute" for one in streamed[0])
    assert counts["start"] == counts["wait for ranks"] == counts["book"] == computes
    assert counts["prepare"] >= counts["start"] and counts["read tokens"] >= counts["start"]


def test_a_killed_process_leaves_a_whole_trace(tiny_model: Path, tmp_path: Path) -> None:
    options = tiered_options((10, 7, 60), tmp_path / "cache", trace=str(tmp_path / "steps.json"))
    process = start_python(
        "import json, sys\n"
        "from distkv import LLM, SamplingParams\n"
        f"llm = LLM({str(tiny_model)!r}, **json.loads({json.dumps(options)!r}))\n"
        "for output in llm.stream(list(range(3, 103)), SamplingParams(max_tokens=100, ignore_eos=True)):\n"
        "    if len(output.outputs[0].token_ids) == 20: print('running', flush=True)\n"
    )
    assert read_line(process) == "running"
    kill(process)
    computes = [one for one in read(tmp_path / "steps.json") if one["name"] == "compute"]
    assert len(computes) >= 20


def test_without_a_trace_nothing_is_noted(tiny_model: Path, tmp_path: Path) -> None:
    with tiered(tiny_model, (10, 7, 60), tmp_path) as llm:
        llm.generate([random_prompt(200, 2)], PARAMS, use_tqdm=False)
        engine: Any = llm._engine
        assert engine._runner.measures.spans == []
        assert engine._runner.measures.nanoseconds


def test_a_file_that_cannot_be_written_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "Is a directory; name another"),
        (tmp_path / "missing" / "steps.json", "No such file or directory; name another"),
        (Path("/dev/null"), "is not a file; name another"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(tiny_model, device_kv_bytes="1MiB", trace=path)
    with tiered(tiny_model, (10, 7, 0), trace=tmp_path / "steps.json") as llm:
        with pytest.raises(ConfigError, match="another engine writes the trace"):
            LLM(tiny_model, device_kv_bytes="1MiB", trace=tmp_path / "steps.json")
        llm.generate([[5, 6, 7]], PARAMS, use_tqdm=False)
    assert len(read(tmp_path / "steps.json")) > 30


def test_a_full_disk_ends_the_trace_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = TraceFile(tmp_path / "steps.json")
    file.write(b'{"name": "one"}')
    with open("/dev/full", "r+b", buffering=0) as full:
        before, file._file = file._file, full
        file.write(b'{"name": "two"}')
        file.write(b'{"name": "three"}')
    before.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert read(tmp_path / "steps.json") == [{"name": "one"}]


def test_a_new_engine_begins_the_file_anew(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text("x" * 10**6)
    with tiered(tiny_model, (10, 0, 0), trace=path) as llm:
        llm.generate([[5, 6, 7]], PARAMS, use_tqdm=False)
    assert read(path)


def test_the_command_writes_it(
    tiny_model: Path,
    demo_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = ["generate", "--model", str(demo_model), "--prompt", "Hello", "--max-tokens", "3"]
    monkeypatch.setattr("sys.argv", ["distkv", *arguments, "--trace", str(tmp_path / "steps.json")])
    main()
    assert capfd.readouterr().out.strip()
    assert sum(one["name"] == "compute" for one in read(tmp_path / "steps.json")) in (3, 4)
