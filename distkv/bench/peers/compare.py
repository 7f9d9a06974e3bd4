"""`distkv bench peers`: the same work on distkv and on other engines, in turns.

Every engine, distkv too, runs in a process of its own with as many threads, the same dtype, the same most tokens and
the same KV memory, and without a prefix cache; all else is as each engine has it. All are loaded at the same time and
take turns: one works while the others wait. A peer that is missing, or fails, is left out, and the report says why.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distkv.bench.harness import Bench
from distkv.bench.options import BenchOptions
from distkv.bench.peers import opened, report
from distkv.bench.peers.cpu_time import await_idle, group_cpu_seconds
from distkv.bench.peers.engines import Engine, Setting, engines
from distkv.bench.peers.guarded import PeerFailed
from distkv.bench.peers.opened import Opened
from distkv.bench.peers.plot import write_plot
from distkv.bench.peers.workloads import PARTS, Sizes, Work, works
from distkv.errors import ConfigError, DistKVError
from distkv.option_checks import check_choice
from distkv.reporting.out_file import check_out_file, temporary_folder, writing
from distkv.workers.model.model_config import ModelConfig

DTYPES = ("float32", "float16", "bfloat16")
JSON, MARKDOWN, PICTURE = "peers.json", "peers.md", "peers.png"
NO_SERVER = "its server takes no token ids and cannot go past end tokens, so it has nothing to compare"
Opener = Callable[[Engine, Setting, Path, float], AbstractContextManager[Opened]]


@dataclass(frozen=True)
class _Loaded:
    """An engine that takes turns, and what ends it."""

    engine: Opened
    stack: ExitStack


def run(
    model: Path, peers: list[str], only: list[str], sizes: Sizes, dtype: str, kv_bytes: int, num_threads: int | None,
    time_limit: float, out: Path | None, options: BenchOptions,
) -> None:  # fmt: skip
    """Measures, prints tables and writes the report; see `distkv bench peers --help`.

    Raises ConfigError for what cannot be measured, DistKVError when distkv itself fails, and StoreError when the report
    cannot be written.
    """
    compared = engines(peers)
    parts = _parts(only)
    config = ModelConfig.load(model)
    sizes.check(config.max_position_embeddings, parts)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, which each engine would take for another one; use {', '.join(DTYPES)}")
    with ExitStack() as stack:
        logs = stack.enter_context(temporary_folder()) if out is None else _folder(out)
        if out is not None and options.json is None:
            options = replace(options, json=out / JSON)
        facts = {"model": model.name, "dtype": dtype, **asdict(sizes)}
        bench = stack.enter_context(Bench("peers", options, num_threads, **facts))
        setting = Setting(model, dtype, torch.get_num_threads(), sizes.longest(parts), kv_bytes)
        comparison = _Comparison(bench, setting, logs, time_limit)
        present = comparison.find(compared)
        for phase, opener in (("offline", opened.driver), ("http", opened.server)):
            own = [part for part in parts if (part == "http") == (phase == "http")]
            work = [one for part in own for one in works(part, sizes, config.vocab_size)]
            comparison.measure(phase, opener, present, work)
        comparison.report(out)


class _Comparison:
    """Rows of figures, and what is missing and why, in the facts and rows of `bench`."""

    def __init__(self, bench: Bench, setting: Setting, logs: Path, time_limit: float):
        """`logs`: a folder for what the engines write; `time_limit`: seconds that a start or a turn may take."""
        self._bench, self._setting, self._logs, self._time_limit = bench, setting, logs, time_limit
        self._waited: dict[str, list[float]] = {}  # CPU seconds and seconds
        bench.facts |= {
            "max_model_len": setting.max_model_len, "kv_bytes": setting.kv_bytes, "cores": os.cpu_count(),
            "engines": {}, "missing": [],
        }  # fmt: skip

    def find(self, compared: list[Engine]) -> list[Engine]:
        """Those whose environment has them, before minutes are spent on the others."""
        present = []
        for engine in compared:
            try:
                self._facts["engines"][engine.name] = opened.probe(engine, self._setting, self._log(engine, "probe"))
                present.append(engine)
            except PeerFailed as failure:
                self._leave_out(engine.name, failure)
        return present

    def measure(self, phase: str, opener: Opener, present: list[Engine], work: list[Work]) -> None:
        """Loads all engines, and has them take turns at each work."""
        with ExitStack() as closing:
            loaded: dict[str, _Loaded] = {}
            for engine in present if work else ():
                if phase == "http" and not engine.is_served:
                    self._leave_out(engine.name, PeerFailed(NO_SERVER), phase)
                    continue
                self._bench.doing(f"{engine.name} starts")
                own = closing.enter_context(ExitStack())
                log = self._log(engine, phase)
                try:
                    opening = opener(engine, self._setting, log, self._time_limit)
                    loaded[engine.name] = _Loaded(own.enter_context(opening), own)
                except PeerFailed as failure:
                    self._leave_out(engine.name, failure, phase)
                    continue
                self._facts["engines"][engine.name][f"start_{phase}_s"] = loaded[engine.name].engine.start_s
            for one in work:
                for row in report.rows_of(one.part, one.title, one.size, self._turns(loaded, one)):
                    self._bench.add(row)

    def _turns(self, loaded: dict[str, _Loaded], work: Work) -> dict[str, list[dict[str, float]]]:
        """Figures of each engine's turns; one that fails is ended and has no part any more."""
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in loaded}
        for turn, name in self._bench.turns(list(loaded), work.title):
            if name not in loaded:
                continue
            engine = loaded[name].engine
            waiting = {other: one.engine.group for other, one in loaded.items() if other != name}
            try:
                with self._waiting(waiting):
                    figures = engine.turn(work if turn >= 0 else work.warm_up(), self._time_limit)
                await_idle(engine.group)
            except PeerFailed as failure:
                loaded.pop(name).stack.close()
                del taken[name]
                self._leave_out(name, failure, work.title)
                continue
            if turn >= 0:
                taken[name].append(figures)
        return taken

    @contextmanager
    def _waiting(self, groups: dict[str, int]) -> Iterator[None]:
        """Takes down the CPU time of engines that wait while another one has its turn."""
        start, before = time.monotonic(), {name: group_cpu_seconds(group) for name, group in groups.items()}
        yield
        for name, group in groups.items():
            used = self._waited.setdefault(name, [0.0, 0.0])
            used[0] += group_cpu_seconds(group) - before[name]
            used[1] += time.monotonic() - start
            self._facts["engines"][name]["cores_while_waiting"] = used[0] / used[1]

    def report(self, out: Path | None) -> None:
        """Prints all figures and what is missing, and writes the report. Raises StoreError."""
        facts, rows = self._facts, self._bench.rows
        self._bench.write()
        for part in dict.fromkeys(row["part"] for row in rows):
            self._bench.line(report.TITLES[part])
            self._bench.table(*report.by_engine(part, rows))
        for text in (*(f"NOT MEASURED: {why}" for why in facts["missing"]), report.noise(facts)):
            if text:
                self._bench.line(text)
        if out is None:
            return
        with writing(out / MARKDOWN):
            (out / MARKDOWN).write_text(report.markdown(facts, rows, PICTURE), encoding="utf-8")
        if rows:
            title = [str(facts[name]) for name in ("model", "dtype", "machine", "date")]
            write_plot(out / PICTURE, rows, f"{', '.join(title)}, {facts['threads']} threads")
        figures = self._bench.options.json
        self._bench.line(f"{MARKDOWN}, {PICTURE} and logs of the engines are in {out}, figures in {figures}")

    @property
    def _facts(self) -> dict[str, Any]:
        return self._bench.facts

    def _log(self, engine: Engine, phase: str) -> Path:
        path = self._logs / f"{engine.name}.{phase}.log"
        path.unlink(missing_ok=True)
        return path

    def _leave_out(self, name: str, failure: PeerFailed, when: str = "") -> None:
        if name == "distkv":
            raise DistKVError(f"distkv failed in its own comparison, {when}: {failure}")
        text = f"{name}{when and ', '}{when}: {failure}"
        self._facts["missing"].append(text)
        self._bench.line(f"left out: {text}")


def _parts(only: list[str]) -> list[str]:
    for name in only:
        check_choice("--only", name, PARTS)
    return [part for part in PARTS if part in only or not only]


def _folder(out: Path) -> Path:
    """The folder of the report. Raises ConfigError when it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be made: {error.strerror}; name another folder") from error
    for name in (MARKDOWN, PICTURE):
        check_out_file(out / name)
    return out
