"""Faults of whole nodes of a Ray cluster, and of Ray's own processes."""

import os
import signal
import time
from collections.abc import Callable

from reliability.bench import Bench, Setting
from reliability.driver_process import Gone
from reliability.faults import fault
from reliability.ray_nodes import RayNode, RayNodes
from reliability.trial import Trial

ONE_NODE = Setting(size=2, nodes=(4,), environment=(("RAY_gcs_rpc_server_reconnect_timeout_s", "10"),))
SPARE = Setting(size=2, nodes=(0, 2, 2))  # the driver's node has no room for ranks, and one of the others is enough
STALL_SECONDS = 100.0  # in which Ray takes a node for dead whose raylet stands still
SPREAD = Setting(size=3, nodes=(0, 2, 2))  # both nodes are needed


def node_of_ranks(trial: Trial, bench: Bench) -> tuple[RayNodes, RayNode]:
    """The cluster, and one of its nodes that has ranks of a running engine, which may be on its way there still."""
    assert bench.driver and bench.cluster is not None
    cluster = bench.cluster

    def with_ranks() -> list[RayNode]:
        return [node for node in cluster.nodes if node.pids("ray::RankActor")]

    bench.driver.listen(lambda: bool(with_ranks()), STALL_SECONDS)
    return cluster, trial.random.choice(with_ranks())


def lose_node(trial: Trial, setting: Setting, end: Callable[[Bench, RayNode], None]) -> tuple[Bench, RayNode]:
    """Takes a node with ranks away under load, and has another one join the cluster some seconds later; returns what
    was lost."""
    bench = trial.bench_of(setting)
    cluster, node = node_of_ranks(trial, bench)
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    end(bench, node)
    cluster.nodes.remove(node)
    bench.driver.listen(lambda: load.is_done, trial.random.uniform(0.0, 8.0))
    cluster.join(2)
    trial.finish(bench, load, moment)
    return bench, node


def kill_node(trial: Trial, setting: Setting) -> None:
    """Kills all processes of a node at once."""

    def kill(bench: Bench, node: RayNode) -> None:
        bench.family.note_segments()
        node.kill()

    lose_node(trial, setting, kill)


@fault("kill-node", "a node with both ranks killed whole; another one has room for them", 4)
def _kill_node(trial: Trial) -> None:
    kill_node(trial, SPARE)


@fault("kill-node-3", "a node killed whole under 3 ranks that need two nodes; another one joins", 4)
def _kill_node_of_three(trial: Trial) -> None:
    kill_node(trial, SPREAD)


@fault("drain-node", "SIGTERM of a node with both ranks, which Ray drains; another one has room for them", 3)
def _drain_node(trial: Trial) -> None:
    drain_node(trial, SPARE)


@fault("drain-node-3", "SIGTERM of a node under 3 ranks that need two nodes, which Ray drains; another one joins", 2)
def _drain_node_of_three(trial: Trial) -> None:
    drain_node(trial, SPREAD)


def drain_node(trial: Trial, setting: Setting) -> None:
    """Has Ray drain a node, for half a minute unless nothing runs there before."""
    bench, node = lose_node(trial, setting, lambda _, node: node.process.send_signal(signal.SIGTERM))
    if left := bench.settled(lambda: [] if node.process.poll() is not None else ["a node that was to go"]):
        trial.record.leaked += left
        node.kill()


@fault("kill-raylet", "SIGKILL of the raylet of the ranks' node", 4)
def _kill_raylet(trial: Trial) -> None:
    bench = trial.bench_of(SPARE)
    cluster, node = node_of_ranks(trial, bench)
    [raylet] = node.pids("raylet/raylet")
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    os.kill(raylet, signal.SIGKILL)
    trial.finish(bench, load, moment)
    left = bench.settled(lambda: [f"process {pid} of a node without raylet" for pid in node.pids("ray::")])
    trial.record.leaked += left
    node.kill()
    cluster.nodes.remove(node)
    cluster.join(2)


@fault("stop-raylet", "SIGSTOP of the raylet of the ranks' node for up to 5 s, then SIGCONT", 4)
def _stop_raylet(trial: Trial) -> None:
    bench = trial.bench_of(SPARE)
    _, node = node_of_ranks(trial, bench)
    [raylet] = node.pids("raylet/raylet")
    halt(trial, bench, raylet)


