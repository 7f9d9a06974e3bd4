"""How an engine of Llama-3-8B's shape with random weights starts and decodes: seconds, milliseconds of device and host
for each token, the time by kernel. `profile_engine.py FOLDER [start]`; with "start" it starts and decodes alone.

A step is the graph of one row, then head and sampling: a token's time less that of the graph alone is these and what
they wait for each other; the graph's less that of its kernels is what one kernel waits for another.
"""

import gzip
import json
import logging
import random
import shutil
import statistics
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from device_trace import busy, decode_by_kernel
from probing import Probes, seconds
from torch.profiler import ProfilerActivity, profile

from distkv.bench.device import require_cuda
from distkv.bench.engine_rows import Shape
from distkv.engine.client import EngineClient
from distkv.engine.engine import Engine
from distkv.engine.observer import StepObserver
from distkv.engine.protocol import EngineRequest
from distkv.models.shapes import shape_folder
from distkv.sampling_params import SamplingParams
from distkv.stress.stage import Stage, run_stage
from distkv.workers.group.local_group import LocalGroup
from distkv.workers.runners.compile_ahead import join_compilers
from distkv.workers.runners.cuda_runner import CudaRunner

CONTEXT, NEW_TOKENS, TRACED_TOKENS, STEP_TOKENS = 1024, 64, 16, 2048


class Clock(StepObserver):
    """Seconds of the engine's own thread by stage of a step; `reported` is waiting."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._last = time.perf_counter()

    def _end(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds.setdefault(stage, []).append(now - self._last)
        self._last = now

    def prepared(self, step: object) -> None:
        self._end("prepare")

    def reported(self, step: object) -> None:
        self._end("wait")

    def completed(self, step: object) -> None:
        self._end("complete")

    def started(self, step: object) -> None:
        self._end("start")

    def emitted(self, outputs: object) -> None:
        self._end("read and emit")


def decode(engine: EngineClient, vocab_size: int, new_tokens: int) -> Stage:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    generator = random.Random(new_tokens)
    prompt = [generator.randrange(vocab_size) for _ in range(CONTEXT)]
    return run_stage(engine, EngineRequest("0", prompt, params, new_tokens, 1), lambda sample: None)


def compile_seconds() -> float:
    """That threads go on compiling."""
    start = time.perf_counter()
    join_compilers()
    return time.perf_counter() - start


def decode_ms(engine: EngineClient, vocab_size: int) -> dict[str, Any]:
    stage = decode(engine, vocab_size, NEW_TOKENS)
    return {"first token": 1e3 * stage.times[0], "each token, quartiles": statistics.quantiles(stage.decode_ms, n=4)}


def host_us(engine: EngineClient, vocab_size: int) -> dict[str, float]:
    """By stage of a step, the median."""
    assert isinstance(engine, Engine)
    clock = engine._observer = Clock()
    try:
        decode(engine, vocab_size, NEW_TOKENS)
    finally:
        engine._observer = StepObserver()
    return {name: round(1e6 * statistics.median(times), 1) for name, times in clock.seconds.items()}


def runner_of(engine: EngineClient) -> Any:
    """The `Runner` of the one rank."""
    assert isinstance(engine, Engine) and isinstance(engine._close, MethodType)
    group = engine._close.__self__
    assert isinstance(group, LocalGroup)
    return group.rank._runner


def graph_ms(engine: EngineClient) -> float:
    """Of the graph of one row, with the inputs of the step that it ran last."""
    runner = runner_of(engine)
    assert isinstance(runner, CudaRunner) and runner._graphs is not None
    return 1e3 * seconds(runner._graphs._graphs[1], 20)


def trace(engine: EngineClient, vocab_size: int, folder: Path, events: list[dict[str, Any]]) -> int:
    """Puts the events of some tokens into the list; returns how many there are. Table and trace go to files."""
    path = folder / "decode.json"
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        decode(engine, vocab_size, TRACED_TOKENS)
    profiled.export_chrome_trace(str(path))
    events += json.loads(path.read_text())["traceEvents"]
    with path.open("rb") as whole, gzip.open(f"{path}.gz", "wb") as packed:
        shutil.copyfileobj(whole, packed)
    path.unlink()
    table = profiled.key_averages().table(sort_by="self_device_time_total", row_limit=28, max_name_column_width=70)
    (folder / "decode-kernels.txt").write_text(table)
    print(table)
    return len(events)


def main(folder: Path, only_start: bool) -> None:
    require_cuda("gpu")
    logging.basicConfig(level=logging.INFO)
    torch.zeros(1, device="cuda")
    probes = Probes(folder / ("start.json" if only_start else "profile.json"))
    with shape_folder("llama-3-8b") as model:
        shape = Shape(model, 256, STEP_TOKENS, "cuda")
        vocab_size, layers = shape.model.vocab_size, shape.model.num_hidden_layers
        start = time.perf_counter()
        with closing(shape.start(2 * STEP_TOKENS, STEP_TOKENS // 256 + 4)) as engine:
            started = time.perf_counter() - start
            probes.ask(lambda: started, "seconds of the start")
            probes.ask(lambda: decode(engine, vocab_size, 2).times[0], "seconds to the first token ever")
            probes.ask(compile_seconds, "seconds that threads went on compiling")
            probes.ask(partial(decode_ms, engine, vocab_size), "ms of decode")
            if not only_start:
                probes.ask(partial(graph_ms, engine), "ms of the graph of one row alone")
                probes.ask(partial(host_us, engine, vocab_size), "host us by stage, median")
                events: list[dict[str, Any]] = []
                probes.ask(partial(trace, engine, vocab_size, folder, events), "events of the trace")
                probes.ask(lambda: busy(events), "ms of the device in the trace")
                probes.ask(lambda: decode_by_kernel(events, layers), "us of the last tokens in the trace")
    probes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "start" in sys.argv[2:])
