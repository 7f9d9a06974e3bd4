"""Follows a job to its end: its log to stdout, and then its exit code."""

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from ray.job_submission import JobStatus

from distkv.errors import ConfigError
from distkv.jobs.cluster import Cluster, ClusterAway, LogLost

STATUS_SECONDS = 0.5  # between two looks whether a job has ended
RECONNECTS = 5  # one after the other, without anything that is new
AWAY_SECONDS = 60.0  # that a dashboard may be away: one that is started anew, say
STOPPED = 143  # as after SIGTERM, which is what a job gets that is stopped
FAILED = 2  # of a job that ended without an exit code


def follow(cluster: Cluster, job: str, tell: Callable[[str], None]) -> Any:
    """Prints the job's log as it comes; returns Ray's `JobDetails` when it has ended.

    A connection that is lost is made anew. Raises ConfigError for a job that there is not, and when the cluster stays
    away, where the job may be going on."""
    cluster.details(job)
    printed, tries = 0, 0
    while True:
        try:
            before, printed = printed, asyncio.run(_print_log(cluster, job, printed))
        except _Lost as lost:
            tries = 0 if lost.printed > printed else tries + 1
            printed = lost.printed
            if tries > RECONNECTS:
                tell("the job's log cannot be followed any more; waiting for its end")
                break
            time.sleep(STATUS_SECONDS)
            _details(cluster, job)  # waits for the dashboard
            continue
        if (details := _details(cluster, job)).status.is_terminal():
            return details
        if printed == before:
            time.sleep(STATUS_SECONDS)
    while not (details := _details(cluster, job)).status.is_terminal():
        time.sleep(STATUS_SECONDS)
    return details


def exit_code(details: Any, tell: Callable[[str], None]) -> int:
    """That of the job's command; what kept a job from having one is told."""
    if details.status == JobStatus.STOPPED:
        tell(f"the job {details.submission_id} was stopped")
        return STOPPED
    code = details.driver_exit_code
    if code is not None:
        return code if code >= 0 else 128 - code
    if details.status == JobStatus.SUCCEEDED:
        return 0
    lines = [line.strip() for line in (details.message or "Ray does not say why").splitlines() if line.strip()]
    tell(f"the job {details.submission_id} failed before it could end: {lines[-1]}")
    return FAILED


def _details(cluster: Cluster, job: str) -> Any:
    deadline = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return cluster.details(job)
        except ClusterAway as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no Ray dashboard answers at {cluster.address} any more, and the job may be going on; later: "
                    f"distkv submit --address {cluster.address} --follow {job}"
                ) from error
        time.sleep(STATUS_SECONDS)


class _Lost(Exception):
    """The connection, after so many characters of the log."""

    def __init__(self, printed: int):
        self.printed = printed


async def _print_log(cluster: Cluster, job: str, printed: int) -> int:
    """Prints the log but for its first characters; returns how many it has."""
    passed = 0
    try:
        async for text in cluster.log(job):
            new = text[max(0, printed - passed) :]
            passed += len(text)
            if new:
                sys.stdout.write(new)
                sys.stdout.flush()
                printed = passed
    except LogLost as error:
        raise _Lost(max(printed, passed)) from error
    return max(printed, passed)
