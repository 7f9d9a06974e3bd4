"""A batch over two engines on two nodes, of which everything dies in turn: an engine, a node, the driver."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support import ray_cluster
from support.batches import answers, line, read_lines, start_batch, write_lines
from support.processes import ROOT
from support.ray_cluster import Cluster, rank_processes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_LINES = 500
PROGRESS = re.compile(r"(\d+)/500 lines \((\d+) %\), \S+ lines/s, ETA \S+; .*(\d) of 2 engines")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    cluster, head = ray_cluster.start(folder, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))  # the token to connect with lies there
        patch.chdir(ROOT)
        try:
            yield cluster
        finally:
            ray_cluster.stop(head)


def await_that(process: "subprocess.Popen[str]", what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_each_line_is_answered_once_whatever_dies(cluster: Cluster, talker: Path, tmp_path: Path) -> None:
    lines = [line(f"line {number}", max_tokens=200, ignore_eos=True) for number in range(NUM_LINES)]
    source, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with start_batch(talker, source, tmp_path / "undisturbed.jsonl") as process:
        assert process.wait() == 0
    flags = ("--ray-address", cluster.address, "--tensor-parallel-size", "2", "--data-parallel-size", "2")
    flags += ("--max-num-seqs", "8", "--device-kv-bytes", "32MiB")
    node = ray_cluster.join(cluster, tmp_path, 2)

    def num_lines() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    def leads() -> list[int]:
        return rank_processes().get("lead", [])

    try:
        first = start_batch(talker, source, output, *flags)
        with first:
            await_that(first, lambda: len(leads()) == 2 and num_lines() >= 40)
            os.kill(leads()[0], signal.SIGKILL)
            seen = num_lines()
            await_that(first, lambda: len(leads()) == 2 and num_lines() >= seen + 40)
            os.killpg(node.pid, signal.SIGKILL)
            seen = num_lines()
            await_that(first, lambda: num_lines() >= seen + 40)
            first.kill()
            told = first.communicate()[1]
        assert "is started anew" in told
        written = num_lines()
        assert 120 <= written < NUM_LINES

        with start_batch(talker, source, output, *flags) as second:
            told = second.communicate(timeout=400)[1]
        assert second.returncode == 0, told
        shown = [int(found[1]) for found in PROGRESS.finditer(told)]
        assert written - 1 <= shown[0] < NUM_LINES and shown[-1] == NUM_LINES and shown == sorted(shown)
        assert f"{NUM_LINES} of {NUM_LINES} lines are answered" in told
    finally:
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
    assert len(read_lines(output)) == NUM_LINES and not (tmp_path / "out.errors.jsonl").exists()
    assert answers(output) == answers(tmp_path / "undisturbed.jsonl")
    deadline = time.monotonic() + 60
    while leads() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not leads()
