"""Faults of single ranks while an engine runs."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from reliability.bench import Bench, Setting
from reliability.driver_process import Hung, StartFailed
from reliability.faults import fault
from reliability.trial import Trial

START_TIMEOUT = 120.0  # seconds in which processes of ranks must appear
START_SECONDS = 5.0  # that a start takes about from there on, on two cores


def signal_rank(trial: Trial, setting: Setting, what: signal.Signals) -> None:
    """Sends a signal to a rank, whichever it is."""
    bench = trial.bench_of(setting)
    driver, cluster = bench.driver, bench.cluster
    assert cluster is not None
    pid = cluster.any_rank(trial.random)
    role = "leader" if pid in cluster.rank_pids("lead") else "follower"
    load = trial.load(bench)
    moment = trial.await_moment(driver, load)
    os.kill(pid, what)
    trial.record.moment += f", {role}"
    trial.finish(bench, load, moment)


@fault("kill-rank-2", "SIGKILL of one of 2 ranks", 20)
def _kill_one_of_two(trial: Trial) -> None:
    signal_rank(trial, Setting(size=2, nodes=(4,)), signal.SIGKILL)


@fault("stop-rank-2", "SIGSTOP of one of 2 ranks, `hang_timeout=5`", 5)
def _stop_one_of_two(trial: Trial) -> None:
    signal_rank(trial, Setting(size=2, nodes=(4,)), signal.SIGSTOP)


@fault("term-rank-2", "SIGTERM of one of 2 ranks", 5)
def _end_one_of_two(trial: Trial) -> None:
    signal_rank(trial, Setting(size=2, nodes=(4,)), signal.SIGTERM)


@fault("kill-rank-3", "SIGKILL of one of 3 ranks", 10)
def _kill_one_of_three(trial: Trial) -> None:
    signal_rank(trial, Setting(size=3, nodes=(4,)), signal.SIGKILL)


@fault("stop-rank-3", "SIGSTOP of one of 3 ranks, `hang_timeout=5`", 2)
def _stop_one_of_three(trial: Trial) -> None:
    signal_rank(trial, Setting(size=3, nodes=(4,)), signal.SIGSTOP)


@fault("halt-rank-2", "SIGSTOP of one of 2 ranks for up to 2 s, then SIGCONT", 6)
def _halt_one_of_two(trial: Trial) -> None:
    bench = trial.bench_of(Setting(size=2, nodes=(4,)))
    driver, cluster = bench.driver, bench.cluster
    assert cluster is not None
    pid = cluster.any_rank(trial.random)
    load = trial.load(bench)
    moment = trial.await_moment(driver, load)
    os.kill(pid, signal.SIGSTOP)
    driver.listen(lambda: False, trial.random.uniform(0.1, 2.0))
    os.kill(pid, signal.SIGCONT)
    trial.finish(bench, load, moment)
    if pid not in cluster.rank_pids():
        trial.record.unexplained.append("a rank that had stood still for a moment was replaced")


@fault("kill-all-ranks", "SIGKILL of both ranks at once", 5)
def _kill_all(trial: Trial) -> None:
    bench = trial.bench_of(Setting(size=2, nodes=(4,)))
    assert bench.driver and bench.cluster is not None
    pids = bench.cluster.rank_pids()
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    trial.finish(bench, load, moment)


@fault("kill-rank-in-rebuild", "SIGKILL of a rank, and of one of those that are to replace it", 8)
def _kill_in_rebuild(trial: Trial) -> None:
    bench = trial.bench_of(Setting(size=2, nodes=(4,)))
    driver, cluster = bench.driver, bench.cluster
    assert cluster is not None
    pids = set(cluster.rank_pids())
    load = trial.load(bench)
    moment = trial.await_moment(driver, load)
    os.kill(trial.random.choice(sorted(pids)), signal.SIGKILL)
    await_ranks(trial, lambda: [pid for pid in cluster.rank_pids() if pid not in pids])
    trial.finish(bench, load, moment)


@fault("kill-rank-in-start", "SIGKILL of one of 2 ranks while the engine starts", 8)
def _kill_in_start(trial: Trial) -> None:
    bench = trial.bench_of(Setting(size=2, nodes=(4,)))
    restart(trial, bench)
    cluster = bench.cluster
    assert cluster is not None
    driver = bench.new_driver()
    driver.tell("start", model=str(bench.model), options=bench.options)
    await_ranks(trial, cluster.rank_pids)
    try:
        driver.await_start()
    except StartFailed as failed:
        is_explained = str(failed).startswith("WorkerDied: rank ")
        (trial.record.errors if is_explained else trial.record.unexplained).append(str(failed))
        trial.record.leaked += bench.what_is_left(driver)
        driver.start(bench.model, bench.options)
    bench.adopt(driver)
    load = trial.load(bench)
    trial.finish(bench, load)


@fault("kill-rank-in-close", "SIGKILL of one of 2 ranks while the engine closes and saves", 6)
def _kill_in_close(trial: Trial) -> None:
    bench = trial.bench_of(Setting(size=2, nodes=(4,)))
    cluster, driver = bench.cluster, bench.driver
    assert cluster is not None
    pid = cluster.any_rank(trial.random)
    load = trial.load(bench)
    driver.finish(load)
    trial.compare(bench, load)
    assert bench.drop_driver() is driver
    driver.tell("close")
    wait = trial.random.random() * 0.5
    time.sleep(wait)
    trial.record.moment = f"{wait:.2f} s after it was told to close"
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if (error := driver.await_close()) is not None:
        (trial.record.errors if "WorkerDied: rank " in error else trial.record.unexplained).append(error)
    trial.record.leaked += bench.what_is_left(driver)
    driver.end()
    load = trial.load(bench)
    trial.finish(bench, load)


def await_ranks(trial: Trial, find: Callable[[], list[int]]) -> None:
    """Kills one of the processes that are found, some time after they are there."""
    deadline = time.monotonic() + START_TIMEOUT
    while not find():
        if time.monotonic() > deadline:
            raise Hung("no rank was started")
        time.sleep(0.02)
    wait = trial.random.random() * START_SECONDS
    time.sleep(wait)
    pid = trial.random.choice(find())
    title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    os.kill(pid, signal.SIGKILL)
    trial.record.moment += f", {title} {wait:.2f} s after its start"


def restart(trial: Trial, bench: Bench) -> None:
    """Ends the engine that runs, in peace, once its answers are known."""
    assert bench.driver
    driver = bench.drop_driver()
    assert driver is not None
    if (error := driver.close()) is not None:
        trial.record.unexplained.append(f"an engine that was closed: {error}")
    trial.record.leaked += bench.what_is_left(driver)
    driver.end()


@fault("kill-engine", "SIGKILL of a rank of one of two engines, each of 2 ranks", 8)
def _kill_one_engine(trial: Trial) -> None:
    signal_rank(trial, Setting(size=2, engines=2, nodes=(4,)), signal.SIGKILL)


@fault("kill-rank-demo-2", "SIGKILL of one of 2 ranks of SmolLM2-135M", 6)
def _kill_one_of_two_of_the_demo(trial: Trial) -> None:
    signal_rank(trial, Setting(size=2, nodes=(4,), model="smollm2", answer_len=96), signal.SIGKILL)


@fault("kill-rank-demo-3", "SIGKILL of one of 3 ranks of SmolLM2-135M", 3)
def _kill_one_of_three_of_the_demo(trial: Trial) -> None:
    signal_rank(trial, Setting(size=3, nodes=(4,), model="smollm2", answer_len=96), signal.SIGKILL)
