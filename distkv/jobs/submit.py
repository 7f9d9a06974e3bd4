"""A command as a job: packed, submitted, followed, and its files brought back."""

import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distkv.errors import ConfigError
from distkv.jobs.cluster import Cluster
from distkv.jobs.following import exit_code, follow
from distkv.jobs.inbox import bring, check_pattern
from distkv.jobs.outbox import wrapped
from distkv.jobs.packing import MOST_BYTES, files_of, stage_distkv, write_zip

INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """What is to be submitted."""

    command: list[str]
    """As behind `distkv`."""
    working_dir: str
    """A folder, a .zip, or a URI that Ray takes."""
    env: dict[str, str]
    bring: list[str]
    name: str | None
    """The submission id; None for one that is made."""


def submit(address: str | None, job: Job, tell: Callable[[str], None]) -> tuple[Cluster, str]:
    """Uploads a job and has it started; returns where, and its submission id. What is wrong with the job is found
    before anybody is asked at `address`."""
    submitted = time.time()  # what is changed from now on may not be what the job gets
    name = job.name or f"distkv_{job.command[0]}_{secrets.token_hex(6)}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"the submission id {name!r} may have letters, digits, '_', '-' and '.' only; give another one"
        )
    patterns = [check_pattern(pattern) for pattern in job.bring]
    module = wrapped(name, submitted, patterns, job.command) if patterns else ["distkv", *job.command]
    with TemporaryDirectory(prefix="distkv-") as folder:
        working_dir, size = _working_dir(job.working_dir, name, Path(folder))
        package = stage_distkv(Path(folder, "modules"))
        size += sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
        cluster = Cluster(address)
        tell(f"submitting {name} to {cluster.address} ({size / 1e6:.1f} MB)")
        environment: dict[str, Any] = {"working_dir": working_dir, "py_modules": [str(package)]}
        if job.env:
            environment["env_vars"] = job.env
        cluster.submit(name, shlex.join(["python", "-m", *module]), environment)
    return cluster, name


def attend(cluster: Cluster, name: str, tell: Callable[[str], None]) -> int:
    """Follows a job to its end and brings its files; returns its exit code, or `INTERRUPTED` after Ctrl-C, which the
    job does not notice."""
    try:
        details = follow(cluster, name, tell)
    except KeyboardInterrupt:
        at = f"--address {cluster.address}"
        tell(
            f"the job goes on; to follow it again: distkv submit {at} --follow {name}; to stop it: "
            f"ray job stop {at} {name}"
        )
        return INTERRUPTED
    code = exit_code(details, tell)
    if "distkv.jobs.outbox" in details.entrypoint and details.driver_node_id:
        bring(cluster, name, details.driver_node_id, Path.cwd(), tell)
    return code


def named_variables(given: list[str], environment: Any) -> dict[str, str]:
    """The variables that a job gets: NAME has its value of here. Raises ConfigError for one that is not set."""
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {one!r} is neither NAME nor NAME=VALUE; give one of them")
        if not equals and name not in environment:
            raise ConfigError(f"--env {name}: the variable is not set here; set it, or give --env {name}=VALUE")
        found[name] = value if equals else environment[name]
    return found


def print_notice(text: str) -> None:
    """Beside the job's own output, which goes to stdout."""
    print(f"distkv: {text}", file=sys.stderr, flush=True)


def _working_dir(given: str, job: str, folder: Path) -> tuple[str, int]:
    """What Ray is to take as the working dir, and the bytes that are sent of it at most."""
    if "://" in given:
        return given, 0
    if given.endswith(".zip") and Path(given).is_file():
        size = Path(given).stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(
                f"{given!r} has {size / 1e6:.1f} MB and at most {MOST_BYTES / 1e6:.1f} MB are sent; leave something out"
            )
        return given, size
    target = folder / "working_dir.zip"
    write_zip(files_of(Path(given)), job, target)
    return str(target), target.stat().st_size