@fault("stop-gcs", "SIGSTOP of Ray's GCS for up to 5 s, then SIGCONT", 4)
def _stop_gcs(trial: Trial) -> None:
    bench = trial.bench_of(SPARE)
    cluster, _ = node_of_ranks(trial, bench)
    [gcs] = cluster.nodes[0].pids("gcs/gcs_server")
    halt(trial, bench, gcs)


def halt(trial: Trial, bench: Bench, pid: int) -> None:
    """Has a process of Ray stand still for a moment, which ranks do not notice."""
    assert bench.cluster is not None
    ranks = bench.cluster.rank_pids()
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    os.kill(pid, signal.SIGSTOP)
    bench.driver.listen(lambda: False, trial.random.uniform(0.5, 5.0))
    os.kill(pid, signal.SIGCONT)
    trial.finish(bench, load, moment)
    if bench.cluster.rank_pids() != ranks:
        trial.record.unexplained.append("ranks were replaced though a process of Ray had only stood still")


@fault("kill-gcs", "SIGKILL of Ray's GCS, `RAY_gcs_rpc_server_reconnect_timeout_s=10`; then another cluster", 2)
def _kill_gcs(trial: Trial) -> None:
    kill_cluster(trial, "gcs/gcs_server")


@fault("kill-head-raylet", "SIGKILL of the raylet of the driver's and the ranks' node; then another cluster", 2)
def _kill_head_raylet(trial: Trial) -> None:
    kill_cluster(trial, "raylet/raylet")


def kill_cluster(trial: Trial, title: str) -> None:
    """Kills what neither driver nor ranks can do without: they answer as long as they can, end by themselves, and leave
    nothing but the cache."""
    bench = trial.bench_of(ONE_NODE)
    driver, cluster = bench.driver, bench.cluster
    assert cluster is not None
    [pid] = cluster.nodes[0].pids(title)
    loads = [trial.load(bench)]
    moment = trial.await_moment(driver, loads[0])
    os.kill(pid, signal.SIGKILL)
    try:
        while not any(loads[-1].ended.values()):
            driver.finish(loads[-1])
            loads.append(trial.load(bench))
    except Gone:
        trial.record.moment += f", the driver ended: {driver.log.read_text().strip().splitlines()[-1][:300]}"
    trial.record.moment += f", {len(loads) - 1} more loads in {time.monotonic() - moment:.1f} s"
    for load in loads:
        trial.compare(bench, load, explained="it has not ended|WorkerDied")
    bench.drop_driver()
    trial.record.leaked += bench.what_is_left()
    driver.kill()
    cluster.stop()
    trial.record.leaked += bench.what_runs()
    bench.family.kill_all()
    bench.start_cluster()
    trial.finish(bench, trial.load(bench))


@fault("lose-raylet", "SIGSTOP of the raylet of the ranks' node until Ray takes the node for dead, then SIGCONT", 1)
def _lose_raylet(trial: Trial) -> None:
    """Ranks whose node is taken for dead are there all the same, and must leave."""
    bench = trial.bench_of(SPARE)
    cluster, node = node_of_ranks(trial, bench)
    driver, [raylet] = bench.driver, node.pids("raylet/raylet")
    os.kill(raylet, signal.SIGSTOP)
    moment, load = time.monotonic(), trial.load(bench)
    while cluster.rank_pids() and node.pids("ray::RankActor") == cluster.rank_pids():
        driver.finish(load)
        trial.compare(bench, load)
        load = trial.load(bench)
        if time.monotonic() - moment > STALL_SECONDS:
            break
    trial.record.moment = f"{time.monotonic() - moment:.0f} s after SIGSTOP"
    os.kill(raylet, signal.SIGCONT)
    trial.finish(bench, load, moment)
    trial.record.leaked += bench.settled(
        lambda: [f"process {pid} of a dead node" for pid in node.pids("ray::RankActor")]
    )
    node.kill()
    cluster.nodes.remove(node)
    cluster.join(2)
