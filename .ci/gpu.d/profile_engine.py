"""How an engine of Llama-3-8B's shape with random weights starts and decodes: seconds, milliseconds of device and host
for each token, the time by kernel. `profile_engine.py FOLDER [start]`; with "start" it starts and decodes alone."""

import gzip
import json
import logging
import random
import shutil
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from distkv.bench.device import require_cuda
from distkv.bench.engine_rows import Shape
from distkv.engine.engine import Engine
from distkv.engine.observer import StepObserver
from distkv.engine.protocol import EngineRequest
from distkv.models.shapes import shape_folder
from distkv.sampling_params import SamplingParams
from distkv.stress.stage import Stage, run_stage
from distkv.workers.runners.compile_ahead import join_compilers

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


def decode(engine: Any, new_tokens: int, vocab_size: int) -> Stage:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    generator = random.Random(new_tokens)
    prompt = [generator.randrange(vocab_size) for _ in range(CONTEXT)]
    return run_stage(engine, EngineRequest("0", prompt, params, new_tokens, 1), lambda sample: None)


def busy(trace: Path) -> dict[str, float]:
    """What the device was at from its first kernel to its last, in ms, read off a trace."""
    events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    taken, end = 0.0, spans[0][0]
    for first, last in spans:
        taken += max(0.0, last - max(first, end))
        end = max(end, last)
    whole = end - spans[0][0]
    return {"kernels": len(spans), "whole": whole / 1e3, "busy": taken / 1e3, "idle": (whole - taken) / 1e3}


def main(folder: Path, only_start: bool) -> None:
    require_cuda("gpu")
    logging.basicConfig(level=logging.INFO)
    torch.zeros(1, device="cuda")
    with shape_folder("llama-3-8b") as model:
        shape = Shape(model, 256, STEP_TOKENS, "cuda")
        start = time.perf_counter()
        with closing(shape.start(2 * STEP_TOKENS, STEP_TOKENS // 256 + 4)) as engine:
            found: dict[str, Any] = {"seconds of the start": time.perf_counter() - start}
            first = decode(engine, 2, shape.model.vocab_size)
            found["seconds to the first token ever"] = first.times[0]
            start = time.perf_counter()
            join_compilers()
            found["seconds that threads went on compiling"] = time.perf_counter() - start
            stage = decode(engine, NEW_TOKENS, shape.model.vocab_size)
            found["ms to the first token"] = 1e3 * stage.times[0]
            found["ms for a token, quartiles"] = statistics.quantiles(stage.decode_ms, n=4)
            if not only_start:
                assert isinstance(engine, Engine)
                clock = engine._observer = Clock()
                decode(engine, NEW_TOKENS, shape.model.vocab_size)
                found["host us by stage, median"] = {
                    name: round(1e6 * statistics.median(times), 1) for name, times in clock.seconds.items()
                }
                engine._observer = StepObserver()
                trace = folder / "decode.json"
                with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
                    decode(engine, TRACED_TOKENS, shape.model.vocab_size)
                table = profiled.key_averages().table(
                    sort_by="self_device_time_total", row_limit=28, max_name_column_width=70
                )
                (folder / "decode-kernels.txt").write_text(table)
                profiled.export_chrome_trace(str(trace))
                found["ms of the device in the trace"] = busy(trace)
                with trace.open("rb") as whole, gzip.open(f"{trace}.gz", "wb") as packed:
                    shutil.copyfileobj(whole, packed)
                trace.unlink()
                print(table)
            name = "start" if only_start else "profile"
            (folder / f"{name}.json").write_text(json.dumps(found, indent=1))
            for name, value in found.items():
                print(f"{name}: {value}", flush=True)


main(Path(sys.argv[1]), "start" in sys.argv[2:])
