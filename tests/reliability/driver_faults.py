"""Faults of the process that owns an engine."""

import signal

from reliability.bench import PAGE, Setting
from reliability.faults import fault
from reliability.trial import Trial

WRITE_SECONDS = 1.0  # in which the pages of ended requests are on disk, of an engine that has nothing else to do
TWO_RANKS = Setting(size=2, nodes=(4,))


@fault("kill-driver", "SIGKILL of the driver: another one then goes on with the cache", 6)
def _kill_driver(trial: Trial) -> None:
    bench = trial.bench_of(TWO_RANKS)
    driver = bench.driver
    salt = trial.record.seed + " before"
    before = driver.ask(trial.random.sample(bench.requests, 2), salt)
    driver.finish(before)
    driver.listen(lambda: False, WRITE_SECONDS)
    load = trial.load(bench)
    trial.await_moment(driver, load)
    bench.family.note_segments()
    assert bench.drop_driver() is driver
    driver.kill()
    trial.compare(bench, load, explained="it has not ended")
    asker = bench.new_driver()
    trial.record.leaked += bench.what_is_left(asker)
    seconds = asker.start(bench.model, bench.options)
    bench.adopt(asker)
    trial.record.pauses.append(seconds)
    again = asker.ask(before.requests, salt)
    trial.finish(bench, again)
    for request in before.requests:
        cached, whole = again.cached[again.name_of(request)], (len(request.prompt) - 1) // PAGE * PAGE
        if cached < whole:
            trial.record.unexplained.append(f"{cached} tokens of a prompt were found on disk, which had {whole}")


@fault("stop-driver", "SIGSTOP of the driver for up to 8 s, then SIGCONT", 5)
def _stop_driver(trial: Trial) -> None:
    bench = trial.bench_of(TWO_RANKS)
    driver, cluster = bench.driver, bench.cluster
    assert cluster is not None
    ranks = cluster.rank_pids()
    load = trial.load(bench)
    moment = trial.await_moment(driver, load)
    driver.process.send_signal(signal.SIGSTOP)
    driver.listen(lambda: False, trial.random.uniform(1.0, 8.0))
    driver.process.send_signal(signal.SIGCONT)
    trial.finish(bench, load, moment)
    if cluster.rank_pids() != ranks:
        trial.record.unexplained.append("ranks were replaced though only their owner had stood still")
