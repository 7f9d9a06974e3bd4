"""Faults of single ranks while an engine runs."""

import os
import signal

from reliability.bench import Setting
from reliability.faults import fault
from reliability.trial import Trial


def signal_rank(trial: Trial, setting: Setting, what: signal.Signals) -> None:
    """Sends a signal to a rank that chance has it."""
    bench = trial.bench_of(setting)
    driver, cluster = bench.driver, bench.cluster
    assert cluster is not None
    load = trial.load(bench)
    moment = trial.await_moment(driver, load)
    pid = cluster.any_rank(trial.random)
    role = "leader" if pid in cluster.rank_pids("lead") else "follower"
    trial.record.moment += f", {role}"
    os.kill(pid, what)
    trial.finish(bench, load, moment)


@fault("kill-rank-2", "SIGKILL of one of 2 ranks", 30)
def _kill_one_of_two(trial: Trial) -> None:
    signal_rank(trial, Setting(size=2, nodes=(4,)), signal.SIGKILL)


@fault("stop-rank-2", "SIGSTOP of one of 2 ranks, `hang_timeout=5`", 8)
def _stop_one_of_two(trial: Trial) -> None:
    signal_rank(trial, Setting(size=2, nodes=(4,)), signal.SIGSTOP)


@fault("term-rank-2", "SIGTERM of one of 2 ranks", 8)
def _end_one_of_two(trial: Trial) -> None:
    signal_rank(trial, Setting(size=2, nodes=(4,)), signal.SIGTERM)


@fault("kill-rank-3", "SIGKILL of one of 3 ranks", 15)
def _kill_one_of_three(trial: Trial) -> None:
    signal_rank(trial, Setting(size=3, nodes=(4,)), signal.SIGKILL)


@fault("stop-rank-3", "SIGSTOP of one of 3 ranks, `hang_timeout=5`", 4)
def _stop_one_of_three(trial: Trial) -> None:
    signal_rank(trial, Setting(size=3, nodes=(4,)), signal.SIGSTOP)
