"""Answers the lines of a file, many at a time, from its start to its end or to whatever stops it."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distkv.async_llm import AsyncLLM
from distkv.batch.files import BatchFiles, Claim
from distkv.batch.input_file import Contents, lines_left, scan
from distkv.batch.line_file import LineFile
from distkv.batch.records import Record, answered, refused
from distkv.batch.requests import LineError, read_request
from distkv.batch.restart import Before, restore
from distkv.batch.routes import Routes
from distkv.batch.signals import Stop
from distkv.batch.tally import Tally
from distkv.batch.view import SHOW_SECONDS, Report
from distkv.config import EngineOptions
from distkv.errors import DistKVError, RequestError

MADE_WITH = (
    "dtype", "seed", "device", "load_format", "max_model_len", "tensor_parallel_size", "page_size", "batch_invariant",
    "attention_policy", "kv_cache_dtype",
)  # fmt: skip
"""Options that answers depend on. On CUDA others change last bits too, without `batch_invariant`."""
SYNC_SECONDS = 1.0
GRACE_SECONDS = 10.0  # that what runs has to end after a signal
LOST_SHARE = 0.5  # of the time that requests wait for an engine, after which one that fails has failed for want of it
STATS_SECONDS = 2.0  # between looks at how many engines run
# Times as many lines are on their way as can run: engines find the next ones ready, and among them those that share a
# long prompt (`AdmissionOrder`), though lines about other ones lie between.
FILL = 4


@dataclass(frozen=True)
class BatchOptions:
    """What a batch is told beside the files and the engine.

    Args:
        names: what lines may call the model by.
        retries: whether lines that were refused before are tried again.
    """

    names: list[str]
    retries: bool


def run(folder: Callable[[], Path], files: BatchFiles, options: BatchOptions, engine: EngineOptions) -> int:
    """Answers all lines that have no answer yet. Returns the exit code: 0 when all are answered, 1 when some are in the
    error file, 128 and the number of the signal that has stopped it.

    Args:
        folder: finds the model's folder; it may take its time.

    Raises RequestError or ConfigError before any work for files that cannot be used, StoreError when they cannot be
    written any more, and what `AsyncLLM` raises when it cannot be made or has ended.
    """
    contents = scan(files.input, options.names)
    _check_models(contents, options.names)
    model = folder()
    claim = Claim(files, model, {name: engine.get(name) for name in MADE_WITH})
    is_complete = False
    try:
        before = restore(contents, files.output, files.errors, options.retries)
        tally = Tally(contents.num_lines, before.num_answered, before.num_failed)
        with closing(Report(tally, files)) as report:
            stopped = None
            if before.left:
                stopped = _Batch(files, options, engine, before, report).run(model)
        is_complete = tally.num_answered == tally.num_lines
    finally:
        claim.release(is_complete)
    if stopped is not None and tally.num_done < tally.num_lines:
        return 128 + stopped
    return int(not is_complete)


def _check_models(contents: Contents, names: list[str]) -> None:
    """Raises RequestError when no line can be answered since all ask for other models."""
    asked = {model for model in contents.models if model is not None}
    if contents.models == asked and not asked & set(names):
        some = ", ".join(repr(name) for name in sorted(asked)[:3])
        raise RequestError(
            f"no line asks for {names[0]!r}: they name {some}; give --served-model-name {min(asked)!r} to have them "
            "answered by this model"
        )


class _Batch:
    """A run with lines to answer."""

    def __init__(self, files: BatchFiles, options: BatchOptions, engine: EngineOptions, before: Before, report: Report):
        self._options, self._engine, self._report = options, engine, report
        self._tally = report.tally
        self._num_left = len(before.left)
        self._lines = lines_left(files.input, before.left)
        self._output, self._errors = LineFile(files.output), LineFile(files.errors)
        self._llm: AsyncLLM
        self._routes: Routes
        self._stop: Stop

    def run(self, model: Path) -> signal.Signals | None:
        """Loads the model and answers the lines; returns the signal that has stopped it, if any."""
        try:
            asyncio.run(self._run(model))
            self._sync()
        except asyncio.CancelledError:
            if self._stop.signal is None:
                raise
        finally:
            self._output.close()
            self._errors.close()
        return self._stop.signal

    async def _run(self, model: Path) -> None:
        self._stop = Stop()
        with self._stop.handling():
            self._report.say(f"{self._num_left} of {self._tally.num_lines} lines are to be answered; loading {model}")
            async with await AsyncLLM.create(model, **self._engine) as llm:
                self._llm, self._routes = llm, Routes(llm, self._options.names)
                self._stop.is_gentle = True
                with self._report.showing():
                    await self._answer_all()
                if read := (await llm.stats()).policy.shown():
                    self._report.say(f"the answers have read {read}")

    async def _answer_all(self) -> None:
        info = self._llm.info
        num_workers = min(FILL * info.max_num_seqs * info.num_engines, self._num_left)
        workers = [asyncio.create_task(self._answer_some()) for _ in range(num_workers)]
        others = [asyncio.create_task(one) for one in (self._sync_often(), self._show_often())]
        asked = asyncio.create_task(self._stop.asked.wait())
        ends: list[asyncio.Future[Any]] = [asyncio.gather(*workers), *others]
        try:
            await asyncio.wait([*ends, asked], return_when=asyncio.FIRST_COMPLETED)
            if asked.done() and not ends[0].done():
                self._report.say(f"stopping; what runs has {GRACE_SECONDS:.0f} s to end")
                await asyncio.wait(ends, timeout=GRACE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end.done():
                    end.result()
        finally:
            for task in (*workers, *others, asked):
                task.cancel()
            await asyncio.gather(*ends, asked, return_exceptions=True)

    async def _answer_some(self) -> None:
        """Answers one line after the other, until there are no more."""
        while not self._stop.asked.is_set():
            found = next(self._lines, None)
            if found is None:
                return
            record = await self._answer(*found)
            (self._output if record.is_answer else self._errors).append(record.encode())
            self._tally.add(record)
            await asyncio.sleep(0)  # lines that are refused wait for nothing else

    async def _answer(self, number: int, custom_id: str, line: bytes) -> Record:
        """What there is to write of a line. Raises what has ended the engine, so that the line is left for later."""
        try:
            request = read_request(line)
        except LineError as error:
            return refused(number, custom_id, str(error))
        record = answered(custom_id, await self._routes.post(request.url, request.sent(self._engine["seed"])))
        if record.may_pass:
            self._llm.check_health()
            seconds = (await self._llm.stats()).seconds_without_engine
            if seconds > LOST_SHARE * self._llm.config.seconds_to_rebuild:
                raise DistKVError(
                    f"no engine could be started anew for {seconds:.0f} s; run the same command again to go on"
                )
        return record

    async def _sync_often(self) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(self._sync)

    def _sync(self) -> None:
        self._output.sync()
        self._errors.sync()

    async def _show_often(self) -> None:
        num_engines = self._llm.info.num_engines
        while True:
            if num_engines > 1:
                self._report.note(f"{(await self._llm.stats()).num_engines} of {num_engines} engines")
            for _ in range(round(STATS_SECONDS / SHOW_SECONDS)):
                self._report.show()
                await asyncio.sleep(SHOW_SECONDS)
