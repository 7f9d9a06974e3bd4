"""Kills at random moments, one restart after the other on one folder; limits of a process; clocks that are set."""

import re
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from reliability.disk_faults import COLD
from reliability.driver_process import DriverProcess, Gone, StartFailed
from reliability.faults import fault
from reliability.trial import LOAD, NONE, Trial

MIB = 2**20
DAY = 86400.0
NO_FOLDER = "/proc/nowhere"  # nor can root make one there
NO_MEMORY = r"CapacityError: .*memory|MemoryError|allocate memory|bad_alloc|failed to map segment|start new thread"


@fault("kill-restart", "SIGKILL of the process, and a start on its folder, round after round", 50)
def _kill_and_restart(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    salt = trial.record.seed
    load = bench.driver.ask(trial.random.sample(bench.requests, LOAD), salt)
    trial.await_moment(bench.driver, load)
    driver = bench.drop_driver()
    assert driver is not None
    driver.kill()
    with suppress(Gone):  # what had come before the end
        driver.finish(load)
    trial.compare(bench, load, explained="it has not ended")
    moment = time.monotonic()
    again = bench.driver.ask(load.requests, salt)
    trial.finish(bench, again, moment)
    cached = sum(again.cached.values())
    trial.record.moment += f"; {cached} tokens of prompts were found again"
    if load.num_tokens > load.num_expected // 2 and not cached:  # full pages are written as they fill
        trial.record.unexplained.append("no page was found again")


@fault("files-64", "No more than 64 open files (`ulimit -n`)", 3)
def _limit_files(trial: Trial) -> None:
    _with_own_driver(trial, limits={resource.RLIMIT_NOFILE: 64})


@fault("memory-limit", "A limit of the address space (`ulimit -v`), from start to end", 6)
def _limit_memory(trial: Trial) -> None:
    """It starts and answers, or one error says why not."""
    limit = trial.random.randrange(600, 1500) * MIB
    trial.record.moment = f"{limit} bytes"
    try:
        _with_own_driver(trial, limits={resource.RLIMIT_AS: limit}, explained=NO_MEMORY)
    except StartFailed as failed:
        kind = trial.record.errors if re.search(NO_MEMORY, str(failed)) else trial.record.unexplained
        kind.append(f"the start: {failed}")


@fault("memory-gone", "No more memory under load: the address space is limited to what is mapped, for a second", 10)
def _take_memory(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    pid = bench.driver.process.pid
    mapped = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (mapped, resource.RLIM_INFINITY))
    bench.driver.listen(lambda: load.is_done, 1.0)
    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trial.finish_and_go_on(bench, bench.driver, load, moment, NO_MEMORY)


@fault("files-gone", "No more files can be opened under load, for a second", 10)
def _take_files(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    pid = bench.driver.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (trial.random.randrange(3, 40), before[1]))
    bench.driver.listen(lambda: load.is_done, 1.0)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    trial.finish_and_go_on(bench, bench.driver, load, moment, r"CapacityError|StoreError")


@fault("no-home", "No HOME, and a folder for temporary files that is not there", 2)
def _hide_home(trial: Trial) -> None:
    _with_own_driver(trial, environment={"HOME": NO_FOLDER, "TMPDIR": NO_FOLDER, "XDG_CACHE_HOME": NO_FOLDER})


CLOCK = """
import pathlib, time
of_system, offset = time.time, pathlib.Path({!r})
time.time = lambda: of_system() + float(offset.read_text())
time.time_ns = lambda: int(time.time() * 1e9)
"""
"""libfaketime, which would tell all of a process another time, has time.sleep raise (clock_nanosleep, EINVAL)."""


@fault("clock", "Python's clock is set by up to a day, forth and back, under load", 10)
def _set_clock(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    offset = bench.folder / "offset"
    offset.write_text("+0")
    assert bench.driver
    driver = bench.new_driver(prelude=CLOCK.format(str(offset)))
    driver.start(bench.model, bench.options | {"cache_dir": str(bench.folder / "clock")})
    load = trial.load(bench, driver)
    moment = trial.await_moment(driver, load)
    while not load.is_done:
        seconds = trial.random.uniform(-DAY, DAY)
        offset.with_name("next").write_text(f"{seconds:+.0f}")
        offset.with_name("next").replace(offset)
        driver.listen(lambda: load.is_done, 0.5)
    trial.finish_on(bench, driver, load, moment)
    _end(trial, driver)


def _with_own_driver(trial: Trial, explained: str = NONE, **how: Any) -> None:
    """Answers some requests in a process of its own, on a folder of its own."""
    bench = trial.bench_of(COLD)
    assert bench.driver
    driver = bench.new_driver(**how)
    began = time.monotonic()
    try:
        driver.start(bench.model, bench.options | {"cache_dir": str(bench.folder / "own")})
        load = trial.load(bench, driver)
        trial.finish_on(bench, driver, load, began, explained)
    except StartFailed:
        driver.end()
        raise
    _end(trial, driver)


def _end(trial: Trial, driver: DriverProcess) -> None:
    if (error := driver.close()) is not None:
        trial.record.unexplained.append(f"closing: {error}")
    driver.end()
